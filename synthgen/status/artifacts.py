"""The progress of each artifact of a run, from its done marks and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from synthgen.config import build
from synthgen.entries import FAILED
from synthgen.run import Run
from synthgen.stages import STAGES
from synthgen.status.reading import is_number, read_object, read_objects
from synthgen.stores import listing
from synthgen.units import num_attempted

__all__ = ["NUM_EXAMPLES", "ArtifactStatus", "artifact_status"]

NUM_EXAMPLES = 3  # samples that are named as examples
_SPLITS = ("train", "val")  # folders of shards


@dataclass(frozen=True, slots=True)
class ArtifactStatus:
    """The progress of one artifact, in units and samples."""

    name: str
    stage: str  # that writes it
    done: int  # units
    planned: int  # units; the known ones if the stage cannot say
    samples: int = 0
    seconds: float = 0.0  # summed over workers
    bytes: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)  # unit → reason
    damaged: dict[int, str] = field(default_factory=dict)  # failed unit → file of an earlier stage that is damaged
    left_out: dict[str, str] = field(default_factory=dict)  # key → reason, of the first few samples that were left out
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples per second of one worker; 0 without a measured time."""
        return self.samples / self.seconds if self.seconds else 0.0


OnMark = Callable[[str, Mapping[str, Any]], None]  # called with the stem of a done mark, such as "000012", and the mark


def artifact_status(
    run: Run,
    name: str,
    entry: Mapping[str, Any],
    earlier: Mapping[str, ArtifactStatus],
    problems: list[str],
    on_mark: OnMark = lambda stem, mark: None,
) -> ArtifactStatus:
    """The progress of an artifact. ``on_mark`` is called with each done mark; only one is in memory at a time."""
    folder = run.folder(name)
    files = listing(folder)
    failures, damaged = dict[int, str](), dict[int, str]()
    for stem in _numbers(files, FAILED):
        failure = read_object(folder / f"{stem}{FAILED}", problems)
        failures[int(stem)] = str(failure.get("error", "no reason was recorded"))
        if failure.get("damaged"):
            damaged[int(stem)] = str(failure["damaged"])
    known = {f"{unit:06d}" for unit in failures}
    planned, min_samples = _plan(run, name, entry, [int(stem) for stem in _numbers(files, ".json")])
    sums = _Sums()
    for stem, length, mark in _marks(folder, files, problems):
        known.add(stem)
        if length is None or not _is_done(length, mark, entry):
            continue
        unit = int(stem) if stem.isdecimal() else None
        has_grown = unit is not None and num_attempted(mark) < min_samples.get(unit, 0)
        sums.add(mark, is_done=not has_grown)
        if unit is not None and not has_grown:
            failures.pop(unit, None)  # done by a later attempt
        on_mark(stem, mark)
    if planned is None:  # a stage mostly has as many units as its inputs
        inputs = [earlier[given].planned for given in entry.get("inputs", {}) if given in earlier]
        planned = max([len(known), *inputs])
    return ArtifactStatus(
        name,
        stage=str(entry.get("stage", name)),
        done=sums.done,
        planned=max(planned, sums.done),
        samples=sums.samples,
        seconds=round(sums.seconds, 3),
        bytes=sums.bytes,
        notes=sums.notes,
        failures=failures,
        damaged={unit: path for unit, path in damaged.items() if unit in failures},
        left_out=sums.left_out,
        settings=dict(entry.get("settings") or {}),
        versions=dict(entry.get("versions") or {}),
    )


@dataclass(slots=True)
class _Sums:
    """Sums over done marks."""

    done: int = 0
    samples: int = 0
    seconds: float = 0.0
    bytes: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, mark: Mapping[str, Any], *, is_done: bool) -> None:
        self.done += is_done
        self.samples += int(mark.get("count", 0))
        self.seconds += float(mark.get("seconds", mark.get("duration", 0)))
        self.bytes += int(mark.get("bytes", 0))
        for remark, count in (mark.get("notes") or {}).items():
            if count:
                self.notes[remark] = self.notes.get(remark, 0) + int(count)
        failed = mark.get("failed")  # in shards it is a count
        if isinstance(failed, dict):
            for key, reason in islice(failed.items(), NUM_EXAMPLES - len(self.left_out)):
                self.left_out[str(key)] = str(reason)


def _marks(
    folder: Path, files: Mapping[str, int], problems: list[str]
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Each done mark of an artifact: its unit, the length of the file that it marks, and its content.

    ``000012.json`` marks a unit, ``train/000012_stats.json`` a shard and ``done.json`` a training.
    """
    if "done.json" in files:
        yield f"{0:06d}", files.get("encoder.safetensors"), read_object(folder / "done.json", problems)
    for name, mark in read_objects(folder, [f"{unit}.json" for unit in _numbers(files, ".json")], problems):
        unit = name.removesuffix(".json")
        yield unit, files.get(f"{unit}.tar"), mark
    for split in _SPLITS:
        inner = listing(folder / split)
        names = [f"{shard}_stats.json" for shard in _numbers(inner, "_stats.json")]
        for name, mark in read_objects(folder / split, names, problems):
            shard = name.removesuffix("_stats.json")
            yield f"{split}/{shard}", inner.get(f"{shard}.tar"), mark


def _numbers(files: Iterable[str], ending: str) -> list[str]:
    """The numbers of the files whose names are a number and ``ending``, in order."""
    stems = (name.removesuffix(ending) for name in files if name.endswith(ending))
    return sorted(stem for stem in stems if stem.isascii() and stem.isdecimal())


def _is_done(length: int, mark: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether the file has the length in its mark, and was written with the present settings."""
    counts = [mark.get(name, 0) for name in ("count", "bytes", "seconds", "duration")]
    notes = mark.get("notes") or {}
    sane = isinstance(notes, dict) and all(is_number(one) and math.isfinite(one) for one in (*counts, *notes.values()))
    return sane and mark.get("fingerprint") == entry.get("fingerprint") and mark.get("bytes", length) == length


def _plan(
    run: Run, artifact: str, entry: Mapping[str, Any], units: Sequence[int]
) -> tuple[int | None, Mapping[int, int]]:
    """How many units the stage plans (None if it cannot say), and how many samples each of ``units`` needs.

    See :meth:`~synthgen.stages.Stage.min_samples`. Any error is ignored: a status is wanted also if an input is lost,
    or if this installation does not have the stage.
    """
    planned: int | None = None
    min_samples: Mapping[int, int] = {}
    with suppress(Exception):
        stage = build(STAGES.load(str(entry["stage"])), entry["settings"], where=str(entry["stage"]))
        with suppress(Exception):
            planned = stage.num_units(run)
        min_samples = stage.min_samples(run, artifact, units)
    return planned, min_samples
