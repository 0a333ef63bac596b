"""Overlap of predicted with true masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool

from synthgen.errors import ConfigError
from synthgen.evaluators import Baseline, EvalData, Need
from synthgen.evaluators._bootstrap import mean_with_interval
from synthgen.records import WordMasks

__all__ = ["MaskIoU"]


@dataclass(frozen=True, kw_only=True)
class MaskIoU:
    """Intersection over union of predicted and true masks, word by word.

    A word counts where the truth has pixels of it; one that was not predicted, or whose mask was dropped, counts 0.
    Words are matched by name, the second of two equal ones with the second. Predicted masks of another size are resized
    (nearest pixel). The interval resamples images, because the words of an image are not independent.
    """

    needs: ClassVar[Need] = "masks"
    baselines: ClassVar[tuple[Baseline, ...]] = ()

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``mean_iou`` over words with its interval, ``found`` (share with IoU of 0.5 or more), and counts.

        Raises:
            ConfigError: no key of the predictions is in the truth.
        """
        keys = sorted(data.predicted.keys() & data.truth.keys())
        per_image = [word_ious(data.predicted[key], data.truth[key]) for key in keys]
        per_image = [ious for ious in per_image if ious]
        if not per_image:
            raise ConfigError("predictions and truth share no sample with a mask; are they of the same images?")
        ious = np.concatenate(per_image)
        mean, low, high = mean_with_interval(
            np.array([sum(ious) for ious in per_image]), np.array([float(len(ious)) for ious in per_image])
        )
        found = {"found": float((ious >= 0.5).mean()), "words": float(len(ious)), "images": float(len(per_image))}
        return {"mean_iou": mean, "low": low, "high": high, **found}


def word_ious(predicted: WordMasks, truth: WordMasks) -> list[float]:
    """The IoU of each word of ``truth`` that has pixels, in order."""
    unmatched = list(enumerate(predicted.words))
    found = []
    for word, mask in zip(truth.words, truth.values, strict=True):
        match = next((item for item in unmatched if item[1].lower() == word.lower()), None)
        if match is not None:
            unmatched.remove(match)
        if not mask.any():
            continue
        if match is None:
            found.append(0.0)
            continue
        guess = _resize(predicted.values[match[0]], mask.shape)
        found.append(float((guess & mask).sum() / (guess | mask).sum()))
    return found


def _resize(mask: Bool[np.ndarray, "h w"], shape: tuple[int, ...]) -> Bool[np.ndarray, "H W"]:
    if mask.shape == shape:
        return mask
    rows, columns = (((np.arange(to) + 0.5) * of / to).astype(int) for of, to in zip(mask.shape, shape, strict=True))
    resized: Bool[np.ndarray, "H W"] = mask[rows[:, None], columns[None]]
    return resized
