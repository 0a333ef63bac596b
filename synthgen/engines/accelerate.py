"""The processes that ``accelerate launch`` started, on one machine or many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from synthgen.devices import devices_for, place
from synthgen.engines import Listener
from synthgen.engines._crew import UNSURE, Crew
from synthgen.engines._work import opened
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker

__all__ = ["Accelerate"]

_AT_ONCE = 256  # units of others, at least, before it is asked again which of all are left
_LOOKS = 8  # times at most, or so, that this is asked: in a store it is a request for each unit of the plan


@dataclass(frozen=True, kw_only=True)
class Accelerate:
    """Work on this process's share of the units, as one of those that ``accelerate launch`` started.

    The processes say nothing to each other: number r of n (RANK and WORLD_SIZE) takes the units that leave r when
    divided by n, and then helps with what the others have not done yet, the farthest from where they are first. So each
    ends when all units are done, and a process that is lost leaves its share to the others. A unit that two of them
    make at the same time has the same bytes from both. When the device of a process fails, the process goes on with a
    fresh one of its own, which tries the unit once more; where that cannot work either, it ends.
    """

    collective: ClassVar = True

    def map(self, stage: Stage, run: Run, units: Sequence[int], listener: Listener) -> Iterator[Report]:
        """One report for each unit; those that other processes made have no samples.

        Raises:
            ConfigError: RANK and WORLD_SIZE hold no place.
            DeviceFailed: the device of this process does not work.
            SynthgenError, or whatever else the stage could not be opened for (no weights, say): no unit can be made.
        """
        here, devices = place(), devices_for(stage)
        worker = Worker(
            here.rank,
            here.size,
            devices[here.local_rank % len(devices)],
            tick=listener.advance,
            skip=listener.skip,
            describe=listener.describe,
        )
        before = _notes(stage, run)
        crew = Crew(stage, run, listener, [worker.device], rank=here.rank, size=here.size)
        with opened(stage, run, worker) as work:
            if stage.collective:
                yield from map(work, units)
                return
            yield from crew.make([unit for unit in units if unit % here.size == here.rank], here=work)
            fresh = {unit: note for unit, note in _notes(stage, run).items() if before.get(unit) != note}
            others = [unit for unit in units if unit % here.size != here.rank]
            others.sort(key=lambda unit: ((unit - here.rank) % here.size, -unit))
            step = max(_AT_ONCE, len(others) // _LOOKS)
            for start in range(0, len(others), step):
                chunk, left = others[start : start + step], set(stage.todo(run))
                sizes = stage.sizes(run, [unit for unit in chunk if unit not in left])
                mine = []
                for unit in chunk:
                    if unit not in left:
                        listener.skip(sizes[unit])
                        yield Report(unit)
                    elif unit in fresh and not stage.done(run, unit):  # tried by its own process just now
                        told = json.loads(fresh[unit][0].read_bytes())
                        if told["error"].startswith(UNSURE):  # it was that one's device, maybe
                            mine.append(unit)
                        else:
                            yield Report(unit, error=told["error"], trace=told["trace"])
                    else:
                        mine.append(unit)
                for report in crew.make(mine, here=work):
                    if report.unit in fresh and report.error.startswith(UNSURE):  # nobody is to try it a third time
                        report = replace(report, error=f"also {report.error}")
                    yield report


def _notes(stage: Stage, run: Run) -> dict[int, tuple[Path, int]]:
    """The units that failed when they were last tried: where that is noted, and since when."""
    found = {}
    for name in stage.artifacts():
        for path in run.folder(name).glob("[0-9]*.failed.json"):
            found[int(path.name.partition(".")[0])] = (path, path.stat().st_mtime_ns)
    return found
