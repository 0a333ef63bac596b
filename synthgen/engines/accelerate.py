"""The processes that ``accelerate launch`` started, on one machine or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from synthgen.devices import devices_for, place
from synthgen.engines._work import open_stage
from synthgen.engines._worker_pool import WorkerPool
from synthgen.entries import failure_files
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.untrusted import MAX_JSON, read_file, read_json

__all__ = ["Accelerate"]

_MIN_CHUNK = 256  # minimum number of other processes' units between two lookups of which units are done
_MAX_LOOKUPS = 8  # about so many lookups in total: in a store each requests every done mark of the plan


@dataclass(frozen=True, kw_only=True)
class Accelerate:
    """Work on this process's share of the units, as one of those that ``accelerate launch`` started.

    The processes do not communicate. Process r of n (RANK and WORLD_SIZE) makes the units whose number modulo n is r,
    then helps with the unfinished units of others, the last of each first. So each ends when all units are done, and
    the share of a killed process is made by the others. A unit that two of them make has the same bytes from both. If
    the device of a process fails, a new process replaces it and retries the unit; if that fails too, the process ends.
    """

    collective: ClassVar = True

    def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
        """One report for each unit; those that other processes made have no samples.

        Raises:
            ConfigError: RANK or WORLD_SIZE is invalid.
            DeviceFailed: the device of this process failed.
            SynthgenError: the stage cannot be opened, for example without weights. Other errors of opening it are
                raised unchanged.
        """
        here, devices = place(), devices_for(stage)
        worker = Worker(here.rank, here.size, devices[here.local_rank % len(devices)], progress)
        earlier = _failure_files(stage, run)
        pool = WorkerPool(stage, run, progress, [worker.device], rank=here.rank, size=here.size)
        with open_stage(stage, run, worker) as work:
            if stage.collective:
                yield from map(work, units)
                return
            yield from pool.map([unit for unit in units if unit % here.size == here.rank], own_work=work)
            files = _failure_files(stage, run)  # new ones are of this call, in which other processes tried their units
            failed = {unit: file[0] for unit, file in files.items() if earlier.get(unit) != file}
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
                        continue
                    report = _read_failure(failed[unit], unit) if unit in failed and not stage.done(run, unit) else None
                    if report is None or report.device_suspect:
                        own.append(unit)
                    else:
                        yield report
                for report in pool.map(own, own_work=work):
                    if report.device_suspect and report.unit in failed:  # on two devices: the unit is the cause
                        report = replace(report, error=f"also {report.error}", device_suspect=False)
                    yield report


def _failure_files(stage: Stage, run: Run) -> dict[int, tuple[Path, int]]:
    """The units that failed when they were last tried: the file that says why, and when it was written in ns."""
    found = {}
    for name in stage.artifacts():
        for path in failure_files(run.folder(name)):
            unit = path.name.partition(".")[0]
            with suppress(FileNotFoundError):  # another process has just made the unit
                if unit.isdecimal():
                    found[int(unit)] = (path, path.stat().st_mtime_ns)
    return found


def _read_failure(path: Path, unit: int) -> Report | None:
    """The report that :meth:`Run.fail` wrote; None if it is gone or damaged, so that the unit is tried again."""
    try:
        note = read_json(read_file(path, MAX_JSON))
        return Report(unit, **{name: note[name] for name in ("error", "trace", "device_suspect", "damaged")})
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
