"""Count masks by class and by word; each unit is counted once, when it is made, and its done mark stores the counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CUT_OFF", "Tallies", "Tally", "kind_of"]

CUT_OFF = "cut off: no text encoder reads as far as the word stands"


@dataclass(slots=True)
class Tally:
    """Masks of one class, or of one word."""

    name: str
    samples: int = 0  # samples with a masks record
    masks: int = 0  # masks that were kept
    dropped: dict[str, int] = field(default_factory=dict)  # kind of reason → count


class Tallies:
    """Running counts by class and by word."""

    def __init__(self) -> None:
        self.labels: dict[str, Tally] = {}
        self.words: dict[str, Tally] = {}

    def count(self, label: str, words: Sequence[str], reasons: Sequence[str]) -> None:
        """Count a sample; ``reasons`` says for each word why it has no mask, or "". A repeated word is one sample."""
        tallies = [self._of(self.words, word) for word in words]
        of_label = [self._of(self.labels, label)] if label else []
        for tally in [*of_label, *{tally.name: tally for tally in tallies}.values()]:
            tally.samples += 1
        for word, reason in zip(tallies, reasons, strict=True):
            for tally in [word, *of_label]:
                if reason:
                    kind = kind_of(reason)
                    tally.dropped[kind] = tally.dropped.get(kind, 0) + 1
                else:
                    tally.masks += 1

    def plain(self) -> dict[str, Any]:
        """All counts as plain data, for JSON."""
        return {
            name: {
                tally.name: {key: value for key, value in asdict(tally).items() if key != "name" and value}
                for tally in tallies.values()
            }
            for name, tallies in (("labels", self.labels), ("words", self.words))
        }

    def add(self, plain: Any) -> None:
        """Add the counts of other samples, as made by :meth:`plain`.

        Raises:
            ValueError: ``plain`` does not have that form; then nothing is added.
        """
        new = {name: {key: _tally(key, value) for key, value in _mapping(_mapping(plain).get(name)).items()}
               for name in ("labels", "words")}  # fmt: skip
        for name, known in (("labels", self.labels), ("words", self.words)):
            for one in new[name].values():
                tally = self._of(known, one.name)
                tally.samples += one.samples
                tally.masks += one.masks
                for kind, count in one.dropped.items():
                    tally.dropped[kind] = tally.dropped.get(kind, 0) + count

    def ranked(self) -> tuple[tuple[Tally, ...], tuple[Tally, ...]]:
        """Classes and words, the ones with the most samples first."""

        def ordered(tallies: Mapping[str, Tally]) -> tuple[Tally, ...]:
            return tuple(sorted(tallies.values(), key=lambda tally: (-tally.samples, tally.name)))

        return ordered(self.labels), ordered(self.words)

    @staticmethod
    def _of(tallies: dict[str, Tally], name: str) -> Tally:
        if name not in tallies:
            tallies[name] = Tally(name)
        return tallies[name]


def kind_of(reason: str) -> str:
    """The text before the colon: "too small" for "too small: covers 0.31% of the image, less than 0.50%".

    Reasons of older runs have no colon: "covers 0.31% of the image, less than 0.50%" gives "less than 0.50%".
    """
    return re.sub(r"^covers [\d.]+ ?% of the image, ", "", reason.partition(":")[0])


def _tally(name: str, value: Any) -> Tally:
    value = _mapping(value)
    dropped = {str(kind): _number(count) for kind, count in _mapping(value.get("dropped", {})).items()}
    return Tally(name, _number(value.get("samples", 0)), _number(value.get("masks", 0)), dropped)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it holds no counts")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("a count in it is none")
    return value
