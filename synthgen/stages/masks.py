"""Turn where each word looked into masks the size of the image, from stored maps alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from synthgen import codecs
from synthgen.attention.words import words_cut_off
from synthgen.config import Choice
from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.mask_quality import attention_figures, disagreement, sharpness
from synthgen.records import Generation, Maps, Report, WordMasks
from synthgen.refiners import REFINERS, Refiner
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker
from synthgen.tallies import CUT_OFF, Tallies

__all__ = ["Masks"]

COMPARED = 256  # pixels of the long side, at most, on which refined masks are compared with plain ones


@dataclass(frozen=True)
class Masks(Stage):
    """One mask for every marked word, with figures of how far it can be trusted (see :mod:`synthgen.mask_quality`).

    Words compete: a pixel belongs to one word at most. A mask is dropped where the word's map cannot tell where the
    word is, where it covers less than ``min_area`` or more than ``max_area`` of the image, or where its confidence is
    below ``min_confidence``: it is stored empty, with the reason. The sample stays.
    """

    name: ClassVar = "masks"
    reads: ClassVar = ("images", "maps")
    writes: ClassVar = ("masks",)

    refine: Choice = Choice("threshold")
    min_area: float = 0.005  # share of the image
    max_area: float = 0.8  # what covers more is hardly an object; where attention is turned round, this catches it
    min_contrast: float = 0.05  # of a map: its highest cell less its lowest, as a share of the highest
    max_peak: float = 0.5  # of a map: the share of its attention, above that of the lowest cell, that one cell may hold
    min_confidence: float = 0.0  # 0 drops none; what is worth dropping depends on the model

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < self.max_area <= 1:
            raise ValueError(
                f"min_area and max_area must be shares with 0 <= min < max <= 1, not {self.min_area}, {self.max_area}"
            )
        if not 0 <= self.min_contrast < 1:
            raise ValueError(f"min_contrast must be at least 0 and below 1, not {self.min_contrast}")
        if not 0 < self.max_peak <= 1:
            raise ValueError(f"max_peak must be above 0 and at most 1, not {self.max_peak}")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence must be at least 0 and below 1, not {self.min_confidence}")

    def complete(self) -> Masks:
        """With every option of the refiner."""
        return replace(self, refine=REFINERS.complete(self.refine))

    def plan(self, run: Run) -> list[int]:
        """The units that have both images and maps."""
        units = sorted(set(run.units("images")) & set(run.units("maps")))
        if not units:
            raise MissingArtifact(f"{run.path} has no finished unit; run: {run.remedy('images')}")
        return units

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        mark = run.mark("images", unit)
        return int(mark["count"]) if mark else 0

    def sizes(self, run: Run, units: Sequence[int]) -> dict[int, int]:
        """Images of each unit, from marks that are read together."""
        counts = {unit: int(mark["count"]) for unit, mark in run.iter_marks("images")}
        return {unit: counts.get(unit, 0) for unit in units}

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Build the refiner; then a unit is its samples one by one."""
        refiner, plain = REFINERS.build(self.refine), REFINERS.build(Choice("threshold"))

        def work(unit: int) -> Report:
            tallies = Tallies()
            with run.write("masks", unit) as masks:
                for generation in read_generations(run, unit):
                    found = self.mask(refiner, plain, generation)
                    masks.add(generation.request.key, codecs.encode_masks(found))
                    masks.note("masks", sum(not reason for reason in found.dropped))
                    masks.note("dropped", sum(bool(reason) for reason in found.dropped))
                    prompt, lost = generation.request.prompt, words_cut_off(generation.warnings)
                    masks.note("words cut off", len(lost))
                    reasons = [*found.dropped, *[CUT_OFF] * len(lost)]
                    tallies.count(prompt.label or "", [*found.words, *lost], reasons)
                    worker.tick(1)
                masks.about["tallies"] = tallies.plain()
                count = masks.count
            return Report(unit, count, notes=masks.notes)

        yield work

    def mask(self, refiner: Refiner, plain: Refiner, generation: Generation) -> WordMasks:
        """The masks of one sample, measured; ``plain`` makes those that the refined ones are compared with.

        Raises:
            ConfigError: they would be too many, or too large, for anyone to read again.
        """
        codecs.check_masks(len(generation.maps.words), generation.image.shape[:2], generation.request.key)
        image, maps, faults = generation.image, generation.maps, self.faults(generation.maps)
        step = -(-max(image.shape[:2]) // COMPARED)
        few = image[::step, ::step]
        values = np.zeros((len(maps.words), *image.shape[:2]), bool)
        others = np.zeros((len(maps.words), *few.shape[:2]), bool)
        told = [index for index, fault in enumerate(faults) if not fault]
        if told:  # the other maps say nothing, and refiners may refuse them
            some = Maps(tuple(maps.words[index] for index in told), maps.weights[told], maps.affinity)
            values[told], others[told] = refiner.refine(image, some), plain.refine(few, some)
        kept = self.keep(values, maps, faults)
        apart = disagreement(kept.values[:, ::step, ::step], others)
        return replace(kept, sharpness=sharpness(image, kept.values), disagreement=apart)

    def keep(self, values: Bool[np.ndarray, "words H W"], maps: Maps, faults: Sequence[str] | None = None) -> WordMasks:
        """Empty the masks that are not worth keeping, each with its reason, and measure the attention of the others.

        ``faults`` is what :meth:`faults` says of the maps, for those who know it already.
        """
        reasons = list(self.faults(maps) if faults is None else faults)
        kept = values.copy()
        kept[[bool(reason) for reason in reasons]] = False
        scores, confidence = attention_figures(kept, maps)
        for index, mask in enumerate(kept):
            area = np.count_nonzero(mask) / max(mask.size, 1)
            reasons[index] = reasons[index] or self.fault_of_mask(area, float(confidence[index]))
        dropped = [bool(reason) for reason in reasons]
        kept[dropped], scores[dropped], confidence[dropped] = False, 0, 0
        return WordMasks(maps.words, kept, scores, tuple(reasons), confidence)

    def faults(self, maps: Maps) -> list[str]:
        """For each word why its map cannot tell where the word is, or ""."""
        if not np.isfinite(maps.affinity).all():
            return ["broken map: the self-attention holds NaN or infinity"] * len(maps.words)
        return [self.fault_of_map(weights.astype(np.float64)) for weights in maps.weights]

    def fault_of_map(self, weights: Float64[np.ndarray, "h w"]) -> str:
        """Why a map cannot tell where its word is, or ""."""
        if not weights.size:
            return "broken map: it has no cells"
        if not np.isfinite(weights).all():
            return "broken map: it holds NaN or infinity"
        high, low = float(weights.max()), float(weights.min())
        if high <= 0:
            return "no attention: the map is 0 everywhere"
        if high - low <= self.min_contrast * high:
            return f"flat map: it varies by {1 - low / high:.2%} of its peak, no more than {self.min_contrast:.2%}"
        peak = (high - low) / float((weights - low).sum())
        if peak > self.max_peak:
            return f"single cell: one holds {peak:.2%} of the attention, more than {self.max_peak:.2%}"
        return ""

    def fault_of_mask(self, area: float, confidence: float) -> str:
        """Why a mask that covers so much is not worth keeping, or ""."""
        if not area:
            return "empty: no pixel is the word's"
        if area < self.min_area:
            return f"too small: covers {area:.2%} of the image, less than {self.min_area:.2%}"
        if area > self.max_area:
            return f"too large: covers {area:.2%} of the image, more than {self.max_area:.2%}"
        if confidence < self.min_confidence:
            return f"unsure: has a confidence of {confidence:.2f}, less than {self.min_confidence:.2f}"
        return ""


def read_generations(run: Run, unit: int) -> Iterator[Generation]:
    """The samples of a unit, images and maps joined by key.

    Raises:
        CorruptFile: a tar is unreadable, or the two do not hold the same keys.
    """
    for (key, image), (other, maps) in zip(run.read("images", unit), run.read("maps", unit), strict=True):
        if key != other:
            raise CorruptFile(
                f"{run.tar('images', unit)} and {run.tar('maps', unit)} hold different samples ({key} and {other}); "
                f"delete both and run: {run.remedy('images')}"
            )
        try:
            yield codecs.decode_generation(key, image, maps)
        except CorruptFile as error:
            raise CorruptFile(f"{run.tar('images', unit)} or {run.tar('maps', unit)}: {error}") from None
