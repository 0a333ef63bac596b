"""Confidence intervals of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import nan

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

__all__ = ["accuracy_over_seeds", "interval", "mean_with_interval", "spread"]

Score = Callable[[Float64[np.ndarray, "b n"]], Float64[np.ndarray, " b"]]

_AT_ONCE = 50  # resamples at a time: all at once would take 2000 times the memory of the values


def mean_with_interval(
    sums: Float64[np.ndarray, " n"], counts: Float64[np.ndarray, " n"] | None = None
) -> tuple[float, float, float]:
    """The mean with its 95 % bootstrap interval: percentiles of the means of 2000 resampled sets of images.

    An image contributes the sum of ``counts`` values (one value without ``counts``), which are drawn together because
    they are not independent. The interval covers the choice of test images, not the variation between trainings.
    For a single image the bounds are NaN; if all images have the same values, the interval is a point and says nothing.
    """
    counts = np.ones_like(sums) if counts is None else counts
    if len(sums) == 1:
        return float(sums.sum() / counts.sum()), nan, nan
    low, _, high = _percentiles(lambda times: (times @ sums) / np.maximum(times @ counts, 1e-12), len(sums), 2000)
    return float(sums.sum() / counts.sum()), low, high


def interval(score: Score, num_images: int, draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of any score in [0, 1], deterministic.

    ``score`` gets how often each image was drawn in each resample, and must return the plain score if each image was
    drawn once. Resamples miss rare classes, which biases scores that are means over classes; the interval is shifted
    by the difference between their mean and the plain score. For a single image the bounds are NaN.
    """
    if num_images == 1:
        return nan, nan
    low, middle, high = _percentiles(score, num_images, draws)
    plain = float(score(np.ones((1, num_images)))[0])
    return max(0.0, plain - max(0.0, middle - low)), min(1.0, plain + max(0.0, high - middle))


def spread(scores: Sequence[float]) -> dict[str, float]:
    """``spread``, the standard deviation of the scores over seeds; empty for a single seed."""
    return {"spread": float(np.std(scores, ddof=1))} if len(scores) > 1 else {}


def accuracy_over_seeds(correct: Sequence[Tensor], train_accuracies: Sequence[float]) -> dict[str, float]:
    """``accuracy`` with its interval and spread, ``train_accuracy``, and ``seeds``.

    Args:
        correct: for each training, 1 for each test image that is classified correctly, else 0.
        train_accuracies: for each training, the accuracy on the training images.
    """
    accuracy, low, high = mean_with_interval(torch.stack([*correct]).mean(0).numpy())
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        **spread([float(one.mean()) for one in correct]),
        "train_accuracy": sum(train_accuracies) / len(train_accuracies),
        "seeds": float(len(correct)),
    }


def _percentiles(score: Score, num_images: int, draws: int) -> tuple[float, float, float]:
    """The 2.5th percentile of the resampled scores, their mean, and the 97.5th percentile."""
    scores = np.concatenate([score(times) for times in _resample_counts(num_images, draws)])
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(scores.mean()), float(high)


def _resample_counts(num_images: int, draws: int) -> Iterator[Float64[np.ndarray, "b n"]]:
    rng = np.random.default_rng(0)
    for start in range(0, draws, _AT_ONCE):
        rows = min(_AT_ONCE, draws - start)
        images = rng.integers(num_images, size=(rows, num_images)) + np.arange(rows)[:, None] * num_images
        yield np.bincount(images.ravel(), minlength=rows * num_images).reshape(rows, num_images).astype(np.float64)
