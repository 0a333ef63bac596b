"""How sure a mean is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

_ROUNDS, _DRAWS = 20, 100  # in rounds: all draws at once would take 2000 times the memory of the values


def mean_with_interval(
    sums: Float64[np.ndarray, " n"], counts: Float64[np.ndarray, " n"] | None = None
) -> tuple[float, float, float]:
    """The mean with its 95 % bootstrap interval: percentiles of the means of 2000 redrawn sets of images.

    An image brings the sum of ``counts`` values (one value, where there are none): they are drawn together, for they
    share its luck. The interval tells the luck in the choice of test images; another training has luck of its own.
    """
    counts = np.ones_like(sums) if counts is None else counts
    rng, means = np.random.default_rng(0), []
    for _ in range(_ROUNDS):
        drawn = rng.integers(len(sums), size=(_DRAWS, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
