"""OpenCV's GrabCut on the colours, seeded from cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from synthgen.errors import MissingDependency
from synthgen.records import Maps
from synthgen.refiners._words import otsu_level, resize, scaled

try:
    import cv2
except ModuleNotFoundError:
    raise MissingDependency(
        "the refiner 'grabcut' needs OpenCV; install it with: pip install opencv-python-headless"
    ) from None

__all__ = ["GrabCut"]


@dataclass(frozen=True, kw_only=True)
class GrabCut:
    """Segment each word by OpenCV's GrabCut (Rother, Kolmogorov and Blake, 2004), initialised from its attention.

    F is the attention scaled to [0, 1] and linear between cell centres. Pixels with F >= ``inside`` are definite
    foreground; pixels with F <= ``outside``, or where another word is definite, are background; the others start as
    probable foreground or background by Otsu's threshold. Where the objects of two words overlap, the pixel goes to the
    higher F. It uses no self-attention and segments each word on its own: the baseline for colour alone. A flat map
    gives an empty mask.
    """

    inside: float = 0.85  # scaled attention from which a pixel is definite foreground
    outside: float = 0.1  # scaled attention up to which a pixel is definite background
    num_iterations: int = 5  # iterations of GrabCut

    def __post_init__(self) -> None:
        if not 0 <= self.outside < self.inside <= 1:
            raise ValueError(f"0 <= outside < inside <= 1 must hold, not {self.outside} and {self.inside}")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be 1 or more, not {self.num_iterations}")

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask per word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        fields, size = scaled(maps.weights), (image.shape[0], image.shape[1])
        masks = np.zeros((len(fields), *size), dtype=bool)

        def fine(word: int) -> Float32[np.ndarray, "H W"]:  # all of many words at once would be gigabytes
            layer: Float32[np.ndarray, "H W"] = resize(fields[word : word + 1], size)[0]
            return layer

        leader, highest, second = highest_two(fine, len(fields), size)
        for word in np.flatnonzero(fields.any(axis=(1, 2))).tolist():
            mine, others = fine(word), np.where(leader == word, second, highest)
            first = np.full(size, cv2.GC_PR_BGD, dtype=np.uint8)
            first[mine > otsu_level(fields[word])] = cv2.GC_PR_FGD
            first[(mine <= self.outside) | (others >= self.inside)] = cv2.GC_BGD
            first[(mine >= self.inside) & (mine > others)] = cv2.GC_FGD
            masks[word] = self.cut(image, first)
        leader, *_ = highest_two(lambda word: masks[word] * fine(word), len(fields), size)
        for word in range(len(masks)):
            masks[word] &= leader == word
        return masks

    def cut(self, image: UInt8[np.ndarray, "H W 3"], labels: UInt8[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
        """GrabCut's mask; the initial one if it has only foreground or only background, which OpenCV cannot model."""
        inside = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
        if inside.any() and not inside.all():
            cv2.setRNGSeed(0)  # its colour clusters start at random
            models = np.zeros((1, 65)), np.zeros((1, 65))  # of background and object, filled in by the call
            pixels, nowhere = np.ascontiguousarray(image), (0, 0, 0, 0)
            labels = cv2.grabCut(pixels, labels, nowhere, *models, self.num_iterations, cv2.GC_INIT_WITH_MASK)[0]
        found: Bool[np.ndarray, "H W"] = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
        return found


def highest_two(
    field: Callable[[int], Float32[np.ndarray, "H W"]], count: int, size: tuple[int, int]
) -> tuple[Int[np.ndarray, "H W"], Float32[np.ndarray, "H W"], Float32[np.ndarray, "H W"]]:
    """The index of the highest of ``count`` fields, none negative (the first of equals), its value, and the next value.

    Fields are computed one at a time. Where all are 0 the index is -1.
    """
    leader, highest, second = np.full(size, -1), np.zeros(size, np.float32), np.zeros(size, np.float32)
    for number in range(count):
        one = field(number)
        np.maximum(second, np.minimum(highest, one), out=second)
        np.copyto(leader, number, where=one > highest)
        np.maximum(highest, one, out=highest)
    return leader, highest, second
