"""Turn stored attention maps into full-resolution masks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from synthgen import codecs
from synthgen.config import Choice, check_range
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact
from synthgen.mask_quality import attention_figures, disagreement, sharpness
from synthgen.records import Generation, Maps, Report, WordMasks
from synthgen.refiners import REFINERS, Refiner
from synthgen.refiners.threshold import Threshold
from synthgen.run import Run
from synthgen.stages import Work, Worker
from synthgen.stages._units import ImageStage, units_without_maps
from synthgen.tallies import Tallies

__all__ = ["Masks"]

logger = logging.getLogger(__name__)

_MAX_COMPARED_SIDE = 256  # maximum long side, in pixels, at which refined masks are compared with thresholded ones


@dataclass(frozen=True)
class Masks(ImageStage):
    """One mask for every marked word, with its quality figures (see :mod:`synthgen.mask_quality`).

    Words compete: a pixel belongs to at most one word. A mask is dropped if the word's map does not localise the word,
    if the mask covers less than ``min_area`` or more than ``max_area`` of the image, or if its confidence is below
    ``min_confidence``. A dropped mask is stored empty with the reason; the sample stays.
    """

    name: ClassVar = "masks"
    reads: ClassVar = ("images", "maps")
    writes: ClassVar = ("masks",)

    refine: Choice = Choice("threshold")
    min_area: float = 0.005  # drop masks smaller than this fraction of the image
    max_area: float = 0.8  # drop masks larger than this fraction; also catches inverted attention
    min_contrast: float = 0.05  # least contrast of a map: (highest cell - lowest) / highest
    max_peak: float = 0.5  # largest share of a map that one cell may hold, after subtracting the lowest cell
    min_confidence: float = 0.0  # drop masks of lower confidence; 0: none; the right value depends on the model

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < self.max_area <= 1:
            raise ValueError(
                f"min_area and max_area must be shares with 0 <= min < max <= 1, not {self.min_area}, {self.max_area}"
            )
        check_range(ge=0, lt=1, min_contrast=self.min_contrast, min_confidence=self.min_confidence)
        check_range(gt=0, le=1, max_peak=self.max_peak)

    def complete(self) -> Masks:
        """The same with every option of the refiner filled in."""
        return replace(self, refine=REFINERS.complete(self.refine))

    def prepare(self, run: Run) -> Self:
        """Warn of units that lack maps: they get no masks."""
        without = units_without_maps(run)
        if without:
            logger.warning(
                "%d of %d units of %s have images without maps, and get no masks (first: %06d); "
                "run: %s and then this command again",
                len(without), len(run.units("images")), run.path, without[0], run.remedy("images"),
            )  # fmt: skip
        return self

    def plan(self, run: Run) -> list[int]:
        """The units that have images, and maps of all of them."""
        units = sorted(set(run.units("images")) - set(units_without_maps(run)))
        if not units:
            raise MissingArtifact(f"{run.path} has no finished unit; run: {run.remedy('images')}")
        return units

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Build the refiner once; a unit is then processed sample by sample."""
        refiner, plain = REFINERS.build(self.refine), Threshold()

        def work(unit: int) -> Report:
            tallies = Tallies()
            with run.write("masks", unit) as masks:
                for generation in read_generations(run, unit):
                    found = self.mask(refiner, plain, generation)
                    masks.add(generation.request.key, codecs.encode_masks(found))
                    masks.note("masks", sum(not reason for reason in found.dropped))
                    masks.note("dropped", sum(bool(reason) for reason in found.dropped))
                    masks.note("words cut off", len(generation.words_cut_off))
                    label = generation.request.prompt.label or ""
                    tallies.count(label, found.words, found.dropped, generation.words_cut_off)
                    worker.progress.advance(1)
                    del found  # before the next image's masks are made
                masks.about["tallies"] = tallies.plain()
                count = masks.count
            return Report(unit, count, notes=masks.notes)

        yield work

    def mask(self, refiner: Refiner, plain: Threshold, generation: Generation) -> WordMasks:
        """The masks of one sample with their figures; ``plain`` makes the masks that they are compared with.

        Raises:
            ConfigError: the masks would be too many, or too large, to be read back.
        """
        codecs.check_masks(len(generation.maps.words), generation.image.shape[:2], generation.request.key)
        image, maps, faults = generation.image, generation.maps, self.faults(generation.maps)
        size, step = image.shape[:2], -(-max(image.shape[:2]) // _MAX_COMPARED_SIDE)
        some_pixels = slice(step // 2, None, step)
        values = np.zeros((len(maps.words), *size), bool)
        others = np.zeros_like(values[:, some_pixels, some_pixels])
        usable = [index for index, fault in enumerate(faults) if not fault]
        if usable:  # refiners may refuse the other maps
            some = Maps(tuple(maps.words[index] for index in usable), maps.weights[usable], maps.affinity)
            values[usable], others[usable] = refine(refiner, image, some), plain.sample(size, some, step)
        kept = self.keep(values, maps, faults)
        apart = disagreement(kept.values[:, some_pixels, some_pixels], others)
        return replace(kept, sharpness=sharpness(image, kept.values), disagreement=apart)

    def keep(self, values: Bool[np.ndarray, "words H W"], maps: Maps, faults: Sequence[str] | None = None) -> WordMasks:
        """Drop unusable masks, each with its reason, and measure the attention of the others.

        ``faults`` is the result of :meth:`faults` if it is known already.
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
        """For each word why its map does not localise it, or ""."""
        if not np.isfinite(maps.affinity).all():
            return ["broken map: the self-attention holds NaN or infinity"] * len(maps.words)
        return [self.fault_of_map(weights.astype(np.float64)) for weights in maps.weights]

    def fault_of_map(self, weights: Float64[np.ndarray, "h w"]) -> str:
        """Why a map does not localise its word, or ""."""
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
        """Why a mask of this area and confidence is dropped, or ""."""
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
        MissingArtifact: the maps are fewer, as a worker was killed between the two or is about to write them.
        CorruptFile: a tar is unreadable, or the two tars hold different keys.
    """
    both = run.read("images", unit), run.read("maps", unit)
    for (key, image), (other, maps) in zip_longest(*both, fillvalue=("", {})):
        if not other:
            raise MissingArtifact(f"{run.tar('maps', unit)} has no maps of {key}; run: {run.remedy('maps')}")
        if key != other:
            raise CorruptFile(
                f"{run.tar('images', unit)} and {run.tar('maps', unit)} hold different samples ({key} and {other}); "
                f"delete both and run: {run.remedy('images')}"
            )
        try:
            yield codecs.decode_generation(key, image, maps)
        except CorruptFile as error:
            raise CorruptFile(f"{run.tar('images', unit)} or {run.tar('maps', unit)}: {error}") from None


def refine(refiner: Refiner, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
    """What a refiner makes of one image, checked, as it may be another package's.

    Raises:
        ConfigError: it is not one boolean mask per word of the image's size, or words share a pixel.
    """
    found, wanted = refiner.refine(image, maps), (len(maps.words), *image.shape[:2])
    if not isinstance(found, np.ndarray) or found.shape != wanted or found.dtype != bool:
        given = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ConfigError(f"the refiner {type(refiner).__name__} returned {given}; its contract is bool {wanted}")
    if len(found) > 1 and (found.sum(axis=0, dtype=np.uint8) > 1).any():
        raise ConfigError(f"the refiner {type(refiner).__name__} gave a pixel to two words; it may go to one")
    return found
