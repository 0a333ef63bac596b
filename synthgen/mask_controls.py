"""Controls with wrong masks, which separate the effect of where masks are from that of hiding, pooling and words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from synthgen.datasets import ImageDataset, Sample

__all__ = ["CONTROLS", "WithChangedMasks", "shift_masks", "shuffle_pixels"]

LabelMap = UInt8[np.ndarray, "H W"]


class WithChangedMasks(ImageDataset):
    """The same samples with other masks: ``change`` gets a sample's label map and key and returns the new label map."""

    def __init__(self, samples: ImageDataset, change: Callable[[LabelMap, str], LabelMap]) -> None:
        self.samples, self.change = samples, change

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if sample.label_map is None:
            return sample
        return replace(sample, label_map=self.change(sample.label_map, sample.key))

    def key(self, index: int) -> str:
        """The name of a sample; reads nothing."""
        return self.samples.key(index)

    def label(self, index: int) -> str | None:
        """The class of a sample; reads no pixels."""
        return self.samples.label(index)

    def has_masks(self) -> bool:
        """Whether the first sample comes with masks."""
        return self.samples.has_masks()

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample; reads no pixels."""
        return self.samples.captions(index)


def shift_masks(labels: LabelMap, key: str) -> LabelMap:
    """Shift all masks of an image together, by a quarter to three quarters of its height and of its width.

    Shifts wrap around at the edges, so every mask keeps its area and its shape. They depend on ``key`` alone.
    """
    digest = blake2b(f"elsewhere:{key}".encode(), digest_size=8).digest()
    shares = (int.from_bytes(half, "big") / 2**32 for half in (digest[:4], digest[4:]))
    shift = [int(size * (0.25 + share / 2)) for size, share in zip(labels.shape, shares, strict=True)]
    return np.roll(labels, shift, axis=(0, 1))


def shuffle_pixels(labels: LabelMap, key: str) -> LabelMap:
    """Shuffle the pixels of an image's label map.

    Every word keeps its area but has no location: features pooled under its mask are nearly the mean over the whole
    image. The permutation depends on ``key`` alone.
    """
    digest = blake2b(f"scattered:{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).permutation(labels.ravel()).reshape(labels.shape)


CONTROLS: Mapping[str, Callable[[LabelMap, str], LabelMap]] = MappingProxyType(
    {"elsewhere": shift_masks, "scattered": shuffle_pixels}
)
