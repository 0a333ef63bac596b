"""Shared by the refiners: scaling and resizing of maps, and Otsu's threshold."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64
from PIL import Image

__all__ = ["above_level", "level_of", "otsu_level", "resize", "scaled", "side_means"]


def scaled(weights: Float[np.ndarray, "words h w"]) -> Float64[np.ndarray, "words h w"]:
    """Each map scaled to 0 at its lowest cell and 1 at its highest; a flat map is 0 everywhere.

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
    """The threshold with the least variance within its two classes (Otsu, 1979), over all values, without bins.

    It lies halfway between the two values that it separates; if all values are equal it is that value.
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
    """The means of the values up to Otsu's threshold and above it; the same twice if all values are equal."""
    above = values > otsu_level(values)
    low = float(values[~above].mean())
    return low, float(values[above].mean()) if above.any() else low


def resize(layers: Float[np.ndarray, "n h w"], size: tuple[int, int]) -> Float32[np.ndarray, "n H W"]:
    """Each layer on a grid of ``size`` (height, width): linear between cell centres, averaging where it shrinks."""
    layers = layers.astype(np.float32)
    if layers.shape[1:] == size:
        return layers
    if size[0] >= layers.shape[1] and size[1] >= layers.shape[2]:
        return _interpolated(_interpolated(layers, 2, size[1]), 1, size[0])
    images = [Image.fromarray(layer).resize((size[1], size[0]), Image.Resampling.BILINEAR) for layer in layers]
    return np.stack([np.asarray(image) for image in images])


def _interpolated(layers: Float32[np.ndarray, "n h w"], axis: int, size: int) -> Float32[np.ndarray, "n H W"]:
    """Linear between cell centres along one axis and constant beyond the outermost; ``size`` must not be smaller."""
    last = layers.shape[axis] - 1
    position = np.clip((np.arange(size) + 0.5) * (last + 1) / size - 0.5, 0, last)
    before = position.astype(np.intp)
    after = np.minimum(before + 1, last)
    fraction = (position - before).astype(np.float32).reshape(-1, *[1] * (2 - axis))
    low = layers.take(before, axis)
    result: Float32[np.ndarray, "n H W"] = low + fraction * (layers.take(after, axis) - low)
    return result


def level_of(method: str, level: float) -> float | None:
    """The fixed level of a refiner's settings; None stands for Otsu's threshold of each map.

    Raises:
        ValueError: the method is unknown, or the level is not in [0, 1).
    """
    if method not in ("otsu", "fixed"):
        raise ValueError(f"method must be 'otsu' or 'fixed', not {method!r}")
    if not 0 <= level < 1:
        raise ValueError(f"level must be in [0, 1), not {level}")
    return level if method == "fixed" else None


def above_level(
    fields: Float64[np.ndarray, "words h w"], level: float | None, size: tuple[int, int], step: int = 1
) -> Bool[np.ndarray, "words rows columns"]:
    """Where a word's field is the highest and above ``level``, by default Otsu's threshold of each field.

    Fields are linear between cell centres on a grid of ``size`` (height, width), of which every ``step``-th row and
    column is returned, from ``step // 2`` on; the first word wins a tie.
    """
    some = slice(step // 2, None, step)
    winner, most = (np.full(size, start)[some, some] for start in (np.intp(0), np.float32(-np.inf)))
    above = np.zeros((len(fields), *winner.shape), dtype=bool)
    for word in range(len(fields)):  # one at a time: all fields of many words would be gigabytes
        fine = resize(fields[word : word + 1], size)[0, some, some]
        np.copyto(winner, word, where=fine > most)
        np.maximum(most, fine, out=most)
    for word, field in enumerate(fields):
        least = np.array([otsu_level(field) if level is None else level])
        above[word] = (winner == word) & (most > least)
    return above
