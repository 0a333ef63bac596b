"""Refiners turn attention maps into full-resolution masks; the generator is not needed."""

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
        """One mask per word. Words compete: a pixel belongs to at most one word."""
        ...


REFINERS: Registry[Refiner] = Registry(__name__, "masks.refine")
