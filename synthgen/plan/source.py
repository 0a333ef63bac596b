"""What a plan looks at in place of a prompt file: images that exist already, or a run's own copy of its prompts.

It is told how many there are, and a few of them from all over. Images are counted as ``attend`` would read them, tar by
tar or file by file, and never held all at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import TypeVar

from synthgen.captions import TABLES, Caption, iter_listing, read_beside
from synthgen.errors import ConfigError, MissingArtifact, PromptError
from synthgen.prompt_copy import PromptCopy
from synthgen.prompts import Survey, find_words
from synthgen.records import Prompt
from synthgen.stores import open_here, parse_location, walk_files
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import Member, TarWriter, iter_samples, read_member
from synthgen.untrusted import read_file

__all__ = ["Pictures", "survey_copy", "survey_pictures"]

T = TypeVar("T")

_PLAIN_KEY = re.compile(r"[\w/-]{1,90}", re.ASCII)


@dataclass(frozen=True)
class Stored:
    """A sample of a tar."""

    tar: Path
    key: str
    members: dict[str, Member]

    def read(self) -> dict[str, bytes]:
        """Its members."""
        with open_here(self.tar) as file:
            return {name: read_member(file, member) for name, member in self.members.items()}


@dataclass(frozen=True)
class Loose:
    """An image of a folder, by its name in there, and what is said of it."""

    folder: Path
    name: str
    caption: Caption

    @property
    def key(self) -> str:
        """The name without its ending."""
        return Path(self.name).with_suffix("").as_posix()

    def read(self) -> dict[str, bytes]:
        """What would be its members in a tar."""
        label = self.caption.label or self.name.rpartition("/")[0].partition("/")[0]
        said = {"captions": list(self.caption.texts), "words": list(self.caption.words), "label": label}
        told = json.dumps({key: value for key, value in said.items() if value}, ensure_ascii=False)
        ending = Path(self.name).suffix.lower().removeprefix(".").replace("bmp", "png")  # tars know no bmp
        return {ending: read_file(self.folder / self.name), "json": told.encode(errors="replace")}


@dataclass(frozen=True)
class Pictures:
    """How many images a source holds, and a few of them from all over it."""

    count: int
    few: tuple[Stored | Loose, ...]

    def write(self, folder: Path) -> None:
        """Put the few into ``folder``, each as a tar of its own, so that equal keys do no harm."""
        folder.mkdir()
        for number, one in enumerate(self.few):
            key = one.key if _PLAIN_KEY.fullmatch(one.key) else f"{number:06d}"
            with TarWriter(folder / f"{number:06d}.tar") as tar:
                tar.add(key, one.read())


def survey_pictures(source: str, metadata: str = "", *, limit: int = 0, most: int = 64) -> Pictures:
    """Count the images of a tar, a pattern of tars, a folder of tars or of images, and keep in mind ``most`` of them.

    Of tars the headers are read, of a folder the names, of a table a row at a time (COCO's captions are one object, and
    read whole). With ``limit`` no more tars are read than hold so many.

    Raises:
        MissingArtifact, CorruptFile, PromptError, ConfigError: as :func:`~synthgen.datasets.open_captioned`; captions
            are those of the few, and what is wrong with others is not seen.
    """
    from synthgen.datasets.sources import tars_of

    folder = parse_location(source)
    tars = [] if _has_no_tars(folder) else tars_of(source)
    if tars and metadata:
        raise ConfigError(f"{source} holds tars, which have their captions in them; leave --metadata out")
    if tars:
        stored = (Stored(tar, *sample) for tar in tars for sample in iter_samples(_checked(tar)))
        count, few = _spread(islice(stored, limit or None), most)
        if not count:
            raise MissingArtifact(f"there are no samples in {source}")
        return Pictures(count, tuple(few))
    count, loose = _listed(folder, parse_location(metadata), most) if metadata else _beside(folder, most)
    return Pictures(min(count, limit) if limit else count, tuple(loose))


def survey_copy(copy: PromptCopy, *, most: int = 64) -> Survey:
    """What a run's own copy of its prompts holds: ``most`` of them, evenly apart, and their lines as of a ``.jsonl``.

    Raises:
        CorruptFile: one that was looked at cannot be read.
    """
    count = min(most, len(copy))
    prompts = tuple(copy[index * len(copy) // count] for index in range(count))
    return Survey(len(copy), tuple(map(_line_of, prompts)), prompts, ())


def _line_of(prompt: Prompt) -> str:
    """The line of a ``.jsonl`` file that says this prompt."""
    told = {} if prompt.label is None else {"label": prompt.label}
    try:
        plain = tuple(find_words(prompt.text, prompt.words)) == prompt.spans
    except ValueError:  # brackets may mark a part of a word
        plain = False
    if plain:
        return json.dumps({"prompt": prompt.text, "words": list(prompt.words), **told}, ensure_ascii=False)
    text = prompt.text
    for first, last in sorted(prompt.spans, reverse=True):
        text = f"{text[:first]}[{text[first:last]}]{text[last:]}"
    return json.dumps({"prompt": text, **told}, ensure_ascii=False)


def _has_no_tars(folder: Path) -> bool:
    """Whether this is a folder of this machine without tars, told without a list of what is in it."""
    if isinstance(folder, RemotePath) or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return not any(entry.name.endswith(".tar") for entry in entries)


def _checked(tar: Path) -> Path:
    if tar.suffix != ".tar":
        raise ConfigError(f"{tar} is not a tar; give a tar, a pattern such as 'shards/*.tar', or a folder of images")
    return tar


def _spread(items: Iterable[T], most: int) -> tuple[int, list[T]]:
    """How many there are, and ``most`` of them, evenly apart."""
    count, step, kept = 0, 1, list[T]()
    for item in items:
        if count % step == 0:
            kept.append(item)
            if len(kept) == 2 * most:
                kept, step = kept[::2], 2 * step
        count += 1
    return count, [kept[index * len(kept) // most] for index in range(most)] if len(kept) > most else kept


# -- folders


def _beside(folder: Path, most: int) -> tuple[int, list[Loose]]:
    """The images of a folder; captions stand beside them, or in tables in the folder."""
    tables = list[str]()

    def images() -> Iterator[tuple[str, Caption]]:
        for path in walk_files(folder, hidden=False):
            name = path.relative_to(folder).as_posix()
            if name.rpartition("/")[2] in TABLES:
                tables.append(name)
            elif _is_image(name):
                yield name, Caption()

    count, few = _drawn(images(), most)
    if not count:
        raise MissingArtifact(f"there are neither tars nor images in {folder}")
    said = {name: read_beside(folder / name) for name, _ in few}
    for table in sorted(tables, key=lambda name: Path(name).parts):
        for _, name, caption in iter_listing(folder / table, folder):
            if name in said:
                said[name] = caption
            elif not (_is_image(name) and (folder / name).is_file()):
                raise PromptError(f"{folder / table} names {name!r}, and there is no such image in {folder}")
    return count, [Loose(folder, name, caption) for name, caption in said.items()]


def _listed(folder: Path, metadata: Path, most: int) -> tuple[int, list[Loose]]:
    """The images of a folder that a table lists."""
    rows = ((name, caption) for _, name, caption in iter_listing(metadata, folder))
    count, few = _drawn((row for row in rows if _is_image(row[0]) and (folder / row[0]).is_file()), most)
    if not count:
        raise MissingArtifact(f"no image of {folder} is listed in {metadata}; its file names are relative")
    return count, [Loose(folder, name, caption) for name, caption in few]


def _drawn(items: Iterable[tuple[str, Caption]], most: int) -> tuple[int, list[tuple[str, Caption]]]:
    """How many there are, and ``most`` of them by lot: the same ones in whatever order they come."""
    count = 0

    def counted() -> Iterator[tuple[str, Caption]]:
        nonlocal count
        for count, item in enumerate(items, start=1):  # noqa: B007 - it is what is asked for
            yield item

    few = nsmallest(most, counted(), key=lambda item: _lot(item[0]))
    return count, sorted(few, key=lambda item: item[0])


def _lot(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()


def _is_image(name: str) -> bool:
    from synthgen.datasets.samples import IMAGES

    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.rpartition(".")[2].lower() in (*IMAGES, "bmp")
