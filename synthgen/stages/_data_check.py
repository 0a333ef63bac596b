"""What a training sees of its data before it begins: some samples from all over it, and how large they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset, Sample
    from synthgen.models.vit import EncoderConfig

__all__ = ["looked_at_first", "side_of", "tell_sizes"]

logger = logging.getLogger(__name__)

_LOOKED_AT = 32  # samples, evenly spread, that a method may see before it says that the data will do


def looked_at_first(samples: ImageDataset) -> list[Sample]:
    """Some samples, evenly spread; all of a few.

    Raises:
        CorruptFile: one cannot be read.
    """
    return [samples[number] for number in range(0, len(samples), max(1, len(samples) // _LOOKED_AT))]


def side_of(looked: Sequence[Sample]) -> int:
    """How large these images are: the median of their shorter sides, in pixels, of two in the middle the smaller."""
    return int(median_low(min(sample.image.shape[:2]) for sample in looked))


def tell_sizes(looked: Sequence[Sample], config: EncoderConfig) -> None:
    """Say in the log where images are so unlike that no one size suits them all: one is twice the other or more.

    What an encoder shrinks in any case counts as no larger than what it sees at most by default.
    """
    from synthgen.models.vit import MAX_PIXELS

    sides = sorted(min(sample.image.shape[:2]) for sample in looked)
    if 2 * min(sides[0], MAX_PIXELS) <= min(sides[-1], MAX_PIXELS):
        logger.warning(
            "the images have %d to %d pixels along their shorter side, by %d looked at, and the encoder sees all of "
            "them at %d: small ones are enlarged, large ones lose detail; --set encoder.image_size=N sets another size",
            sides[0],
            sides[-1],
            len(sides),
            config.image_size,
        )
