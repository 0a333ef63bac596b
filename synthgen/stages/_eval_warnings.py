"""Warnings about scores that say little."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from synthgen.text import counted

if TYPE_CHECKING:
    from synthgen.evaluators._extraction import Extracted
    from synthgen.stages._eval_sources import Source

__all__ = [
    "few_warnings",
    "interval_warnings",
    "label_warnings",
    "overlap_warnings",
    "scene_warnings",
    "word_warnings",
]

_FEW = 100  # test images; below that intervals are wide


def overlap_warnings(sources: Mapping[str, Source]) -> list[str]:
    """A warning about test images that are also training images."""
    if "train" not in sources or not (shared := sources["test"].places & sources["train"].places):
        return []
    names = _list(sorted(shared))
    return [f"test images are also training images, so scores say little about other images: {names}"]


def label_warnings(sources: Mapping[str, Source], used: Mapping[str, Sequence[str]]) -> list[str]:
    """Warnings about scores by labels; ``used`` are the labels of the images, if only some of them are used."""
    warnings = []
    for name, source in sources.items():
        lacking = len(source.samples) - len(source.labels)
        if lacking:
            warnings.append(f"{lacking} of {len(source.samples)} {name} images have no label and are left out")
    train, test = (used.get(name) or list(sources[name].labels.values()) for name in ("train", "test"))
    warnings += few_warnings("test images", len(test))
    if unseen := sorted(set(test) - set(train)):
        count = sum(label in unseen for label in test)
        warnings.append(f"classes that training lacks: {_list(unseen)}; their test images ({count}) count wrong")
    if len(set(train)) == 1:
        warnings.append("training has one class only: scores say nothing")
    return warnings


def scene_warnings(extracted: Mapping[str, Extracted], used: Mapping[str, Sequence[int]]) -> list[str]:
    """Warnings about scores by masks or boxes; ``used`` are the samples that have some."""
    warnings = []
    for name, found in extracted.items():
        lacking = len(used[name]) - len(found.keys)
        if lacking:
            images = f"{lacking} of {len(used[name])} {name} images {_with(found)}"
            warnings.append(f"{images} are left out: they have no label, or not exactly one word")
    train, test = extracted["train"], extracted["test"]
    warnings += few_warnings(f"test images {_with(test)}", len(test.keys))
    if unseen := sorted(test.names.keys() - train.names.keys()):
        count = sum(name in unseen for boxes in test.boxes for name, _ in boxes)
        warnings.append(
            f"classes that training lacks ({len(unseen)}): {_list(unseen)}; "
            f"their masks in test images ({count}) count as missed (not for saliency)"
        )
    return warnings


def word_warnings(predicted: Mapping[str, bool], truth: Mapping[str, bool]) -> list[str]:
    """A warning about true words that no predicted mask has.

    Args:
        predicted: words, and whether any mask of them has pixels.
        truth: the same of the true masks.
    """
    true = [word for word, has_pixels in truth.items() if has_pixels]
    unknown = sorted(set(true) - predicted.keys())
    if not unknown:
        return []
    are = "are not among the predicted words and count" if len(unknown) > 1 else "is not a predicted word and counts"
    return [f"{len(unknown)} of the {counted(len(true), 'true words')} {are} 0 (names must agree): {_list(unknown)}"]


def few_warnings(images: str, count: int) -> list[str]:
    """A warning about few test images, described by ``images``."""
    if count >= _FEW:
        return []
    if count == 1:
        return [f"{counted(1, images)}: there is no interval"]
    return [f"few {images} ({count}): the intervals are wide"]


def interval_warnings(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A warning about intervals that are a single point; ``scores`` are by row and evaluator.

    If all test images have the same result, so has every set drawn from them, and the bootstrap cannot say what other
    images would have.
    """
    points = [
        f"{name} of {row}"
        for row, evaluators in scores.items()
        for name, numbers in evaluators.items()
        if numbers.get("low") is not None and math.isclose(numbers["low"], numbers["high"], abs_tol=1e-9)
    ]
    if not points:
        return []
    return [
        "all test images have the same result, so the interval is a single point and says nothing about other images: "
        + _list(points)
    ]


def _with(found: Extracted) -> str:
    return "with masks or boxes" if found.num_boxes_only else "with masks"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
