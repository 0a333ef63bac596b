"""The masks of a run by class and by word, and its shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthgen.attention.words import words_cut_off
from synthgen.codecs import decode_meta
from synthgen.errors import SynthgenError
from synthgen.run import Run
from synthgen.status.artifacts import FEW
from synthgen.status.reading import is_number, read_object
from synthgen.stores import listing
from synthgen.stores.tar import read_tar
from synthgen.tallies import CUT_OFF, Tallies, Tally

__all__ = ["Counted", "Dropped", "Shards", "finished_shards"]


@dataclass(frozen=True, slots=True)
class Shards:
    """The content of ``shards/dataset.json``."""

    splits: dict[str, int]  # samples
    num_shards: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A word of a sample without a mask, and the reason."""

    key: str
    word: str
    reason: str


class Counted:
    """Masks by class and by word: from the done marks, or from the tars of units whose marks have no tallies."""

    def __init__(self) -> None:
        self._tallies = Tallies()
        self._tallied: set[str] = set()  # names of tars
        self._first: list[Dropped] = []
        self._named, self._sources = 0, dict[str, bool]()  # tars to take examples from; whether words were cut off

    def hear(self, unit: str, mark: Mapping[str, Any]) -> None:
        """Count the tallies in the mark of a unit."""
        with suppress(ValueError):
            self._tallies.add(mark.get("tallies"))
            self._tallied.add(f"{unit}.tar")
            notes = mark.get("notes") or {}
            if (lost := notes.get("dropped", 0) + notes.get("words cut off", 0)) and self._named < FEW:
                self._named += lost
                self._sources[f"{unit}.tar"] = bool(notes.get("words cut off"))

    def ranked(self, run: Run, problems: list[str]) -> tuple[tuple[Tally, ...], tuple[Tally, ...]]:
        """Classes and words, most samples first, once all marks have been counted."""
        folder = run.folder("masks")
        for name in sorted(listing(folder).keys() - self._tallied):
            if name.endswith(".tar") and name[:1].isdigit():
                with _reporting(problems):
                    for sample in _samples(folder / name, run.folder("images") / name):
                        self._tallies.count(*sample[1:])
                        self._name(*sample)
        return self._tallies.ranked()

    def first_dropped(self, run: Run, problems: list[str]) -> tuple[Dropped, ...]:
        """The first few words without a mask, once all marks have been counted; read from one or two tars."""
        for name, cut_off in self._sources.items():
            with _reporting(problems):
                for sample in _samples(run.folder("masks") / name, run.folder("images") / name if cut_off else None):
                    self._name(*sample)
        return tuple(sorted(self._first, key=lambda one: one.key)[:FEW])

    def _name(self, key: str, label: str, words: Sequence[str], reasons: Sequence[str]) -> None:
        few = [Dropped(key, word, reason) for word, reason in zip(words, reasons, strict=True) if reason]
        self._first += few[: max(0, 2 * FEW - len(self._first))]


@contextmanager
def _reporting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (SynthgenError, OSError, KeyError, ValueError, TypeError) as error:
        problems.append(str(error))


def _samples(masks: Path, images: Path | None) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """For each sample of a unit its key, class, words, and for each word why it has no mask, or "".

    Without ``images`` neither the class nor words that were cut off are known.
    """
    about = {key: _about(members) for key, members in read_tar(images, ("json",))} if images else {}
    for key, record in [(key, decode_meta(key, members)) for key, members in read_tar(masks, ("json",))]:
        wanted = [str(word) for word in record.get("words", ())]
        dropped = record.get("dropped")
        reasons = [str(reason) for reason in dropped] if isinstance(dropped, list) else []
        reasons += [""] * (len(wanted) - len(reasons))
        label, lost = about.get(key, ("", []))
        yield key, label, wanted + lost, reasons[: len(wanted)] + [CUT_OFF] * len(lost)


def _about(members: Mapping[str, bytes]) -> tuple[str, list[str]]:
    """The class of a sample, and the words that the text encoder cut off."""
    meta = decode_meta("", members)
    return str(meta.get("label") or ""), words_cut_off(str(one) for one in meta.get("warnings") or ())


def finished_shards(run: Run, problems: list[str]) -> Shards | None:
    """The content of the shards' manifest; None if there is none yet."""
    path = run.folder("shards") / "dataset.json"
    if not path.is_file():
        return None
    value = read_object(path, problems)
    listed = value.get("shards")
    shards = [shard for shard in listed if isinstance(shard, dict)] if isinstance(listed, list) else []
    splits: dict[str, int] = {}
    given = value.get("splits")
    for name, split in given.items() if isinstance(given, dict) else ():
        count = split.get("samples") if isinstance(split, dict) else split
        splits[str(name)] = count if isinstance(count, int) else 0
    sizes = (float(shard["bytes"]) for shard in shards if is_number(shard.get("bytes")))
    return Shards(splits, len(shards), sum(int(size) for size in sizes if math.isfinite(size)))
