"""The masks of a run by class and by word, and its shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthgen.codecs import decode_meta
from synthgen.errors import SynthgenError
from synthgen.run import Run
from synthgen.status.artifacts import NUM_EXAMPLES
from synthgen.status.reading import is_number, read_object
from synthgen.stores.tar import read_tar
from synthgen.tallies import Tallies

__all__ = ["Dropped", "MaskCounts", "Shards", "finished_shards"]


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
    cut_off: bool = False  # the word never had a mask, as no text encoder reads it


class MaskCounts:
    """Masks by class and by word, and the first few words without a mask."""

    def __init__(self) -> None:
        self.tallies = Tallies()
        self._examples: list[tuple[str, bool]] = []  # tars to take examples from, and whether words were cut off
        self._num_examples = 0

    def add(self, folder: Path, unit: str, mark: Mapping[str, Any], problems: list[str]) -> None:
        """Add the counts in the done mark of a unit."""
        try:
            tallies = Tallies.from_plain(mark.get("tallies"))
        except ValueError as error:
            problems.append(
                f"the tallies in {folder / unit}.json cannot be read ({error}); delete it and make it again"
            )
            return
        self.tallies.add(tallies)
        dropped = sum(sum(tally.dropped.values()) for tally in tallies.words.values())
        cut_off = sum(tally.cut_off for tally in tallies.words.values())
        if dropped + cut_off and self._num_examples < NUM_EXAMPLES:
            self._num_examples += dropped + cut_off
            self._examples.append((f"{unit}.tar", cut_off > 0))

    def first_dropped(self, run: Run, problems: list[str]) -> tuple[Dropped, ...]:
        """The first few words without a mask, once all marks were added; read from one or two tars."""
        found: list[Dropped] = []
        for name, cut_off in self._examples:
            try:
                found += _without_mask(run.folder("masks") / name)
                found += _cut_off(run.folder("images") / name) if cut_off else ()
            except (SynthgenError, OSError) as error:
                problems.append(str(error))
        return tuple(sorted(found, key=lambda one: one.key)[:NUM_EXAMPLES])


def _without_mask(tar: Path) -> Iterator[Dropped]:
    """The words of a unit's samples whose masks were dropped."""
    for key, members in read_tar(tar, ("json",)):
        meta = decode_meta(key, members)
        dropped = meta.get("dropped")
        for word, reason in zip(meta["words"], dropped if isinstance(dropped, list) else (), strict=False):
            if reason:
                yield Dropped(key, word, str(reason))


def _cut_off(tar: Path) -> Iterator[Dropped]:
    """The words of a unit's samples that no text encoder reads."""
    for key, members in read_tar(tar, ("json",)):
        for word in decode_meta(key, members)["words_cut_off"]:
            yield Dropped(key, word, "no text encoder reads this far into the prompt", cut_off=True)


def finished_shards(run: Run, problems: list[str]) -> Shards | None:
    """The content of ``dataset.json``; None if there is none yet."""
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
