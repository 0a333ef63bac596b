"""Images that the model's own safety checker flagged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from synthgen.filters import Candidate, Filter, Measure
from synthgen.records import SAFETY_WARNING

__all__ = ["Unsafe"]


@dataclass(frozen=True, kw_only=True)
class Unsafe(Filter):
    """Reject images that the model's safety checker flagged; it only runs with ``backbone.safety_checker=true``."""

    def open(self, device: str) -> Measure:
        """The function that looks up the verdict on each image."""

        def measure(candidates: Sequence[Candidate]) -> list[bool]:
            return [SAFETY_WARNING in candidate.warnings for candidate in candidates]

        return measure

    def reject(self, figures: Iterable[tuple[str, bool]]) -> dict[str, str]:
        """The flagged ones."""
        return {key: SAFETY_WARNING for key, flagged in figures if flagged}
