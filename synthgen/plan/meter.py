"""What work costs: a stage does its part of a sample in a process of its own, and time and memory are read off it."""

from __future__ import annotations

import gc
import multiprocessing as mp
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthgen.devices import devices_for
from synthgen.errors import SynthgenError
from synthgen.progress import Progress
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.text import counted

__all__ = ["Meter", "Took", "in_a_process"]


@dataclass(frozen=True, slots=True)
class Took:
    """What a stage took for its part of the sample."""

    rounds: tuple[float, ...]  # seconds a sample, in each round
    samples: int  # in all rounds
    batch: int  # samples that were worked on together
    start_seconds: float  # from a new process to its first sample
    device: str
    memory: int  # bytes at the peak: of torch's on a GPU, else of the process beyond its start
    parts: tuple[str, ...] = ()  # what the figures stand on besides images: what was measured of each, and how far
    held: int = 0  # bytes of that memory that the sample did not take, and that all images will
    files: int = 0  # bytes of what was written, where these do not grow with the images

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is that of a GPU."""
        return self.device.startswith("cuda")

    @property
    def sample(self) -> str:
        """What was measured."""
        return f"{counted(self.samples, 'images')} in {counted(len(self.rounds), 'rounds')}"

    @property
    def basis(self) -> str:
        """What the figures stand on."""
        return "; ".join([self.sample, *self.parts])


def in_a_process(measure: Callable[..., Took], *given: Any) -> Took:
    """What ``measure`` says of ``given`` and a :class:`Meter`, called in a fresh process.

    Raises:
        SynthgenError: what it raised, or that its process was lost.
    """
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, measure, given, time.time()))
    process.start()
    theirs.close()
    try:
        answer: Took | SynthgenError = ours.recv()
    except EOFError:
        answer = SynthgenError("its process was killed, or out of memory")
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(answer, SynthgenError):
        raise answer
    return answer


def _answer(pipe: Any, measure: Callable[..., Took], given: tuple[Any, ...], spawned: float) -> None:
    try:
        pipe.send(measure(*given, Meter(spawned)))
    except SynthgenError as error:
        pipe.send(error)
    except Exception as error:  # as engines tell what goes wrong with a unit
        pipe.send(SynthgenError(f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"))


class Meter:
    """Time and memory of this process; made before anything heavy is imported."""

    def __init__(self, spawned: float) -> None:
        self._spawned, self._before = spawned, _resident()["VmRSS"]
        self.start_seconds = 0.0

    def work(self, stage: Stage, run: Run, progress: Progress | None = None) -> list[float]:
        """Do ``stage``; the seconds of each unit."""
        stage = stage.complete()
        taken = []
        with run.claim(stage) as claimed:
            stage = stage.prepare(claimed)
            worker = Worker(device=devices_for(stage)[0], progress=progress or Progress())
            with stage.open(claimed, worker) as work:
                self.start_seconds = self.start_seconds or time.time() - self._spawned
                for unit in stage.plan(claimed):
                    started = time.perf_counter()
                    work(unit)
                    taken.append(time.perf_counter() - started)
            stage.finish(claimed)
        gc.collect()  # what was loaded for one image need not stay beside what is loaded for many
        return taken

    def memory(self, device: str) -> int:
        """Bytes at the peak."""
        if device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_reserved(device))
        return _resident()["VmHWM"] - self._before


def _resident() -> dict[str, int]:
    """Main memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak (elsewhere than on Linux both)."""
    try:
        told = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        pairs = (line.split(":") for line in told.splitlines() if line.startswith("Vm"))
        return {name: int(value.split()[0]) * 1024 for name, value in pairs}
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"VmRSS": peak, "VmHWM": peak}
