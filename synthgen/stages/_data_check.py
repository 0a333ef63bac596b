"""A look at the training data before training starts: some samples from all over it, and the sizes of their images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset, Sample

__all__ = ["probe", "typical_side", "warn_of_sizes"]

logger = logging.getLogger(__name__)

_MAX_SAMPLES = 32


def probe(dataset: ImageDataset) -> tuple[list[Sample], list[int]]:
    """Evenly spaced samples, at most 32, and the shorter side of each one's image in pixels.

    Of images and masks only the top left pixel is kept, so that one decoded image at a time is in memory.

    Raises:
        CorruptFile: a sample cannot be read.
    """
    samples, sides = [], []
    for index in range(0, len(dataset), max(1, -(-len(dataset) // _MAX_SAMPLES))):
        sample = dataset[index]
        sides.append(min(sample.image.shape[:2]))
        labels = None if sample.label_map is None else sample.label_map[:1, :1].copy()
        samples.append(replace(sample, image=sample.image[:1, :1].copy(), label_map=labels))
    return samples, sides


def typical_side(sides: Sequence[int]) -> int:
    """The image size that a training is set up for: the (lower) median of the shorter sides."""
    return int(median_low(sides))


def warn_of_sizes(sides: Sequence[int], image_size: int) -> None:
    """Log a warning if some images are at least twice as large as others, so that no ``image_size`` suits all.

    Images above the default limit of the encoder's input are shrunk in any case and count as that large.
    """
    from synthgen.models.vit import MAX_PIXELS

    smallest, largest = min(sides), max(sides)
    if 2 * min(smallest, MAX_PIXELS) <= min(largest, MAX_PIXELS):
        logger.warning(
            "the images have %d to %d pixels along their shorter side (%d samples), and the encoder sees all of them "
            "at %d: small ones are enlarged, large ones lose detail; --set encoder.image_size=N sets another size",
            smallest,
            largest,
            len(sides),
            image_size,
        )
