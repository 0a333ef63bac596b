"""Masks that tell no true place: the controls that part what masks teach from what hiding, pooling and words teach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from synthgen.datasets import ImageDataset, Sample

__all__ = ["CONTROLS", "WithChangedMasks", "moved", "scattered"]

LabelMap = UInt8[np.ndarray, "H W"]


class WithChangedMasks(ImageDataset):
    """The same samples with other masks: ``change`` makes them of a sample's label map and its key."""

    def __init__(self, samples: ImageDataset, change: Callable[[LabelMap, str], LabelMap]) -> None:
        self.samples, self.change = samples, change

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return (
            sample if sample.label_map is None else replace(sample, label_map=self.change(sample.label_map, sample.key))
        )

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


def moved(labels: LabelMap, key: str) -> LabelMap:
    """All masks of an image moved together, by a quarter to three quarters of its height and of its width.

    What leaves at one edge comes in at the other, so that every mask keeps its area and its shape. ``key`` alone
    decides how far they go.
    """
    drawn = blake2b(f"elsewhere:{key}".encode(), digest_size=8).digest()
    shares = (int.from_bytes(half, "big") / 2**32 for half in (drawn[:4], drawn[4:]))
    shift = [int(size * (0.25 + share / 2)) for size, share in zip(labels.shape, shares, strict=True)]
    return np.roll(labels, shift, axis=(0, 1))


def scattered(labels: LabelMap, key: str) -> LabelMap:
    """The pixels of all masks of an image thrown over it, one by one.

    Every word keeps its area and has no place: what is pooled under its mask is nearly the mean of the whole image.
    ``key`` alone decides where each pixel goes.
    """
    drawn = blake2b(f"scattered:{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(drawn, "big")).permutation(labels.ravel()).reshape(labels.shape)


CONTROLS: Mapping[str, Callable[[LabelMap, str], LabelMap]] = MappingProxyType(
    {"elsewhere": moved, "scattered": scattered}
)
