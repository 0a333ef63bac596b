"""Where each word of a caption looks in an image that exists already."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8

from synthgen.backbones import BACKBONES, Backbone
from synthgen.config import Choice
from synthgen.errors import CorruptFile, PromptError
from synthgen.image import resize
from synthgen.prompts import expand, find_words, parse_line, sample_seed
from synthgen.records import Generation, Maps, Prompt, Report, Request, sample_key
from synthgen.run import Run, digest
from synthgen.stages import Stage, Work, Worker, unhashed
from synthgen.stages._generations import write_unit

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset

__all__ = ["Attend"]

_MAX_WORDS = 255  # what an image of labels can tell apart
_LONGEST = 2.0  # the longest side against the shortest at which the network sees an image
_ADVICE = re.compile(r"; (?:delete|get|give|name) .*", re.DOTALL)  # to mend a sample: its run would refuse the new one


@dataclass(frozen=True)
class Attend(Stage):
    """Make the record of ``generate`` for images that exist, from their captions.

    ``images`` is a WebDataset tar, a pattern of tars, a folder of them, or a folder of images. A caption is a member
    ``txt`` or stands in ``json``; in a folder it is listed in ``metadata.jsonl`` or ``metadata.csv``, or in a ``.txt``
    beside its image. ``words`` to look for may be listed with it; else it is read as a line of a prompt file. Each
    image is noised to every one of ``timesteps`` and seen by the network once at each. With ``inversion_steps`` it is
    carried to noise without chance instead, as DiffusionSeg reportedly does, and recorded on the way.

    The network sees the whole image, and so maps and masks are of the whole image. What cannot be read, the image or in
    a tar its caption, is left out with its reason; a unit may be left empty. ``source`` in the image's json is its own
    name, so that masks can be held against true ones.
    """

    name: ClassVar = "attend"
    reads: ClassVar = ()
    writes: ClassVar = ("images", "maps")
    accelerated: ClassVar = True
    window: ClassVar[int] = 4  # batches that are held at once, to see images of one shape together

    images: str = field(metadata={"unhashed": True})  # their names and sizes count, not where they lie
    metadata: str = unhashed("")  # a file that lists captions, and which images of the folder count; its content counts
    caption: str = ""  # for images without one, such as "a photo of a {label}"; the label is the word to look for
    limit: int = 0  # at most so many images; 0: all
    fit: Literal["aspect", "stretch"] = "aspect"  # keep proportions (up to 2 : 1), or see all at the model's own size
    max_side: int = 1024  # pixels; a larger image is stored smaller, and has its masks at that size; 0: as it is
    timesteps: tuple[int, ...] = (50, 100, 200)
    inversion_steps: int = 0  # more than 0: no noise, but a deterministic inversion in so many steps
    unit_size: int = 64
    batch_size: int = unhashed(16)
    backbone: Choice = Choice("tiny")

    def __post_init__(self) -> None:
        if not self.timesteps or not all(0 <= timestep < 1000 for timestep in self.timesteps):
            raise ValueError(f"timesteps must be one or more of 0 to 999, not {self.timesteps}")
        if not 0 <= self.inversion_steps <= 1000:
            raise ValueError(f"inversion_steps must be 0 (noise) or up to 1000, not {self.inversion_steps}")
        if not 1 <= self.unit_size <= 10_000 or self.batch_size < 1:
            raise ValueError(
                f"unit_size must be 1 to 10000 and batch_size 1 or more, not {self.unit_size} and {self.batch_size}"
            )
        if self.limit < 0 or self.max_side < 0:
            raise ValueError(f"limit and max_side must be 0 (none) or more, not {self.limit} and {self.max_side}")
        if self.fit not in ("aspect", "stretch"):
            raise ValueError(f"fit must be aspect or stretch, not {self.fit!r}")
        plain = self.caption.replace("{label}", "", 1)
        if any(mark in plain for mark in "{}") or (plain != self.caption and any(mark in plain for mark in "[]")):
            raise ValueError(f"caption must be as 'a photo of a {{label}}' or 'a [dog] outside', not {self.caption!r}")
        try:
            parse_line(self.caption)
        except ValueError as error:
            raise ValueError(f"caption {self.caption!r} cannot be read: {error}") from None

    def source_names(self) -> tuple[str, ...]:
        """The images."""
        return (self.images,)

    def complete(self) -> Attend:
        """With every option of the backbone."""
        return replace(self, backbone=BACKBONES.complete(self.backbone, "device"))

    def inputs(self, run: Run) -> dict[str, str]:
        """Names and sizes of the files; of a folder of images the captions too."""
        from synthgen.datasets import CaptionedFolder, source_inputs

        found = {"images": digest(list(source_inputs(self.images).values()))}
        _dataset.cache_clear()  # a caption may have been mended since an earlier call of this process
        samples = self._samples()
        if isinstance(samples, CaptionedFolder):
            said = [[one.texts, one.words, samples.label(number)] for number, one in enumerate(samples.said)]
            found["captions"] = digest(said)
        return found

    def prepare(self, run: Run) -> None:
        """See that every image of a folder has a caption, and in tars at least one; the others are read unit by unit.

        Raises:
            PromptError: of a folder one has none, or a listed word does not stand in it; of tars not one can be used.
        """
        from synthgen.datasets import CaptionedFolder

        samples, first = self._samples(), None
        is_folder = isinstance(samples, CaptionedFolder)
        for number in range(self._total()):
            try:
                prompt_of(samples, number, self.caption)
                if not is_folder:
                    return
            except PromptError as error:
                if is_folder:
                    raise
                first = first or error
            except CorruptFile:
                continue  # it is left out, as an image that cannot be read
        if first is not None:
            raise PromptError(f"no caption in {self.images} can be used: {first}")

    def plan(self, run: Run) -> list[int]:
        """Units of ``unit_size`` images; the last may be smaller."""
        return list(range(-(-self._total() // self.unit_size)))

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        return min(self.unit_size, self._total() - unit * self.unit_size)

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Load the backbone; then a unit is its images, a few batches at a time."""
        from synthgen.diffusion import one_thread

        backbone = BACKBONES.build(self.backbone, device=worker.device)

        def batches(unit: int, unreadable: set[str]) -> Iterator[list[Generation]]:
            held = self.window * self.batch_size
            for start in range(0, self.size(run, unit), held):
                rows = range(start, min(start + held, self.size(run, unit)))
                given = [self.read(run, unit, row) for row in rows]
                unreadable |= {one.request.key for one in given if one.failed}
                yield self.look(backbone, given)

        def work(unit: int) -> Report:
            unreadable: set[str] = set()
            return write_unit(run, unit, batches(unit, unreadable), worker.tick, unreadable)

        with one_thread(worker.device):
            yield work

    def read(self, run: Run, unit: int, row: int) -> Generation:
        """An image with its request and no maps yet; one that cannot be read, or its caption, has failed."""
        samples, number, key = self._samples(), unit * self.unit_size + row, sample_key(unit, row)
        request = Request(key, Prompt(""), sample_seed(run.seed, key), samples.key(number))
        try:
            image = samples[number].image
            request = replace(request, prompt=prompt_of(samples, number, self.caption))
        except (CorruptFile, PromptError) as error:
            reason = _ADVICE.sub("", str(error))
            return Generation(request, np.zeros((1, 1, 3), np.uint8), _nothing(), failed=reason)
        return Generation(request, image, _nothing())

    def look(self, backbone: Backbone, given: Sequence[Generation]) -> list[Generation]:
        """The same in the same order, with maps; images of one shape are seen together."""
        made = list(given)
        shapes: dict[tuple[int, int], list[int]] = {}
        for place, one in enumerate(given):
            if not one.failed:
                shapes.setdefault(self.seen_size(one.image, backbone), []).append(place)
        for size, places in shapes.items():
            for start in range(0, len(places), self.batch_size):
                few = places[start : start + self.batch_size]
                pixels = np.stack([resize(given[place].image, size) for place in few])
                requests = [given[place].request for place in few]
                records = backbone.attend(pixels, requests, self.timesteps, self.inversion_steps)
                for place, record in zip(few, records, strict=True):
                    made[place] = replace(record, image=shrunk(given[place].image, self.max_side))
        return made

    def seen_size(self, image: UInt8[np.ndarray, "H W 3"], backbone: Backbone) -> tuple[int, int]:
        """Height and width, in pixels, at which the network sees an image."""
        if self.fit == "stretch":
            return backbone.size
        return fitted_size((image.shape[0], image.shape[1]), backbone.size, backbone.multiple)

    def _samples(self) -> ImageDataset:
        return _dataset(self.images, self.metadata)

    def _total(self) -> int:
        total = len(self._samples())
        return min(total, self.limit) if self.limit else total


def prompt_of(samples: ImageDataset, number: int, template: str = "") -> Prompt:
    """The prompt of an image that exists: its caption, and the words that are listed or that a prompt line would mark.

    Raises:
        PromptError: it has no caption and ``template`` gives none, or a listed word does not stand in it.
    """
    from synthgen.captions import LONGEST

    text, label = next(iter(samples.captions(number)), ""), samples.label(number)
    try:
        if not text:
            return _from_template(template, label)
        if len(text) > LONGEST:
            raise ValueError(f"its caption has {len(text)} characters or more; {LONGEST} are the most")
        if words := samples.marked(number):
            spans = find_words(text, words)
            prompt = Prompt(text, tuple(text[first:last] for first, last in spans), tuple(spans))
        else:
            prompt = parse_line(text)
        if len(prompt.words) > _MAX_WORDS:
            raise ValueError(
                f"its caption asks for {len(prompt.words)} masks; {_MAX_WORDS} are the most, so mark fewer"
            )
    except ValueError as error:
        raise PromptError(f"sample {samples.key(number)}: {error}") from None
    return replace(prompt, label=label or prompt.label)


def _from_template(template: str, label: str | None) -> Prompt:
    if not template:
        raise ValueError(
            "it has no caption; give it a txt (a member of its tar, or a file beside it), or a row in metadata.jsonl, "
            "or one to all that have none with --caption 'a photo of a {label}'"
        )
    if "{label}" not in template:
        return replace(parse_line(template), label=label)
    word = " ".join((label or "").replace("_", " ").split())
    if not word or word.isdecimal():
        known = f"its class is only a number, {word}" if word else "it has neither caption nor class"
        raise ValueError(f"{known}; name the class by a folder around it, or by label in its json or metadata row")
    (prompt,) = expand([Prompt(word, (word,), ((0, len(word)),), label)], [template.replace("{label}", "{}")])
    return prompt


def fitted_size(shape: tuple[int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width with about the proportions of ``shape`` and the area of ``size``, multiples of ``multiple``.

    Beyond 2 : 1 the proportions are those of 2 : 1. What has the proportions of ``size`` gets ``size`` itself.
    """
    ratio = min(max(shape[1] / shape[0], 1 / _LONGEST), _LONGEST)
    if math.isclose(ratio, size[1] / size[0]):
        return size
    height = math.sqrt(size[0] * size[1] / ratio)
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, height * ratio))
    return rows, columns


def shrunk(image: UInt8[np.ndarray, "H W 3"], max_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image, no side of it longer than ``max_side`` pixels (0: however long)."""
    longest = max(image.shape[:2])
    if not max_side or longest <= max_side:
        return image
    height, width = (max(1, round(side * max_side / longest)) for side in image.shape[:2])
    return resize(image, (height, width))


def _nothing() -> Maps:
    return Maps((), np.zeros((0, 1, 1), np.float16), np.zeros((0, 1, 1), np.float16))


@lru_cache(maxsize=2)
def _dataset(source: str, metadata: str) -> ImageDataset:
    """Opened once; every unit asks for its size."""
    from synthgen.datasets import open_captioned

    return open_captioned(source, metadata)
