"""The processes that ``accelerate launch`` started, on one machine or many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from synthgen.devices import devices_for, place
from synthgen.engines._work import open_stage
from synthgen.engines._worker_pool import WorkerPool
from synthgen.entries import FAILED
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker

__all__ = ["Accelerate"]

_MIN_CHUNK = 256  # units of other processes, at least, between two lookups of which units are done
_MAX_LOOKUPS = 8  # about so many lookups: in a store each is a request for every unit of the plan


@dataclass(frozen=True, kw_only=True)
class Accelerate:
    """Work on this process's share of the units, as one of those that ``accelerate launch`` started.

    The processes do not communicate: number r of n (RANK and WORLD_SIZE) takes the units that leave r when divided by
    n, and then helps with what the others have not done yet, the farthest from where they are first. So each ends when
    all units are done, and a process that is lost leaves its share to the others. A unit that two of them make at the
    same time has the same bytes from both. When the device of a process fails, a fresh process takes its place and
    retries the unit; where that one fails too, the process ends.
    """

    collective: ClassVar = True

    def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
        """One report for each unit; those that other processes made have no samples.

        Raises:
            ConfigError: RANK and WORLD_SIZE are not the place of a process.
            DeviceFailed: the device of this process failed.
            SynthgenError: the stage cannot be opened (no weights, say). Other errors of opening it are raised as they
                are.
        """
        here, devices = place(), devices_for(stage)
        worker = Worker(here.rank, here.size, devices[here.local_rank % len(devices)], progress)
        earlier = _failure_notes(stage, run)
        pool = WorkerPool(stage, run, progress, [worker.device], rank=here.rank, size=here.size)
        with open_stage(stage, run, worker) as work:
            if stage.collective:
                yield from map(work, units)
                return
            yield from pool.map([unit for unit in units if unit % here.size == here.rank], own_work=work)
            notes = _failure_notes(stage, run)  # now those of this call: each other process has tried its own units
            failed = {unit: note[0] for unit, note in notes.items() if earlier.get(unit) != note}
            others = [unit for unit in units if unit % here.size != here.rank]
            others.sort(key=lambda unit: ((unit - here.rank) % here.size, -unit))
            step = max(_MIN_CHUNK, len(others) // _MAX_LOOKUPS)
            for start in range(0, len(others), step):
                chunk, todo = others[start : start + step], set(stage.todo(run))
                sizes = stage.sizes(run, [unit for unit in chunk if unit not in todo])
                own = []
                for unit in chunk:
                    if unit not in todo:
                        progress.skip(sizes[unit])
                        yield Report(unit)
                    elif unit in failed and not stage.done(run, unit):
                        report = _read_failure(failed[unit], unit)
                        if report.device_suspect:
                            own.append(unit)
                        else:
                            yield report
                    else:
                        own.append(unit)
                for report in pool.map(own, own_work=work):
                    if report.device_suspect and report.unit in failed:  # on the devices of two processes: so the unit
                        report = replace(report, error=f"also {report.error}", device_suspect=False)
                    yield report


def _failure_notes(stage: Stage, run: Run) -> dict[int, tuple[Path, int]]:
    """The units that failed when they were last tried: the file that says so, and when it was written."""
    found = {}
    for name in stage.artifacts():
        for path in run.folder(name).glob(f"[0-9]*{FAILED}"):
            found[int(path.name.partition(".")[0])] = (path, path.stat().st_mtime_ns)
    return found


def _read_failure(path: Path, unit: int) -> Report:
    """The report that ``Run.fail`` wrote down."""
    note = json.loads(path.read_bytes())
    return Report(unit, error=note["error"], trace=note["trace"], device_suspect=note.get("device_suspect", False))
