"""Processes of this machine."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from synthgen.engines import Listener
from synthgen.errors import SynthgenError
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

__all__ = ["Local"]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Deal units out to ``workers`` processes: by default one for every GPU, or for every core where there is none.

    Each worker of a stage computes with one thread, so the number of workers changes no byte of the result.
    """

    workers: int = 0  # 0: as many as there are GPUs, or cores

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (as many as fit) or more, not {self.workers}")

    def map(self, stage: Stage, run: Run, units: Sequence[int], listener: Listener) -> Iterator[Report]:
        """One report for each unit, as they come.

        Raises:
            SynthgenError, or whatever else the stage could not be opened for (no weights, say): no unit can be made.
        """
        devices = devices_for(stage)
        count = min(self.workers or len(devices), len(units))
        if stage.collective or count <= 1:
            worker = Worker(device=devices[0], tick=listener.advance, skip=listener.skip, describe=listener.describe)
            with stage.open(run, worker) as work:
                for unit in units:  # where there is one unit, its error is the stage's
                    yield work(unit) if stage.collective else _guarded(work, unit)
            return
        context = mp.get_context("spawn")
        heard, ticks = context.Pipe(duplex=False)  # not a queue: its lock would stay taken when a worker is killed
        ranks: SimpleQueue[int] = context.SimpleQueue()
        for rank in range(count):
            ranks.put(rank)
        ended = threading.Event()
        relay = threading.Thread(target=_relay, args=(heard, listener, ended), daemon=True)
        relay.start()
        try:
            with ProcessPoolExecutor(
                count, mp_context=context, initializer=_open, initargs=(stage, run, ranks, ticks, devices, count)
            ) as pool:
                futures = {pool.submit(_work, unit): unit for unit in units}
                try:
                    for future in as_completed(futures):
                        try:
                            yield future.result()
                        except BrokenProcessPool:
                            reason = (
                                "a worker process ended (killed, or out of memory); fewer --workers need less memory"
                            )
                            yield Report(futures[future], error=reason)
                finally:
                    pool.shutdown(cancel_futures=True)
        finally:
            ended.set()
            relay.join()


def devices_for(stage: Stage) -> list[str]:
    """The device of each worker, where as many work as fit this machine."""
    cores = ["cpu"] * max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if not stage.accelerated:
        return cores
    import torch

    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else cores


def _guarded(work: Work, unit: int) -> Report:
    """Work on a unit; whatever goes wrong becomes its report, so that one bad unit does not end the job."""
    started = time.perf_counter()
    try:
        return work(unit)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        trace = "" if isinstance(error, SynthgenError) else traceback.format_exc()
        seconds = time.perf_counter() - started
        return Report(unit, seconds=seconds, error=f"{type(error).__name__}: {reason}", trace=trace)


def _relay(heard: Connection[Any, int], listener: Listener, ended: threading.Event) -> None:
    while heard.poll(0.1) or not ended.is_set():
        if heard.poll():
            listener.advance(heard.recv())


# -- in the worker process

_STATE: dict[str, Any] = {}


def _open(stage: Stage, run: Run, ranks: Any, ticks: Any, devices: list[str], count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank = ranks.get()
    worker = Worker(rank, count, devices[rank % len(devices)], tick=ticks.send)
    stack = ExitStack()
    atexit.register(stack.close)  # while there is still an interpreter to close it in
    try:
        _STATE["work"] = stack.enter_context(stage.open(run, worker))
    except Exception as error:  # raised by the first unit: an initializer that raises would only break the pool
        _STATE["error"] = error


def _work(unit: int) -> Report:
    if "error" in _STATE:
        raise _STATE["error"]
    return _guarded(_STATE["work"], unit)


def _end_with_parent() -> None:
    """A worker whose parent was killed must not linger: it would wait for units for ever."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
