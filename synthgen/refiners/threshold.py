"""Cross-attention above a threshold."""

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
    """Assign each pixel to the word with the highest attention there, if it exceeds the word's level.

    m_w(x) = [F_w(x) > level_w] * [w = argmax_v F_v(x)]

    F_w is the word's cross-attention scaled to [0, 1] over the image and linear between cell centres; the first word
    wins a tie. It uses neither colour nor self-attention: the plain baseline. A flat map gives an empty mask.
    """

    method: Literal["otsu", "fixed"] = "otsu"  # otsu: Otsu's threshold of each word's map; fixed: level
    level: float = 0.5  # threshold for method "fixed", in [0, 1), on the scaled map

    def __post_init__(self) -> None:
        level_of(self.method, self.level)

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask per word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        return self.sample((image.shape[0], image.shape[1]), maps, step=1)

    def sample(self, size: tuple[int, int], maps: Maps, step: int) -> Bool[np.ndarray, "words rows columns"]:
        """The masks of :meth:`refine` for an image of ``size``, at every ``step``-th pixel from ``step // 2`` on.

        Raises:
            ValueError: as for :meth:`refine`.
        """
        return above_level(scaled(maps.weights), level_of(self.method, self.level), size, step)
