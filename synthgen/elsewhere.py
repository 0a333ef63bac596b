"""Masks at a place that is not theirs: the control that tells what masks teach from what hiding and pooling teach."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import numpy as np
from jaxtyping import UInt8

from synthgen.datasets import ImageDataset, Sample

__all__ = ["MasksElsewhere", "moved"]


class MasksElsewhere(ImageDataset):
    """The same samples, the masks of each moved by :func:`moved`; the same sample always by as much."""

    def __init__(self, samples: ImageDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return sample if sample.labels is None else replace(sample, labels=moved(sample.labels, sample.key))

    def key(self, index: int) -> str:
        """As the samples say."""
        return self.samples.key(index)

    def label(self, index: int) -> str | None:
        """As the samples say."""
        return self.samples.label(index)

    def has_masks(self) -> bool:
        """As the samples say."""
        return self.samples.has_masks()

    def captions(self, index: int) -> tuple[str, ...]:
        """As the samples say."""
        return self.samples.captions(index)


def moved(labels: UInt8[np.ndarray, "H W"], key: str) -> UInt8[np.ndarray, "H W"]:
    """All masks of an image moved together, by a quarter to three quarters of its height and of its width.

    What leaves at one edge comes in at the other, so that every mask keeps its area and its shape. ``key`` alone
    decides how far they go.
    """
    drawn = blake2b(f"elsewhere:{key}".encode(), digest_size=8).digest()
    shares = (int.from_bytes(half, "big") / 2**32 for half in (drawn[:4], drawn[4:]))
    shift = [int(size * (0.25 + share / 2)) for size, share in zip(labels.shape, shares, strict=True)]
    return np.roll(labels, shift, axis=(0, 1))
