"""Count masks by class and by word. Each unit is counted when it is made, and its done mark stores the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Tallies", "Tally"]


@dataclass(slots=True)
class Tally:
    """Masks of one class, or of one word."""

    name: str
    samples: int = 0  # samples with a masks record
    masks: int = 0  # masks that were kept
    dropped: dict[str, int] = field(default_factory=dict)  # kind of reason → masks
    cut_off: int = 0  # words that never had a mask, as no text encoder reads them

    def drop(self, kind: str, count: int = 1) -> None:
        """Count dropped masks."""
        self.dropped[kind] = self.dropped.get(kind, 0) + count


class Tallies:
    """Running counts by class and by word."""

    def __init__(self) -> None:
        self.labels: dict[str, Tally] = {}
        self.words: dict[str, Tally] = {}

    def count(self, label: str, words: Sequence[str], reasons: Sequence[str], cut_off: Sequence[str] = ()) -> None:
        """Count a sample.

        Args:
            label: its class, or "".
            words: its words; one that occurs twice counts as one sample.
            reasons: for each word why its mask was dropped, as "kind: detail", or "".
            cut_off: its words that no text encoder reads.
        """
        of_label = [_of(self.labels, label)] if label else []
        for tally in [*of_label, *(_of(self.words, word) for word in dict.fromkeys((*words, *cut_off)))]:
            tally.samples += 1
        for word, reason in zip(words, reasons, strict=True):
            for tally in [*of_label, self.words[word]]:
                if reason:
                    tally.drop(reason.partition(":")[0])
                else:
                    tally.masks += 1
        for word in cut_off:
            for tally in [*of_label, self.words[word]]:
                tally.cut_off += 1

    def plain(self) -> dict[str, Any]:
        """All counts as plain data, for JSON."""
        return {
            name: {
                tally.name: {key: value for key, value in asdict(tally).items() if key != "name" and value}
                for tally in tallies.values()
            }
            for name, tallies in (("labels", self.labels), ("words", self.words))
        }

    @classmethod
    def from_plain(cls, plain: Any) -> Tallies:
        """The inverse of :meth:`plain`.

        Raises:
            ValueError: ``plain`` does not have that form.
        """
        tallies = cls()
        for name, of_kind in (("labels", tallies.labels), ("words", tallies.words)):
            of_kind |= {key: _tally(key, value) for key, value in _mapping(_mapping(plain).get(name)).items()}
        return tallies

    def add(self, other: Tallies) -> None:
        """Add the counts of other samples."""
        for tallies, more in ((self.labels, other.labels), (self.words, other.words)):
            for one in more.values():
                tally = _of(tallies, one.name)
                tally.samples += one.samples
                tally.masks += one.masks
                for kind, count in one.dropped.items():
                    tally.drop(kind, count)
                tally.cut_off += one.cut_off

    def ranked(self) -> tuple[tuple[Tally, ...], tuple[Tally, ...]]:
        """Classes and words, the ones with the most samples first."""

        def ordered(tallies: Mapping[str, Tally]) -> tuple[Tally, ...]:
            return tuple(sorted(tallies.values(), key=lambda tally: (-tally.samples, tally.name)))

        return ordered(self.labels), ordered(self.words)


def _of(tallies: dict[str, Tally], name: str) -> Tally:
    return tallies.setdefault(name, Tally(name))


def _tally(name: str, value: Any) -> Tally:
    value = _mapping(value)
    dropped = {kind: _count(count) for kind, count in _mapping(value.get("dropped", {})).items()}
    samples, masks, cut_off = (_count(value.get(key, 0)) for key in ("samples", "masks", "cut_off"))
    return Tally(name, samples, masks, dropped, cut_off)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("its counts are not a JSON object")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value
