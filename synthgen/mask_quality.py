"""Mask quality estimated from the attention and the image, without ground truth.

Every measure is one number per word, to six decimals, and 0 if the mask is empty.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int16, Int64, UInt8
from PIL import Image
from scipy.special import expit

from synthgen.mask_shape import box
from synthgen.records import Maps
from synthgen.refiners._words import otsu_level, scaled

__all__ = ["attention_figures", "disagreement", "sharpness"]

SOFTNESS = 0.1  # difference of scaled attention from Otsu's level that changes the log-odds by one nat
_DECIMALS = 6
GAIN = 6.0  # factor between the odds of overlap and those that attention alone gives: measured, see docs/masks.md


def attention_figures(
    values: Bool[np.ndarray, "words H W"], maps: Maps
) -> tuple[Float32[np.ndarray, " words"], Float32[np.ndarray, " words"]]:
    """Each mask's score in [-1, 1] and confidence in [0, 1], from the attention of its own word.

    On the maps' grid, with A the attention scaled to [0, 1] over the image and c the masked share of a cell:

        score      = sum c A / sum c  -  sum (1 - c) A / sum (1 - c)
        support    = sum c p / (sum c + sum (1 - c) p),    p = 1 / (1 + exp(-(A - Otsu's level) / SOFTNESS))
        confidence = GAIN support / (1 + (GAIN - 1) support)

    The support is the expected intersection over the expected union of mask and object if p is the probability that a
    cell belongs to the word. A refined mask overlaps better than that; GAIN turns the support into an expected IoU.

    Raises:
        ValueError: the map of a word that has a mask holds NaN or infinity.
    """
    score, confidence = np.zeros(len(values), np.float32), np.zeros(len(values), np.float32)
    masked = np.flatnonzero(_areas(values))
    for index, attention in zip(masked, scaled(maps.weights[masked]), strict=True):
        if not attention.any():
            continue
        inside = _cover(values[index], attention.shape)
        outside = 1 - inside
        mean_outside = (attention * outside).sum() / max(float(outside.sum()), 1e-6)
        score[index] = (attention * inside).sum() / inside.sum() - mean_outside
        likely = expit((attention - otsu_level(attention)) / SOFTNESS)
        support = (inside * likely).sum() / (inside.sum() + (outside * likely).sum())
        confidence[index] = GAIN * support / (1 + (GAIN - 1) * support)
    return score.round(_DECIMALS), confidence.round(_DECIMALS)


def sharpness(
    image: UInt8[np.ndarray, "H W 3"], values: Bool[np.ndarray, "words H W"]
) -> Float32[np.ndarray, " words"]:
    """How much the image changes along a mask's outline relative to elsewhere, in [0, 1]: edge / (edge + rest).

    The change at a pixel is the sum, over channels and both axes, of the absolute differences of its two neighbours.
    ``edge`` is its mean over the pixels on both sides of the outline, ``rest`` over all others: at 0.5 the outline
    follows no edge, at 0.75 the image changes three times as much along it. The image border does not count as outline.
    The result is 0 for an image of one colour.
    """
    ratios = np.zeros(len(values), np.float32)
    if not values.any():
        return ratios
    change = _change(image)
    total = int(change.sum())
    for index, mask in enumerate(values):
        left, top, right, bottom = box(mask)
        window = (slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1))
        band = _outline(mask[window])
        count = int(band.sum())
        along = int(change[window][band].sum())
        edge, rest = along / max(count, 1), (total - along) / max(mask.size - count, 1)
        ratios[index] = edge / (edge + rest) if edge else 0.0
    return ratios.round(_DECIMALS)


def disagreement(
    values: Bool[np.ndarray, "words H W"], others: Bool[np.ndarray, "words H W"]
) -> Float32[np.ndarray, " words"]:
    """1 - IoU of each mask with another mask of the same word, in [0, 1]."""
    shared, either = _areas(values & others), _areas(values | others)
    apart = 1 - shared / np.maximum(either, 1)
    return np.where(_areas(values) > 0, apart, 0).astype(np.float32).round(_DECIMALS)


def _areas(values: Bool[np.ndarray, "words H W"]) -> Int64[np.ndarray, " words"]:
    """The number of pixels of each mask."""
    return np.array([np.count_nonzero(mask) for mask in values], np.int64)


def _cover(mask: Bool[np.ndarray, "H W"], grid: tuple[int, ...]) -> Float64[np.ndarray, "h w"]:
    """The masked share of each cell of a grid."""
    picture = Image.fromarray(mask.astype(np.float32))
    return np.asarray(picture.resize((grid[1], grid[0]), Image.Resampling.BOX)).astype(np.float64)


def _change(image: UInt8[np.ndarray, "H W 3"]) -> Int16[np.ndarray, "H W"]:
    """The change at each pixel, 0 to 1530; on the image's border only in the direction of the border."""
    change = np.zeros(image.shape[:2], np.int16)
    for channel in np.moveaxis(image, 2, 0):
        values = channel.astype(np.int16)
        change[:, 1:-1] += np.abs(values[:, 2:] - values[:, :-2])
        change[1:-1] += np.abs(values[2:] - values[:-2])
    return change


def _outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The pixels on both sides of a mask's outline."""
    band = np.zeros(mask.shape, bool)
    across, along = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    band[:, 1:] |= across
    band[:, :-1] |= across
    band[1:] |= along
    band[:-1] |= along
    return band
