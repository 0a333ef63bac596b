"""Processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from synthgen.devices import devices_for
from synthgen.engines._work import open_stage
from synthgen.engines._worker_pool import WorkerPool
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.stores import is_in_memory

__all__ = ["Local"]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Distribute units over ``workers`` processes: by default one for every GPU, or for every core without GPUs.

    Each worker of a stage computes with one thread, so the number of workers changes no byte of the result. A single
    worker is this process. When a worker is killed (for lack of memory, say) or its GPU fails, its unit is retried
    once, alone and on another GPU if there is one, and is reported as failed if that worker ends too. Workers that
    cannot go on are left out; when none is left the call ends.
    """

    collective: ClassVar = True

    workers: int = 0  # 0: as many as there are GPUs, or cores

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (as many as fit) or more, not {self.workers}")

    def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
        """One report for each unit, in the order in which they are done.

        Raises:
            DeviceFailed: all devices failed.
            SynthgenError: workers cannot open the stage (no weights, say, or too little memory for them), or the only
                one is killed again and again. Other errors of opening the stage are raised as they are.
        """
        devices = devices_for(stage)
        num_workers = min(self.workers or len(devices), len(units))
        only_here = stage.collective or is_in_memory(run.path)
        pool = WorkerPool(stage, run, progress, devices)
        if not only_here and num_workers > 1:
            yield from pool.map(units, num_workers)
            return
        with open_stage(stage, run, Worker(device=devices[0], progress=progress)) as work:
            yield from map(work, units) if only_here else pool.map(units, own_work=work)
