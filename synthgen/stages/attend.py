"""Where each word of a caption looks in an image that exists already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import ConfigError, PromptError
from synthgen.image import resize
from synthgen.prompts import find_words, parse_line, sample_seed
from synthgen.records import Generation, Prompt, Request
from synthgen.run import Run, digest
from synthgen.stages import Stage, Work, Worker, free
from synthgen.stages._generations import write_unit

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset, Sample

__all__ = ["Attend"]


@dataclass(frozen=True)
class Attend(Stage):
    """Make the record of ``generate`` for images that exist, from their captions.

    ``images`` is a WebDataset tar, a pattern of tars, or a folder of them: an image and ``txt``, and in ``json`` the
    ``words`` to look for; without them the caption is read as a line of a prompt file. Each image is noised to every
    one of ``timesteps`` and seen by the network once at each. With ``inversion_steps`` it is carried to noise without
    chance instead, as DiffusionSeg reportedly does, and recorded on the way. Images are resized to the model's size.
    Keys stay as they are, so that masks can be held against true ones.
    """

    name: ClassVar = "attend"
    reads: ClassVar = ()
    writes: ClassVar = ("images", "maps")
    accelerated: ClassVar = True

    images: str = field(metadata={"free": True})  # their names and sizes count, not where they lie
    timesteps: tuple[int, ...] = (50, 100, 200)
    inversion_steps: int = 0  # more than 0: no noise, but a deterministic inversion in so many steps
    unit_size: int = 64
    batch_size: int = free(16)
    backbone: Choice = Choice("tiny")

    def __post_init__(self) -> None:
        if not self.timesteps or not all(0 <= timestep < 1000 for timestep in self.timesteps):
            raise ValueError(f"timesteps must be one or more of 0 to 999, not {self.timesteps}")
        if self.inversion_steps < 0:
            raise ValueError(f"inversion_steps must be 0 (noise) or more, not {self.inversion_steps}")
        if self.unit_size < 1 or self.batch_size < 1:
            raise ValueError(f"unit_size and batch_size must be 1 or more, not {self.unit_size} and {self.batch_size}")

    def complete(self) -> Attend:
        """With every option of the backbone."""
        return replace(self, backbone=BACKBONES.complete(self.backbone, "device"))

    def inputs(self, run: Run) -> dict[str, str]:
        """Names and sizes of the tars."""
        from synthgen.datasets import source_inputs

        return {"images": digest(list(source_inputs(self.images).values()))}

    def plan(self, run: Run) -> list[int]:
        """Units of ``unit_size`` images; the last may be smaller."""
        return list(range(-(-len(_dataset(self.images)) // self.unit_size)))

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        return min(self.unit_size, len(_dataset(self.images)) - unit * self.unit_size)

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Load the backbone; then a unit is its images in batches."""
        from synthgen.diffusion import one_thread

        backbone = BACKBONES.build(self.backbone, device=worker.device)
        samples = _dataset(self.images)

        def batches(unit: int) -> Iterator[list[Generation]]:
            numbers = range(unit * self.unit_size, unit * self.unit_size + self.size(run, unit))
            for start in range(0, len(numbers), self.batch_size):
                batch = [samples[number] for number in numbers[start : start + self.batch_size]]
                requests = [Request(one.key, caption(one), sample_seed(run.seed, one.key)) for one in batch]
                pixels = np.stack([resize(one.image, backbone.size) for one in batch])
                yield backbone.attend(pixels, requests, self.timesteps, self.inversion_steps)

        with one_thread(worker.device):
            yield lambda unit: write_unit(run, unit, batches(unit), worker.tick)


def caption(sample: Sample) -> Prompt:
    """The prompt of an image that exists: its text, and its listed words or those that a prompt line would mark.

    Raises:
        PromptError: it has no text, or a listed word does not stand in it.
    """
    if not sample.text:
        raise PromptError(f"sample {sample.key} has no caption; it needs a member txt")
    try:
        if not sample.words:
            return parse_line(sample.text)
        spans = find_words(sample.text, sample.words)
    except ValueError as error:
        raise PromptError(f"sample {sample.key}: {error}") from None
    words = tuple(sample.text[first:last] for first, last in spans)
    return Prompt(sample.text, words, tuple(spans), sample.label)


@lru_cache(maxsize=2)
def _dataset(source: str) -> ImageDataset:
    """Opened once; every unit asks for its size."""
    from synthgen.datasets import FolderDataset, open_dataset

    samples = open_dataset(source, masks=False)
    if isinstance(samples, FolderDataset):
        raise ConfigError(f"the images of {source} have no captions; give WebDataset tars with a member txt")
    keys = [samples.key(number) for number in range(len(samples))]
    if len(set(keys)) < len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ConfigError(
            f"the key {twice} stands twice in {source}; keys must be unique, for masks are joined by them"
        )
    return samples
