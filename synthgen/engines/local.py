"""Processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from synthgen.devices import devices_for
from synthgen.engines import Listener
from synthgen.engines._crew import Crew
from synthgen.engines._work import opened
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.stores import is_in_memory

__all__ = ["Local"]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Deal units out to ``workers`` processes: by default one for every GPU, or for every core where there is none.

    Each worker of a stage computes with one thread, so the number of workers changes no byte of the result. One alone
    is this process. When one is killed (for lack of memory, say) or its GPU fails, the unit that it was working on is
    tried once more, alone and on another GPU if there is one, and is the one that failed if it ends that worker too.
    Workers that cannot go on are left out; when none is left the call ends.
    """

    collective: ClassVar = True

    workers: int = 0  # 0: as many as there are GPUs, or cores

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (as many as fit) or more, not {self.workers}")

    def map(self, stage: Stage, run: Run, units: Sequence[int], listener: Listener) -> Iterator[Report]:
        """One report for each unit, as they come.

        Raises:
            DeviceFailed: no device is left that works.
            SynthgenError, or whatever else the stage could not be opened for (no weights, say, or too little memory
                for them): no unit can be made.
        """
        devices = devices_for(stage)
        count = min(self.workers or len(devices), len(units))
        here_alone = stage.collective or is_in_memory(run.path)
        crew = Crew(stage, run, listener, devices)
        if not here_alone and count > 1:
            yield from crew.make(units, count)
            return
        worker = Worker(device=devices[0], tick=listener.advance, skip=listener.skip, describe=listener.describe)
        with opened(stage, run, worker) as work:
            yield from map(work, units) if here_alone else crew.make(units, here=work)
