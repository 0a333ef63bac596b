"""Time and memory of a stage that works on the sample, in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing as mp
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthgen.devices import devices_for
from synthgen.errors import SynthgenError, one_line
from synthgen.progress import Progress
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.text import counted

__all__ = ["Measurement", "Meter", "run_in_process"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a stage took for the sample."""

    rounds: tuple[float, ...]  # seconds an image, in each round
    images: int  # in all rounds
    batch: int  # images that were worked on together
    start_seconds: float  # from a new process to its first image
    device: str
    memory: int  # bytes at the peak: of torch's allocator on a GPU, else of the process beyond its start
    parts: tuple[str, ...] = ()  # what else was measured
    features: int = 0  # bytes of the features of all images, in addition

    @property
    def sample(self) -> str:
        """What was measured."""
        return f"{counted(self.images, 'images')} in {counted(len(self.rounds), 'rounds')}"


def run_in_process(measure: Callable[..., Measurement], *given: Any) -> Measurement:
    """The result of ``measure``, called with ``given`` and a :class:`Meter` in a fresh process.

    Raises:
        SynthgenError: ``measure`` failed, or its process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        try:
            return pool.submit(_call, measure, given, time.time()).result()
        except BrokenProcessPool:
            raise SynthgenError("its process was killed, or out of memory") from None


def _call(measure: Callable[..., Measurement], given: tuple[Any, ...], spawned: float) -> Measurement:
    try:
        return measure(*given, Meter(spawned))
    except SynthgenError:
        raise
    except Exception as error:
        raise SynthgenError(f"{type(error).__name__}: {one_line(error)}") from None


class Meter:
    """Time and memory of this process, since it was spawned."""

    def __init__(self, spawned: float) -> None:
        self._spawned, self._before = spawned, _resident()["VmRSS"]
        self.start_seconds = 0.0

    def mark_start(self) -> None:
        """Note when the first image can be worked on; later calls change nothing."""
        self.start_seconds = self.start_seconds or time.time() - self._spawned

    def work(self, stage: Stage, run: Run, progress: Progress | None = None) -> list[float]:
        """Run ``stage``; the seconds of each unit."""
        stage = stage.complete()
        taken = []
        with run.claim(stage) as claimed:
            stage = stage.prepare(claimed)
            worker = Worker(device=devices_for(stage)[0], progress=progress or Progress())
            with stage.open(claimed, worker) as work:
                self.mark_start()
                for unit in stage.plan(claimed):
                    started = time.perf_counter()
                    work(unit)
                    taken.append(time.perf_counter() - started)
            stage.finish(claimed)
        gc.collect()  # a model loaded for one image must not stay beside that of many
        return taken

    def memory(self, device: str) -> int:
        """Bytes at the peak."""
        if device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_reserved(device))
        return _resident()["VmHWM"] - self._before


def _resident() -> dict[str, int]:
    """Main memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak (both the peak if not on Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        pairs = (line.split(":") for line in lines if line.startswith("Vm"))
        return {name: int(value.split()[0]) * 1024 for name, value in pairs}
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"VmRSS": peak, "VmHWM": peak}
