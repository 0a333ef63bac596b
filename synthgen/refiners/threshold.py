"""Attention above a level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8

from synthgen.records import Maps
from synthgen.refiners._words import above_level, level_of, scaled

__all__ = ["Threshold"]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Give a pixel to the word that looked there most, where that is above the word's level.

    m_w(x) = [F_w(x) > level_w] * [w = argmax_v F_v(x)]

    F_w is the word's cross-attention scaled to [0, 1] over the image and linear between cell centres; the first word
    wins a tie. It knows neither colour nor self-attention: the plain baseline. A flat map gives an empty mask.
    """

    method: Literal["otsu", "fixed"] = "otsu"  # otsu: the level that best divides the word's cells in two
    level: float = 0.5  # the level of method "fixed", in [0, 1) of the scaled map

    def __post_init__(self) -> None:
        level_of(self.method, self.level)

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask a word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        return above_level(scaled(maps.weights), level_of(self.method, self.level), (image.shape[0], image.shape[1]))
