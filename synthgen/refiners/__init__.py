"""Refiners turn where each word looked into a mask the size of the image, without the generator."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from synthgen.records import Maps
from synthgen.registry import Registry

__all__ = ["REFINERS", "Refiner"]


class Refiner(Protocol):
    """A frozen dataclass whose fields are its settings."""

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask a word. Words compete: a pixel belongs to one word at most."""
        ...


REFINERS: Registry[Refiner] = Registry(__name__, "masks.refine")
