"""Cross-attention propagated along self-attention, above a threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8

from synthgen.records import Maps
from synthgen.refiners._affinity import Links, affinity_edges, walk
from synthgen.refiners._words import above_level, level_of, scaled

__all__ = ["Propagation"]


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """Propagate each word's attention along self-attention, then assign pixels as ``threshold`` does.

    F <- (1 - spread) F + spread S F, ``num_steps`` times, and scaled to [0, 1]

    S is the self-attention above uniform between nearby cells, with rows that sum to 1. Training-free segmentation
    often completes blurred attention in this way (Dataset Diffusion, Nguyen et al., 2023, uses powers of the full
    matrix; the nearby edges and ``spread`` are ours). It uses no colour, and outlines have the resolution of the maps'
    grid. A flat map gives an empty mask.
    """

    num_steps: int = 4  # propagation steps
    spread: float = 0.5  # step size of the propagation, in [0, 1]
    method: Literal["otsu", "fixed"] = "otsu"  # otsu: Otsu's threshold of each word's map; fixed: level
    level: float = 0.5  # threshold for method "fixed", in [0, 1), on the scaled result

    def __post_init__(self) -> None:
        if not 0 <= self.num_steps < math.inf:
            raise ValueError(f"num_steps must not be negative, but is {self.num_steps}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread must be in [0, 1], not {self.spread}")
        level_of(self.method, self.level)

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask per word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        fields = scaled(maps.weights)
        if len(fields):
            fields = walk(fields, Links.of(affinity_edges(maps.affinity)), self.num_steps, self.spread)
        return above_level(fields, level_of(self.method, self.level), (image.shape[0], image.shape[1]))
