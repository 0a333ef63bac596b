"""What a plan counts besides prompt files: existing images, and a run's own copy of its prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from synthgen.errors import ConfigError, MissingArtifact
from synthgen.prompt_copy import PromptCopy
from synthgen.prompts import Survey, find_words
from synthgen.records import Prompt
from synthgen.stores import open_binary
from synthgen.stores.tar import Member, TarWriter, iter_samples, read_member
from synthgen.untrusted import read_file

if TYPE_CHECKING:
    from synthgen.datasets import CaptionedFolder

__all__ = ["ImageSurvey", "evenly_spaced", "survey_copy", "survey_images"]

T = TypeVar("T")

_PLAIN_KEY = re.compile(r"[\w/-]{1,90}", re.ASCII)


@dataclass(frozen=True)
class ImageSurvey:
    """How many images a source holds, and some of them, evenly spaced: key, and a function that reads the members."""

    count: int
    few: tuple[tuple[str, Callable[[], dict[str, bytes]]], ...]

    def write(self, folder: Path) -> None:
        """Write each of ``few`` into ``folder`` as a tar of its own, because two of them may have the same key."""
        folder.mkdir()
        for number, (key, read) in enumerate(self.few):
            with TarWriter(folder / f"{number:06d}.tar") as tar:
                tar.add(key if _PLAIN_KEY.fullmatch(key) else f"{number:06d}", read())


def survey_images(source: str, metadata: str = "", *, limit: int = 0, most: int = 64) -> ImageSurvey:
    """Count the images of a source as ``attend`` does, and choose ``most`` of them; only headers of tars are read.

    Raises:
        MissingArtifact, CorruptFile, PromptError, ConfigError: as :func:`~synthgen.datasets.open_captioned`; captions
            in tars are not read.
    """
    from synthgen.datasets import CaptionedFolder
    from synthgen.datasets.sources import tars_of

    tars = tars_of(source)
    if not tars:
        images = CaptionedFolder(source, metadata)
        count = min(len(images), limit) if limit else len(images)
        return ImageSurvey(count, tuple(_folder_sample(images, number) for number in evenly_spaced(range(count), most)))
    if metadata:
        raise ConfigError(f"{source} holds tars, which have their captions in them; leave --metadata out")
    stored = (
        (key, partial(_read_members, tar, members)) for tar in tars for key, members in iter_samples(_checked(tar))
    )
    count, few = _count(islice(stored, limit or None), most)
    if not count:
        raise MissingArtifact(f"there are no samples in {source}")
    return ImageSurvey(count, tuple(few))


def survey_copy(copy: PromptCopy, *, most: int = 64) -> Survey:
    """An overview of a run's own copy of its prompts: ``most`` of them, evenly spaced, as lines of a ``.jsonl`` file.

    Raises:
        CorruptFile: one of these cannot be read.
    """
    prompts = tuple(copy[index] for index in evenly_spaced(range(len(copy)), most))
    return Survey(len(copy), tuple(map(_line_of, prompts)), prompts, ())


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, at equal distances."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _line_of(prompt: Prompt) -> str:
    """A line of a ``.jsonl`` file that is read as this prompt."""
    label = {} if prompt.label is None else {"label": prompt.label}
    try:
        in_order = tuple(find_words(prompt.text, prompt.words)) == prompt.spans
    except ValueError:  # brackets may mark a part of a word
        in_order = False
    if in_order:
        return json.dumps({"prompt": prompt.text, "words": list(prompt.words), **label}, ensure_ascii=False)
    text = prompt.text
    for first, last in sorted(prompt.spans, reverse=True):
        text = f"{text[:first]}[{text[first:last]}]{text[last:]}"
    return json.dumps({"prompt": text, **label}, ensure_ascii=False)


def _count(items: Iterable[T], most: int) -> tuple[int, list[T]]:
    """The number of items, and ``most`` of them, evenly spaced; the others are not kept in memory."""
    count, step, kept = 0, 1, list[T]()
    for item in items:
        if count % step == 0:
            kept.append(item)
            if len(kept) == 2 * most:
                kept, step = kept[::2], 2 * step
        count += 1
    return count, evenly_spaced(kept, most)


def _checked(tar: Path) -> Path:
    if tar.suffix != ".tar":
        raise ConfigError(f"{tar} is not a tar; give a tar, a pattern such as 'shards/*.tar', or a folder of images")
    return tar


def _read_members(tar: Path, members: dict[str, Member]) -> dict[str, bytes]:
    with open_binary(tar) as file:
        return {name: read_member(file, member) for name, member in members.items()}


def _folder_sample(images: CaptionedFolder, number: int) -> tuple[str, Callable[[], dict[str, bytes]]]:
    """An image of a folder as a sample of a tar."""
    about = {
        "captions": list(images.captions(number)),
        "words": list(images.words(number)),
        "label": images.label(number),
    }
    about = {name: value for name, value in about.items() if value}
    return images.key(number), partial(_read_file, images.file(number), json.dumps(about, ensure_ascii=False))


def _read_file(path: Path, about: str) -> dict[str, bytes]:
    from synthgen.datasets.samples import IMAGES

    ending = path.suffix.lower().removeprefix(".")
    name = ending if ending in IMAGES else "png"  # of bmp and gif; decoders look at the content
    return {name: read_file(path), "json": about.encode(errors="replace")}
