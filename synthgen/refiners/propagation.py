"""Attention carried along self-attention, then cut off at a level."""

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
    """Let each word's attention walk to the cells that look at its cells; then give pixels as ``threshold`` does.

    F <- (1 - spread) F + spread S F, ``num_steps`` times, and scaled to [0, 1]

    S is self-attention above uniform between a cell and its near ones, its rows summing to 1. Such a walk is how
    training-free segmentation often makes blurred attention whole (Dataset Diffusion, Nguyen et al., 2023, has powers
    of the full matrix; the near edges and ``spread`` are ours). It knows no colour, and its outlines are of the maps'
    grid. A flat map gives an empty mask.
    """

    num_steps: int = 4  # of the walk
    spread: float = 0.5  # share of a step that comes from other cells, in [0, 1]
    method: Literal["otsu", "fixed"] = "otsu"  # otsu: the level that best divides the word's cells in two
    level: float = 0.5  # the level of method "fixed", in [0, 1) of the scaled result

    def __post_init__(self) -> None:
        if not 0 <= self.num_steps < math.inf:
            raise ValueError(f"num_steps must not be negative, but is {self.num_steps}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread must be in [0, 1], not {self.spread}")
        level_of(self.method, self.level)

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask a word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        fields = scaled(maps.weights)
        if len(fields):
            fields = walk(fields, Links.of(affinity_edges(maps.affinity)), self.num_steps, self.spread)
        return above_level(fields, level_of(self.method, self.level), (image.shape[0], image.shape[1]))
