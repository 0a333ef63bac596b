"""What the refiners share: maps on a common scale, on another grid, and a level between low and high."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64
from PIL import Image

__all__ = ["above_level", "level_of", "otsu_level", "resize", "scaled", "side_means"]


def scaled(weights: Float[np.ndarray, "words h w"]) -> Float64[np.ndarray, "words h w"]:
    """Each map from 0 at its lowest cell to 1 at its highest; a flat map says nothing and is 0 everywhere.

    Raises:
        ValueError: the maps have no cells, or hold NaN or infinity.
    """
    if len(weights) and 0 in weights.shape[1:]:
        raise ValueError(f"the maps have no cells: their grid is {weights.shape[1]} x {weights.shape[2]}")
    maps = weights.astype(np.float64)
    if not maps.size:
        return maps
    if not np.all(np.isfinite(maps)):
        raise ValueError("the maps hold NaN or infinity")
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    result = np.zeros_like(maps)
    np.divide(maps - low, high - low, out=result, where=high > low)
    return result


def otsu_level(values: Float64[np.ndarray, "h w"]) -> float:
    """The level that leaves the least variance on its two sides (Otsu, 1979), over all values and without bins.

    Halfway between the two values that it divides; the value itself where all are equal.
    """
    ordered = np.sort(values, axis=None)
    below = np.arange(1, ordered.size)
    above = ordered.size - below
    sums = np.cumsum(ordered)
    between = below * above * ((sums[-1] - sums[:-1]) / above - sums[:-1] / below) ** 2
    between[np.diff(ordered) == 0] = 0.0  # equal values stay on one side
    if not np.any(between > 0):
        return float(ordered[0])
    split = int(np.argmax(between))
    return float((ordered[split] + ordered[split + 1]) / 2)


def side_means(values: Float64[np.ndarray, "h w"]) -> tuple[float, float]:
    """The means of the values up to Otsu's level and above it; the same twice where all values are equal."""
    above = values > otsu_level(values)
    low = float(values[~above].mean())
    return low, float(values[above].mean()) if above.any() else low


def resize(layers: Float[np.ndarray, "n h w"], size: tuple[int, int]) -> Float32[np.ndarray, "n H W"]:
    """Each layer on a grid of ``size`` (height, width): linear between cell centres, averaging where it shrinks."""
    layers = layers.astype(np.float32)
    if layers.shape[1:] == size:
        return layers
    if size[0] >= layers.shape[1] and size[1] >= layers.shape[2]:
        return _between(_between(layers, 2, size[1]), 1, size[0])
    images = [Image.fromarray(layer).resize((size[1], size[0]), Image.Resampling.BILINEAR) for layer in layers]
    return np.stack([np.asarray(image) for image in images])


def _between(layers: Float32[np.ndarray, "n h w"], axis: int, size: int) -> Float32[np.ndarray, "n H W"]:
    """Linear between the centres of cells along one axis, and level beyond the outermost: ``size`` values, no fewer."""
    last = layers.shape[axis] - 1
    place = np.clip((np.arange(size) + 0.5) * (last + 1) / size - 0.5, 0, last)
    before = place.astype(np.intp)
    after = np.minimum(before + 1, last)
    part = (place - before).astype(np.float32).reshape(-1, *[1] * (2 - axis))
    low = layers.take(before, axis)
    result: Float32[np.ndarray, "n H W"] = low + part * (layers.take(after, axis) - low)
    return result


def level_of(method: str, level: float) -> float | None:
    """The level of a refiner's settings: None stands for each map's own, by Otsu.

    Raises:
        ValueError: there is no such method, or the level is not in [0, 1).
    """
    if method not in ("otsu", "fixed"):
        raise ValueError(f"method must be 'otsu' or 'fixed', not {method!r}")
    if not 0 <= level < 1:
        raise ValueError(f"level must be in [0, 1), not {level}")
    return level if method == "fixed" else None


def above_level(
    fields: Float64[np.ndarray, "words h w"], level: float | None, size: tuple[int, int]
) -> Bool[np.ndarray, "words H W"]:
    """Where a word's field is the highest and above ``level``, by default each field's Otsu level.

    Fields are linear between cell centres on a grid of ``size`` (height, width); the first word wins a tie.
    """
    above = np.zeros((len(fields), *size), dtype=bool)
    winner, most = np.zeros(size, dtype=np.intp), np.full(size, -np.inf, dtype=np.float32)
    for word in range(len(fields)):  # one at a time: all fields of many words would be gigabytes
        fine = resize(fields[word : word + 1], size)[0]
        np.copyto(winner, word, where=fine > most)
        np.maximum(most, fine, out=most)
    for word, field in enumerate(fields):
        least = np.array([otsu_level(field) if level is None else level])
        above[word] = (winner == word) & (most > least)
    return above
