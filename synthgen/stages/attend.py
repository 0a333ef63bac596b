"""Record cross-attention maps for existing images, from their captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from jaxtyping import UInt8

from synthgen.backbones import BACKBONES, Backbone
from synthgen.config import Choice
from synthgen.errors import CorruptFile, PromptError
from synthgen.image import resize
from synthgen.prompts import expand, find_words, parse_line, sample_seed
from synthgen.records import Generation, Maps, Prompt, Report, Request, sample_key
from synthgen.run import Run, digest
from synthgen.stages import Work, Worker, growing, unhashed
from synthgen.stages._generations import write_unit
from synthgen.stages._units import ImageMaker
from synthgen.untrusted import MAX_WORDS

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset

__all__ = ["Attend"]

_MAX_ASPECT = 2.0  # the largest aspect ratio at which the network processes an image


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image in the two sizes that are needed, so that a large photo is not kept in memory."""

    request: Request
    model_input: UInt8[np.ndarray, "h w 3"]
    stored: UInt8[np.ndarray, "H W 3"]
    failed: str = ""  # why there is no image; empty: there is one


@dataclass(frozen=True)
class Attend(ImageMaker):
    """Record the maps of ``generate`` for existing images, from their captions.

    ``images`` is a WebDataset tar, a pattern of tars, a folder of tars, or a folder of images. In a tar, the caption is
    the member ``txt`` or a field of ``json``; in a folder, it is listed in ``metadata.jsonl`` or ``metadata.csv``, or
    in a ``.txt`` next to the image. ``words`` to mask may be listed with it; otherwise the caption is parsed as a line
    of a prompt file. Each image is noised to every one of ``timesteps``, with one network call each. With
    ``inversion_steps`` it is inverted to noise deterministically instead, as DiffusionSeg reportedly does, and
    attention is recorded on the way.

    The network processes the whole image, so maps and masks cover all of it. Unreadable images, and in tars unreadable
    captions, are left out with the reason; a unit may end up empty. ``source`` in the image's json is its original
    name, so that masks can be compared with ground truth.
    """

    name: ClassVar = "attend"
    window: ClassVar[int] = 4  # batches held at once, to group images of one shape

    images: str = field(metadata={"unhashed": True})  # their names and sizes count, not their location
    metadata: str = unhashed("")  # file that lists captions and selects images of the folder; its content counts
    caption: str = ""  # for images without one, such as "a photo of a {label}"; the label is the word to mask
    limit: int = growing(0)  # maximum number of images; 0: all
    fit: Literal["aspect", "stretch"] = "aspect"  # keep proportions (up to 2 : 1), or stretch to the model's size
    max_side: int = 1024  # pixels; larger images, and their masks, are stored at this size; 0: no limit
    timesteps: tuple[int, ...] = (50, 100, 200)
    inversion_steps: int = 0  # above 0: deterministic inversion in this many steps instead of noise
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
        """The source of the images."""
        return (self.images,)

    def complete(self) -> Attend:
        """The same with every option of the backbone spelled out."""
        return replace(self, backbone=BACKBONES.complete(self.backbone, "device"))

    def inputs(self, run: Run) -> dict[str, str]:
        """Names and sizes of the files; for a folder of images also the captions."""
        from synthgen.datasets import CaptionedFolder, source_inputs

        found = {"images": digest(list(source_inputs(self.images).values()))}
        _dataset.cache_clear()  # captions may have changed since an earlier call in this process
        samples = self._samples()
        if isinstance(samples, CaptionedFolder):
            numbers = range(len(samples))
            found["captions"] = digest([[samples.captions(n), samples.words(n), samples.label(n)] for n in numbers])
        return found

    def check_sources(self, run: Run) -> None:
        """Check the images and their captions.

        Raises:
            MissingArtifact, PromptError, ConfigError: they are not there, or :meth:`prepare` would refuse them.
        """
        self.inputs(run)
        self.prepare(run)

    def prepare(self, run: Run) -> Self:
        """Check that every image of a folder has a caption, and in tars at least one; other captions are read per unit.

        Raises:
            PromptError: in a folder a caption is missing or lacks a listed word; in tars no caption can be used.
        """
        from synthgen.datasets import CaptionedFolder

        self.warn_of_fewer(run)
        samples, first = self._samples(), None
        is_folder = isinstance(samples, CaptionedFolder)
        for number in range(self.num_samples(run)):
            try:
                prompt_of(samples, number, self.caption)
                if not is_folder:
                    return self
            except PromptError as error:
                if is_folder:
                    raise
                first = first or error
            except CorruptFile:
                continue  # it will be left out, like an unreadable image
        if first is not None:
            raise PromptError(f"no caption in {self.images} can be used: {first}")
        return self

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Load the backbone once; a unit is then processed a few batches at a time."""
        from synthgen.diffusion import one_thread

        backbone = BACKBONES.build(self.backbone, device=worker.device)

        def window(unit: int, rows: range, unreadable: set[str]) -> list[Generation]:
            pictures = [self.read(run, unit, row, backbone) for row in rows]
            unreadable |= {one.request.key for one in pictures if one.failed}
            return self.record(backbone, pictures)

        def batches(unit: int, unreadable: set[str]) -> Iterator[list[Generation]]:
            total, step = self.size(run, unit), self.window * self.batch_size
            for start in range(0, total, step):
                yield window(unit, range(start, min(start + step, total)), unreadable)

        def work(unit: int) -> Report:
            unreadable: set[str] = set()
            return write_unit(run, unit, batches(unit, unreadable), worker.progress.advance, unreadable)

        with one_thread(worker.device):
            yield work

    def read(self, run: Run, unit: int, row: int, backbone: Backbone) -> _Picture:
        """An image with its request; ``failed`` is set if the image or its caption cannot be read."""
        samples, number, key = self._samples(), unit * self.unit_size + row, sample_key(unit, row)
        request = Request(key, Prompt(""), sample_seed(run.seed, key), samples.key(number))
        try:
            image = samples[number].image
            request = replace(request, prompt=prompt_of(samples, number, self.caption))
        except (CorruptFile, PromptError) as error:
            nothing = np.zeros((1, 1, 3), np.uint8)
            return _Picture(request, nothing, nothing, failed=error.problem)  # no advice: the run keeps to its files
        return _Picture(request, resize(image, self.input_size(image, backbone)), shrink(image, self.max_side))

    def record(self, backbone: Backbone, pictures: Sequence[_Picture]) -> list[Generation]:
        """The images with their maps, in the same order; images of one shape share batches."""
        made = [Generation(one.request, one.stored, _empty_maps(), failed=one.failed) for one in pictures]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, one in enumerate(pictures):
            if not one.failed:
                shapes.setdefault(one.model_input.shape, []).append(place)
        for places in shapes.values():
            for start in range(0, len(places), self.batch_size):
                few = places[start : start + self.batch_size]
                pixels = np.stack([pictures[place].model_input for place in few])
                requests = [pictures[place].request for place in few]
                records = backbone.attend(pixels, requests, self.timesteps, self.inversion_steps)
                for place, record in zip(few, records, strict=True):
                    made[place] = replace(record, image=pictures[place].stored)
        return made

    def input_size(self, image: UInt8[np.ndarray, "H W 3"], backbone: Backbone) -> tuple[int, int]:
        """Height and width, in pixels, at which the network processes an image."""
        if self.fit == "stretch":
            return backbone.size
        return fit_size((image.shape[0], image.shape[1]), backbone.size, backbone.multiple)

    def _samples(self) -> ImageDataset:
        return _dataset(self.images, self.metadata)

    def num_samples(self, run: Run) -> int:
        """Images in all."""
        total = len(self._samples())
        return min(total, self.limit) if self.limit else total


def prompt_of(samples: ImageDataset, number: int, template: str = "") -> Prompt:
    """The prompt of an existing image: its caption, and the listed words or those that a prompt line would mark.

    Raises:
        PromptError: there is neither a caption nor a ``template``, or the caption lacks a listed word.
    """
    from synthgen.captions import LONGEST

    name, label = f"sample {samples.key(number)}", samples.label(number)
    text = next(iter(samples.captions(number)), "")
    if not text:
        return _from_template(name, template, label)
    try:
        if len(text) > LONGEST:
            raise ValueError(f"its caption has {len(text)} characters or more; {LONGEST} are the most")
        if words := samples.words(number):
            spans = find_words(text, words)
            prompt = Prompt(text, tuple(text[first:last] for first, last in spans), tuple(spans))
        else:
            prompt = parse_line(text)
        if len(prompt.words) > MAX_WORDS:
            raise ValueError(f"its caption asks for {len(prompt.words)} masks; {MAX_WORDS} are the most, so mark fewer")
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from None
    return replace(prompt, label=label or prompt.label)


def _from_template(name: str, template: str, label: str | None) -> Prompt:
    """The prompt of an image without a caption; ``name`` is that of the sample."""
    if not template:
        raise PromptError(
            f"{name}: it has no caption",
            "give it a txt (a member of its tar, or a file next to it), or a row in metadata.jsonl, or one to all that "
            "have none with --caption 'a photo of a {label}'",
        )
    if "{label}" not in template:
        return replace(parse_line(template), label=label)
    word = " ".join((label or "").replace("_", " ").split())
    if not word or word.isdecimal():
        known = f"its class is only a number, {word}" if word else "it has neither caption nor class"
        raise PromptError(
            f"{name}: {known}", "name the class by a folder around it, or by label in its json or metadata row"
        )
    (prompt,) = expand([Prompt(word, (word,), ((0, len(word)),), label)], [template.replace("{label}", "{}")])
    return prompt


def fit_size(shape: tuple[int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width with about the proportions of ``shape`` and the area of ``size``, multiples of ``multiple``.

    Proportions beyond 2 : 1 become 2 : 1. An image with the proportions of ``size`` gets exactly ``size``.
    """
    ratio = min(max(shape[1] / shape[0], 1 / _MAX_ASPECT), _MAX_ASPECT)
    if math.isclose(ratio, size[1] / size[0]):
        return size
    height = math.sqrt(size[0] * size[1] / ratio)
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, height * ratio))
    return rows, columns


def shrink(image: UInt8[np.ndarray, "H W 3"], max_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image with no side longer than ``max_side`` pixels (0: no limit)."""
    longest = max(image.shape[:2])
    if not max_side or longest <= max_side:
        return image
    height, width = (max(1, round(side * max_side / longest)) for side in image.shape[:2])
    return resize(image, (height, width))


def _empty_maps() -> Maps:
    return Maps((), np.zeros((0, 1, 1), np.float16), np.zeros((0, 1, 1), np.float16))


@lru_cache(maxsize=2)
def _dataset(source: str, metadata: str) -> ImageDataset:
    """The dataset, opened once for all units."""
    from synthgen.datasets import open_captioned

    return open_captioned(source, metadata)
