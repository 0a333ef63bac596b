"""What makes the scores of an encoder doubtful, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from synthgen.text import counted

if TYPE_CHECKING:
    from synthgen.evaluators._extraction import Extracted
    from synthgen.stages._eval_sources import Source

__all__ = ["doubts", "doubts_of_masks", "doubts_of_words"]


def doubts(sources: Mapping[str, Source], kept: Mapping[str, Sequence[str]]) -> list[str]:
    """What makes scores by labels doubtful; ``kept`` are the labels of the images that are judged, where not all."""
    found = []
    for name, source in sources.items():
        lacking = len(source.samples) - len(source.labels)
        if lacking:
            found.append(f"{lacking} of {len(source.samples)} {name} images have no label and are left out")
    known, asked = (kept.get(name) or list(sources[name].labels.values()) for name in ("train", "test"))
    if len(asked) < 100:
        found.append(_few("test images", len(asked)))
    if unseen := sorted(set(asked) - set(known)):
        count = sum(label in unseen for label in asked)
        found.append(f"classes that training lacks: {_list(unseen)}; their test images ({count}) count wrong")
    if len(set(known)) == 1:
        found.append("there is one class only: every score is as good as that says")
    return found


def doubts_of_masks(found: Mapping[str, Extracted], masked: Mapping[str, Sequence[int]]) -> list[str]:
    """What makes scores by masks doubtful."""
    told = []
    for name, one in found.items():
        if len(one.keys) < len(masked[name]):
            lacking = len(masked[name]) - len(one.keys)
            told.append(
                f"{lacking} of {len(masked[name])} {name} images {_with(one)} have no label and one word: left out"
            )
    if len(found["test"].keys) < 100:
        told.append(_few(f"test images {_with(found['test'])}", len(found["test"].keys)))
    if unseen := sorted(found["test"].names.keys() - found["train"].names.keys()):
        boxes = sum(name in unseen for image in found["test"].boxes for name, _ in image)
        told.append(
            f"classes that training lacks ({len(unseen)}): {_list(unseen)}; "
            f"their masks in test images ({boxes}) count as not found where classes are told apart"
        )
    return told


def doubts_of_words(predicted: Mapping[str, bool], truth: Mapping[str, bool]) -> list[str]:
    """What makes scores of masks doubtful: true words that have pixels and are not among the predicted words.

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


def _with(found: Extracted) -> str:
    return "with masks or boxes" if found.boxed else "with masks"


def _few(images: str, count: int) -> str:
    return (
        f"{counted(1, images)}: there is no interval"
        if count == 1
        else f"few {images} ({count}): the intervals are wide"
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
