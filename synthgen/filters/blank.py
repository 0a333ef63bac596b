"""Images that show nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from synthgen.config import check_range
from synthgen.filters import Candidate, Filter, Measure

__all__ = ["Blank"]


@dataclass(frozen=True, kw_only=True)
class Blank(Filter):
    """Reject images of almost one colour, such as the black ones that a decoder returns for NaN latents.

    The figure is the largest standard deviation of the three channels, in [0, 127.5]. The threshold is our choice.
    """

    min_std: float = 5.0  # least standard deviation, of channel values from 0 to 255

    def __post_init__(self) -> None:
        check_range(ge=0, le=127.5, min_std=self.min_std)

    def open(self, device: str) -> Measure:
        """The function that measures the deviation of each image."""

        def measure(candidates: Sequence[Candidate]) -> list[float]:
            return [deviation(candidate.image) for candidate in candidates]

        return measure

    def reject(self, figures: Iterable[tuple[str, float]]) -> dict[str, str]:
        """Those whose channels all deviate less than ``min_std``."""
        return {
            key: f"its channels deviate by {std:.1f} at most, less than {self.min_std:g}"
            for key, std in figures
            if std < self.min_std
        }


def deviation(image: UInt8[np.ndarray, "H W 3"]) -> float:
    """The largest standard deviation of the channels, to three decimals."""
    return round(float(image.std(axis=(0, 1), dtype=np.float64).max()), 3)
