"""Properties of a mask's shape: share of the image, box, components, and the objects that it splits into."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from scipy import ndimage

from synthgen.records import WordMasks

__all__ = ["MIN_OBJECT", "MIN_PART", "UNKNOWN", "box", "describe_masks", "split"]

MIN_PART = 0.0005  # share of the image; smaller parts do not count as components
MIN_OBJECT = 0.1  # share of the mask's largest part; smaller parts are not separate objects
UNKNOWN = -1.0  # in place of a value that was not measured when the mask was made: JSON has no NaN

_EIGHT = np.ones((3, 3), bool)  # pixels are neighbours across sides and corners


def describe_masks(masks: WordMasks, *, instances: bool = True) -> list[dict[str, Any]]:
    """The entry of each word's mask in a sample's JSON (keys in docs/format.md); zeros for an empty mask.

    Without ``instances`` each mask is one object, however many parts it has.
    """
    reasons = masks.dropped or ("",) * len(masks.words)
    return [
        {
            "word": word,
            "value": number + 1,
            "score": _number(masks.scores, number, 0.0),
            "confidence": _number(masks.confidence, number),
            **_shape(mask, instances),
            "sharpness": _number(masks.sharpness, number),
            "disagreement": _number(masks.disagreement, number),
            "dropped": reason,
        }
        for number, (word, mask, reason) in enumerate(zip(masks.words, masks.values, reasons, strict=True))
    ]


def box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """The first column and row of a mask, and the first column and row after it; zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def split(mask: Bool[np.ndarray, "H W"]) -> list[Bool[np.ndarray, "H W"]]:
    """The separate objects of one word's mask, the largest first; none if it is empty.

    An object is a part, connected across pixels' sides and corners, with at least ``MIN_OBJECT`` of the largest part's
    pixels. Smaller parts belong to no object. Only the mask is used: objects that touch stay one, and an object that
    is occluded in the middle becomes two.
    """
    labels, sizes = _parts(mask)
    return [labels == number for number in _objects(sizes)]


def _shape(mask: Bool[np.ndarray, "H W"], instances: bool) -> dict[str, Any]:
    """The part of a description that follows from the pixels."""
    height, width = mask.shape
    left, top, right, bottom = whole = box(mask)
    labels, sizes = _parts(mask[top:bottom, left:right])
    areas = [int(sizes[number - 1]) for number in _objects(sizes)]
    boxes = [_offset(labels == number, left, top) for number in _objects(sizes)]
    if not instances and areas:
        areas, boxes = [int(sizes.sum())], [whole]
    return {
        "area": round(float(sizes.sum()) / max(mask.size, 1), 6),
        "box": list(whole),
        "touches_border": bool(len(sizes)) and (left == 0 or top == 0 or right == width or bottom == height),
        "components": int((sizes >= MIN_PART * mask.size).sum()),
        "instances": [
            {"area": round(area / mask.size, 6), "box": list(one)} for area, one in zip(areas, boxes, strict=True)
        ],
    }


def _parts(mask: Bool[np.ndarray, "H W"]) -> tuple[Int32[np.ndarray, "H W"], Int64[np.ndarray, " parts"]]:
    """Number the connected parts of a mask from 1, row by row, and count the pixels of each."""
    labels, num = ndimage.label(mask, structure=_EIGHT)
    return labels, np.bincount(labels.ravel(), minlength=num + 1)[1:]


def _objects(sizes: Int64[np.ndarray, " parts"]) -> list[int]:
    """The numbers of the parts that are objects, the largest first."""
    order = np.argsort(-sizes, kind="stable")
    return [int(part) + 1 for part in order if sizes[part] >= MIN_OBJECT * sizes[order[0]]]


def _offset(mask: Bool[np.ndarray, "h w"], left: int, top: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box(mask)
    return x0 + left, y0 + top, x1 + left, y1 + top


def _number(values: Float32[np.ndarray, " words"] | None, index: int, absent: float = UNKNOWN) -> float:
    """One value rounded to six decimals, or ``absent`` if it is missing or not finite."""
    value = math.nan if values is None else float(values[index])
    return round(value, 6) if math.isfinite(value) else absent
