"""Colour unaries: weighted colour histograms of windows of an image, compared label by label in each bin."""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float32, Int, UInt8
from scipy.ndimage import gaussian_filter1d

from synthgen.graphcut import Slices

__all__ = ["Palette"]

#: Bins per colour axis, their blur in bins, and what is added to each label's share of a bin.
BINS, BLUR, PSEUDOCOUNT = 8, 0.7, 1e-5
#: The bins span this many standard deviations to each side, and each is at least this many levels of 256 wide.
BIN_RANGE, MIN_BIN_WIDTH = 2.5, 2.0
#: Windows along the image's long side, and their blur in windows.
WINDOWS, WINDOW_BLUR = 5, 0.7


class Palette:
    """The binned colours of a pixel grid, of which histograms are taken more than once."""

    def __init__(self, image: UInt8[np.ndarray, "h w 3"]) -> None:
        height, width = image.shape[:2]
        self.rows, self.columns = (max(1, round(WINDOWS * side / max(height, width))) for side in (height, width))
        self.bins = binned(image)  # h w
        window = (np.arange(height) * self.rows // height)[:, None] * self.columns
        window = window + np.arange(width) * self.columns // width
        self.places = (window * BINS**3 + self.bins).ravel()  # of each pixel in the histograms of all windows

    def nll(
        self, model: Float32[np.ndarray, "labels h w"], part: Slices = (slice(None), slice(None))
    ) -> Float32[np.ndarray, "labels y x"]:
        """-T log Q of ``AttentionCut`` for a part of the grid, minus that of label 0, which changes no cut.

        Histograms are of the whole grid, weighted with ``model``. Label 0 is 0, so one word takes half the time.
        """
        (height, width), rows, columns, bins = self.bins.shape, self.rows, self.columns, BINS**3
        size = rows * columns * bins
        counts = np.stack(
            [np.bincount(self.places, weights=one.ravel(), minlength=size) for one in model], dtype=np.float32
        )
        nll = self._of_bins(counts)
        average = (counts * nll).sum(axis=1, dtype=np.float64) / counts.sum(axis=1, dtype=np.float64)
        nll *= np.float32(max(0.0, 1 - float(average.mean()) / math.log(len(model))))
        color = self.bins[part]
        result = np.zeros((len(model), *color.shape), dtype=np.float32)
        for row, low in nearest_windows(height, rows):
            for column, left in nearest_windows(width, columns):
                index = color + (row[part[0], None] * columns + column[part[1]]) * bins
                share = low[part[0], None] * left[part[1]]
                for one, of_bin in zip(result[1:], nll[1:] - nll[0], strict=True):
                    one += share * of_bin.take(index)
        return result

    def _of_bins(self, counts: Float32[np.ndarray, "labels bins"]) -> Float32[np.ndarray, "labels bins"]:
        """-log Q in each bin of each window."""
        smooth = counts.reshape(-1, BINS, BINS, BINS)
        for _ in range(3):  # along one axis after the other
            smooth = (smooth @ blur(BINS, BLUR)).transpose(0, 3, 1, 2)
        windowed = smooth.reshape(len(counts), self.rows, self.columns, -1)
        whole = windowed.sum(axis=(1, 2), keepdims=True)
        whole /= whole.sum(axis=3, keepdims=True)
        near = (blur(self.rows, WINDOW_BLUR) @ windowed.reshape(len(counts), self.rows, -1)).reshape(windowed.shape)
        near = blur(self.columns, WINDOW_BLUR) @ near
        own = self.bins.size / (self.rows * self.columns)  # a window's pixels
        shares = (near + own * whole) / (near.sum(axis=3, keepdims=True) + own) + PSEUDOCOUNT
        nll: Float32[np.ndarray, "labels bins"] = -np.log(shares / shares.sum(axis=0)).reshape(counts.shape)
        return nll


def binned(image: UInt8[np.ndarray, "h w 3"]) -> Int[np.ndarray, "h w"]:
    """The bin of each pixel's colour, along the principal axes of the image's colours.

    So bins are narrow where all colours are similar, and few are wasted on colours that do not occur.
    """
    flat = image.reshape(-1, 3).astype(np.float64)
    mean = flat.mean(axis=0)
    variance, axes = np.linalg.eigh(flat.T @ flat / len(flat) - np.outer(mean, mean))
    axes *= np.sign(axes[abs(axes).argmax(axis=0), range(3)])  # the sign of an axis is arbitrary: fix it
    axes *= variance > 1e-6 * max(variance.max(), 1.0)  # otherwise rounding alone would separate greys
    half = np.maximum(BIN_RANGE * np.sqrt(variance.clip(min=0)), MIN_BIN_WIDTH * BINS / 2)
    along = (flat - mean).astype(np.float32) @ (axes * (BINS / 2) / half).astype(np.float32) + np.float32(BINS / 2)
    places = np.array([BINS**2, BINS, 1], dtype=np.float32)  # whole numbers: the product is exact
    bins: Int[np.ndarray, "h w"] = (np.floor(along.clip(0, BINS - 1)) @ places).astype(np.intp)
    return bins.reshape(image.shape[:2])


@functools.lru_cache(maxsize=64)
def blur(count: int, sigma: float) -> Float32[np.ndarray, "count count"]:
    """The Gaussian blur of ``count`` values as a matrix, zeros beyond the ends."""
    kernel: Float32[np.ndarray, "count count"] = gaussian_filter1d(
        np.eye(count, dtype=np.float32), sigma, mode="constant"
    )
    return kernel


def nearest_windows(size: int, count: int) -> tuple[tuple[Int[np.ndarray, " size"], Float32[np.ndarray, " size"]], ...]:
    """For each of ``size`` pixels the windows before and after it with their weights: linear between window centres."""
    position = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    before = position.astype(np.intp)
    fraction = (position - before).astype(np.float32)
    return (before, 1 - fraction), (np.minimum(before + 1, count - 1), fraction)
