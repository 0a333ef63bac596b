"""Turn where each word looked into masks the size of the image, from stored maps alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

from synthgen import codecs
from synthgen.config import Choice
from synthgen.errors import CorruptShard, MissingArtifact
from synthgen.records import Generation, Maps, Report, WordMasks
from synthgen.refiners import REFINERS
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker

__all__ = ["Masks"]


@dataclass(frozen=True)
class Masks(Stage):
    """One mask for every marked word. Words compete: a pixel belongs to one word at most.

    A mask that covers less than ``min_area`` or more than ``max_area`` of the image is dropped: it is stored empty,
    with the reason. The sample stays.
    """

    name: ClassVar = "masks"
    reads: ClassVar = ("images", "maps")
    writes: ClassVar = ("masks",)

    refine: Choice = Choice("threshold")
    min_area: float = 0.005  # share of the image
    max_area: float = 0.8  # what covers more is hardly an object; where attention is turned round, this catches it

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < self.max_area <= 1:
            raise ValueError(
                f"min_area and max_area must be shares with 0 <= min < max <= 1, not {self.min_area}, {self.max_area}"
            )

    def complete(self) -> Masks:
        """With every option of the refiner."""
        return replace(self, refine=REFINERS.complete(self.refine))

    def plan(self, run: Run) -> list[int]:
        """The units that have both images and maps."""
        units = sorted(set(run.units("images")) & set(run.units("maps")))
        if not units:
            raise MissingArtifact(f"{run.path} has no finished unit; run: synthgen generate --run {run.path}")
        return units

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        mark = run.mark("images", unit)
        return int(mark["count"]) if mark else 0

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Build the refiner; then a unit is its samples one by one."""
        refiner = REFINERS.build(self.refine)

        def work(unit: int) -> Report:
            with run.write("masks", unit) as masks:
                for generation in read_generations(run, unit):
                    found = self.keep(refiner.refine(generation.image, generation.maps), generation.maps)
                    masks.add(generation.request.key, codecs.encode_masks(found))
                    masks.note("masks", sum(not reason for reason in found.dropped))
                    masks.note("dropped masks", sum(bool(reason) for reason in found.dropped))
                    worker.tick(1)
                count = masks.count
            return Report(unit, count, notes=masks.notes)

        yield work

    def keep(self, values: Bool[np.ndarray, "words H W"], maps: Maps) -> WordMasks:
        """Empty the masks that are too small or too large, each with its reason, and score the others."""
        dropped = []
        values = values.copy()
        for mask in values:
            area = float(mask.mean())
            reason = ""
            if area < self.min_area:
                reason = f"covers {area:.2%} of the image, less than {self.min_area:.2%}" if area else "is empty"
            elif area > self.max_area:
                reason = f"covers {area:.2%} of the image, more than {self.max_area:.2%}"
            if reason:
                mask[:] = False
            dropped.append(reason)
        return WordMasks(maps.words, values, scores(values, maps), tuple(dropped))


def scores(values: Bool[np.ndarray, "words H W"], maps: Maps) -> Float32[np.ndarray, " words"]:
    """Mean attention inside each mask minus outside, in [-1, 1]; 0 for an empty mask. Each map is scaled to [0, 1]."""
    found = np.zeros(len(values), np.float32)
    for index, (mask, weights) in enumerate(zip(values, maps.weights.astype(np.float32), strict=True)):
        if not mask.any() or weights.max() == weights.min():
            continue
        scaled = (weights - weights.min()) / (weights.max() - weights.min())
        height, width = weights.shape
        cover = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
        outside = (scaled * (1 - cover)).sum() / max(float((1 - cover).sum()), 1e-6)
        found[index] = (scaled * cover).sum() / cover.sum() - outside
    return found


def read_generations(run: Run, unit: int) -> Iterator[Generation]:
    """The samples of a unit, images and maps joined by key.

    Raises:
        CorruptShard: a tar is unreadable, or the two do not hold the same keys.
    """
    for (key, image), (other, maps) in zip(run.read("images", unit), run.read("maps", unit), strict=True):
        if key != other:
            raise CorruptShard(
                f"{run.tar('images', unit)} and {run.tar('maps', unit)} hold different samples ({key} and {other}); "
                "delete both and run synthgen generate again"
            )
        try:
            yield codecs.decode_generation(key, image, maps)
        except CorruptShard as error:
            raise CorruptShard(f"{run.tar('images', unit)} or {run.tar('maps', unit)}: {error}") from None
