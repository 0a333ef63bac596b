"""Images without usable masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from synthgen.config import check_range
from synthgen.filters import Candidate, Filter, Measure

__all__ = ["Unmasked"]


@dataclass(frozen=True, kw_only=True)
class Unmasked(Filter):
    """Reject images that have too few masks.

    A mask counts unless the masks stage dropped it. For a segmentation set ``every_word`` matters: the object of a
    dropped mask is labelled as background.
    """

    uses_masks: ClassVar = True

    min_masks: int = 1  # least number of masks
    every_word: bool = False  # every marked word must have its mask; an image without marked words passes

    def __post_init__(self) -> None:
        check_range(ge=0, min_masks=self.min_masks)

    def open(self, device: str) -> Measure:
        """The function that counts the masks of each image, and its marked words."""
        return lambda candidates: [_count(candidate) for candidate in candidates]

    def reject(self, figures: Iterable[tuple[str, Sequence[int]]]) -> dict[str, str]:
        """Those with fewer than ``min_masks`` masks, and with ``every_word`` those of which one is missing."""
        return {key: reason for key, (masks, words) in figures if (reason := self._reason(masks, words))}

    def _reason(self, masks: int, words: int) -> str:
        if self.every_word and masks < words:
            return f"{masks} of {words} words have a mask"
        if masks < (min(self.min_masks, words) if self.every_word else self.min_masks):
            return f"{masks} masks are fewer than {self.min_masks}"
        return ""


def _count(candidate: Candidate) -> list[int]:
    masks = candidate.masks
    return [0, 0] if masks is None else [int(masks.values.any(axis=(1, 2)).sum()), len(masks.words)]
