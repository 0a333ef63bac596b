"""What the refiners share: maps on a common scale, on another grid, and a level between low and high."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64
from PIL import Image

__all__ = ["otsu_level", "resize", "scaled"]


def scaled(weights: Float[np.ndarray, "words h w"]) -> Float64[np.ndarray, "words h w"]:
    """Each map from 0 at its lowest cell to 1 at its highest; a flat map says nothing and is 0 everywhere.

    Raises:
        ValueError: a map holds NaN or infinity.
    """
    maps = weights.astype(np.float64)
    if not np.all(np.isfinite(maps)):
        raise ValueError("the maps hold NaN or infinity")
    low = maps.min(axis=(1, 2), keepdims=True, initial=np.inf) if maps.size else np.zeros((len(maps), 1, 1))
    high = maps.max(axis=(1, 2), keepdims=True, initial=-np.inf) if maps.size else np.zeros((len(maps), 1, 1))
    span = high - low
    return np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0)


def otsu_level(values: Float64[np.ndarray, "..."]) -> float:
    """The level that leaves the least variance on its two sides (Otsu, 1979), over all values and without bins.

    Halfway between the two values that it divides; the value itself where all are equal.
    """
    ordered = np.sort(values, axis=None)
    below = np.arange(1, ordered.size)
    sums = np.cumsum(ordered)
    low = sums[:-1] / below
    high = (sums[-1] - sums[:-1]) / (ordered.size - below)
    between = np.where(np.diff(ordered) > 0, below * (ordered.size - below) * (high - low) ** 2, 0.0)
    if not np.any(between > 0):
        return float(ordered[0])
    split = int(np.argmax(between))
    return float((ordered[split] + ordered[split + 1]) / 2)


def resize(layers: Float[np.ndarray, "n h w"], size: tuple[int, int]) -> Float32[np.ndarray, "n H W"]:
    """Each layer on a grid of ``size`` (height, width): linear between cell centres, averaging where it shrinks."""
    height, width = size
    if layers.shape[1:] == (height, width):
        return layers.astype(np.float32)
    out = np.empty((len(layers), height, width), dtype=np.float32)
    for layer, target in zip(layers, out, strict=True):
        image = Image.fromarray(layer.astype(np.float32), mode=None)
        target[...] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return out
