"""Colour alone, from seeds of attention: OpenCV's GrabCut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

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
    """Each word by GrabCut (Rother, Kolmogorov and Blake, 2004) as OpenCV has it, begun from the word's attention.

    With F the attention scaled to [0, 1] and linear between cell centres: at ``inside`` and above a pixel is object for
    certain, at ``outside`` and below, or where another word is certain, background; between them Otsu's level says
    what it is at first. Where the objects of two words overlap, the higher F has the pixel. It knows no self-attention
    and cuts each word by itself: the baseline of what colour can do. A flat map gives an empty mask.
    """

    inside: float = 0.85  # at this level of scaled attention and above, object for certain
    outside: float = 0.1  # at this one and below, background
    num_iterations: int = 5  # of GrabCut

    def __post_init__(self) -> None:
        if not 0 <= self.outside < self.inside <= 1:
            raise ValueError(f"0 <= outside < inside <= 1 must hold, not {self.outside} and {self.inside}")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be 1 or more, not {self.num_iterations}")

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask a word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        fields = scaled(maps.weights)
        masks = np.zeros((len(fields), *image.shape[:2]), dtype=bool)
        if not len(fields):
            return masks
        fine = resize(fields, (image.shape[0], image.shape[1]))
        for word in np.flatnonzero(fields.any(axis=(1, 2))):
            others = np.delete(fine, word, axis=0).max(axis=0, initial=0.0)
            first = np.full(fine[word].shape, cv2.GC_PR_BGD, dtype=np.uint8)
            first[fine[word] > otsu_level(fields[word])] = cv2.GC_PR_FGD
            first[(fine[word] <= self.outside) | (others >= self.inside)] = cv2.GC_BGD
            first[(fine[word] >= self.inside) & (fine[word] > others)] = cv2.GC_FGD
            masks[word] = self.cut(image, first)
        winner = (masks * fine).argmax(axis=0) == np.arange(len(masks))[:, None, None]
        mine: Bool[np.ndarray, "words H W"] = masks & winner
        return mine

    def cut(self, image: UInt8[np.ndarray, "H W 3"], labels: UInt8[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
        """OpenCV's answer; the first guess where it has colours of one side alone, of which it makes no model."""
        inside = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
        if inside.any() and not inside.all():
            cv2.setRNGSeed(0)  # its clusters of colours begin at random
            models = np.zeros((1, 65)), np.zeros((1, 65))  # of background and object, filled in by the call
            pixels, nowhere = np.ascontiguousarray(image), (0, 0, 0, 0)
            labels = cv2.grabCut(pixels, labels, nowhere, *models, self.num_iterations, cv2.GC_INIT_WITH_MASK)[0]
        found: Bool[np.ndarray, "H W"] = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
        return found
