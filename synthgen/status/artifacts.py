"""The progress of each artifact of a run, from its done marks and the run's manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from synthgen.config import build
from synthgen.run import Run
from synthgen.stages import STAGES, Stage
from synthgen.status.reading import is_number, read_object, read_objects
from synthgen.stores import listing
from synthgen.units import rows_of

__all__ = ["FEW", "ArtifactStatus", "artifact_status"]

FEW = 3  # samples that are named as examples
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
    left_out: dict[str, str] = field(default_factory=dict)  # key → reason, of the first few samples that were left out
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples per second of one worker; 0 without a measured time."""
        return self.samples / self.seconds if self.seconds else 0.0


Hear = Callable[[str, Mapping[str, Any]], None]  # called with the stem of a done file, such as "000012", and its mark


def artifact_status(
    run: Run,
    name: str,
    entry: Mapping[str, Any],
    earlier: Mapping[str, ArtifactStatus],
    problems: list[str],
    hear: Hear = lambda stem, mark: None,
) -> ArtifactStatus:
    """The progress of an artifact. ``hear`` is called with each done mark; only one is held at a time."""
    folder = run.folder(name)
    files = listing(folder)
    failures = {}
    for file in sorted(files):
        if (unit := file.removesuffix(".failed.json")).isdecimal() and unit != file:
            failures[int(unit)] = str(read_object(folder / file, problems).get("error", "no reason was recorded"))
    sums = _Sums()
    known = {f"{unit:06d}" for unit in failures}
    stage = _stage_of(entry)
    least = _least(
        run, name, stage, [int(file[:-5]) for file in files if file.endswith(".json") and file[:-5].isdecimal()]
    )
    for stem, length, mark in _marks(folder, files, problems):
        known.add(stem)
        if length is not None and _is_done(length, mark, entry):
            is_whole = not stem.isdecimal() or rows_of(mark) >= least.get(int(stem), 0)  # or the run has grown since
            sums.add(mark, is_whole)
            if stem.isdecimal() and is_whole:
                failures.pop(int(stem), None)  # done by a later attempt
            hear(stem, mark)
    planned = _planned(run, stage)
    if planned is None:  # a stage mostly has as many units as its inputs
        inputs = [earlier[given].planned for given in entry.get("inputs", {}) if given in earlier]
        planned = max([len(known), *inputs])
    return ArtifactStatus(
        name,
        str(entry.get("stage", name)),
        sums.done,
        max(planned, sums.done),
        sums.samples,
        round(sums.seconds, 3),
        sums.bytes,
        sums.notes,
        failures,
        sums.left_out,
        dict(entry.get("settings") or {}),
        dict(entry.get("versions") or {}),
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

    def add(self, mark: Mapping[str, Any], is_whole: bool) -> None:
        self.done += is_whole
        self.samples += int(mark.get("count", 0))
        self.seconds += float(mark.get("seconds", mark.get("duration", 0)))
        self.bytes += int(mark.get("bytes", 0))
        for remark, count in (mark.get("notes") or {}).items():
            if count:
                self.notes[remark] = self.notes.get(remark, 0) + int(count)
        failed = mark.get("failed")  # in shards it is a count
        for key, reason in islice(failed.items(), FEW - len(self.left_out)) if isinstance(failed, dict) else ():
            self.left_out[str(key)] = str(reason)


def _marks(
    folder: Path, files: Mapping[str, int], problems: list[str]
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Each done mark of an artifact: its unit, the length of the file that it marks, and its content.

    ``000012.json`` marks a unit, ``train/000012_stats.json`` a shard and ``done.json`` a training.
    """
    names = [name for name in sorted(files) if name == "done.json" or (name.endswith(".json") and name[:-5].isdigit())]
    for name, mark in read_objects(folder, names, problems):
        whole = "encoder.safetensors" if name == "done.json" else f"{name[:-5]}.tar"
        yield f"{0:06d}" if name == "done.json" else name[:-5], files.get(whole), mark
    for split in _SPLITS:
        inner = listing(folder / split)
        names = [name for name in sorted(inner) if name.endswith("_stats.json") and name[:-11].isdigit()]
        for name, mark in read_objects(folder / split, names, problems):
            yield f"{split}/{name[:-11]}", inner.get(f"{name[:-11]}.tar"), mark


def _is_done(length: int, mark: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether the file has the length in its mark, and was written with the present settings."""
    counts = [mark.get(name, 0) for name in ("count", "bytes", "seconds", "duration")]
    notes = mark.get("notes") or {}
    sane = isinstance(notes, dict) and all(is_number(one) and math.isfinite(one) for one in (*counts, *notes.values()))
    return sane and mark.get("fingerprint") == entry.get("fingerprint") and mark.get("bytes", length) == length


def _stage_of(entry: Mapping[str, Any]) -> Stage | None:
    """The stage that made an artifact, or None if it cannot be rebuilt from the manifest."""
    try:
        name = str(entry["stage"])
        return build(STAGES.load(name), entry["settings"], where=name)
    except Exception:  # a stage of another version: status must still answer
        return None


def _planned(run: Run, stage: Stage | None) -> int | None:
    """How many units the stage plans, or None if nobody can tell."""
    try:
        return None if stage is None else stage.planned(run)
    except Exception:  # a lost input
        return None


def _least(run: Run, artifact: str, stage: Stage | None, units: Sequence[int]) -> Mapping[int, int]:
    """How many samples each unit must hold to be done (see :meth:`~synthgen.stages.Stage.least`), as far as known."""
    try:
        return {} if stage is None else stage.least(run, artifact, units)
    except Exception:  # a lost input
        return {}
