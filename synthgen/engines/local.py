"""Processes of this machine."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, ClassVar

from synthgen.devices import devices_for
from synthgen.engines import Listener
from synthgen.engines._work import opened
from synthgen.errors import SynthgenError
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.stores import is_in_memory

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

__all__ = ["Local"]

_AHEAD = 8  # units a worker that are given to the pool: a million at once would take 2 GB


@dataclass(frozen=True, kw_only=True)
class Local:
    """Deal units out to ``workers`` processes: by default one for every GPU, or for every core where there is none.

    Each worker of a stage computes with one thread, so the number of workers changes no byte of the result. When one is
    killed (for lack of memory, say), the units that were being worked on are tried one at a time, and the one that ends
    its worker again is the one that failed. A worker that is alone and ends before it has begun with any ends the call.
    """

    collective: ClassVar = True

    workers: int = 0  # 0: as many as there are GPUs, or cores

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (as many as fit) or more, not {self.workers}")

    def map(self, stage: Stage, run: Run, units: Sequence[int], listener: Listener) -> Iterator[Report]:
        """One report for each unit, as they come.

        Raises:
            SynthgenError, or whatever else the stage could not be opened for (no weights, say, or too little memory
                for them): no unit can be made.
        """
        devices = devices_for(stage)
        count = min(self.workers or len(devices), len(units))
        if stage.collective or count <= 1 or is_in_memory(run.path):
            worker = Worker(device=devices[0], tick=listener.advance, skip=listener.skip, describe=listener.describe)
            with opened(stage, run, worker) as work:
                yield from map(work, units)
            return
        left = dict.fromkeys(units)
        while left:
            for report in _pool(stage, run, list(left), devices, count, listener, threading.Event()):
                del left[report.unit]
                yield report
            for unit in list(left)[:count]:  # a worker was killed: these were being worked on
                ready = threading.Event()
                reports = list(_pool(stage, run, [unit], devices, 1, listener, ready))
                if not reports and not ready.is_set():
                    raise SynthgenError(
                        f"a worker process ended while it loaded what {stage.name} needs (killed, or out of memory), "
                        "also when it was alone; give it more memory, or a smaller model"
                    )
                reason = "a worker process ended (killed, or out of memory); fewer --workers need less memory"
                del left[unit]
                yield reports[0] if reports else Report(unit, error=reason)


def _pool(
    stage: Stage,
    run: Run,
    units: Sequence[int],
    devices: list[str],
    count: int,
    listener: Listener,
    ready: threading.Event,
) -> Iterator[Report]:
    """A report for each unit as they come; when a worker is killed, for those that had ended before.

    ``ready`` is set when a worker has opened the stage, or has told why it cannot be opened.
    """
    context = mp.get_context("spawn")
    heard, ticks = context.Pipe(duplex=False)  # not a queue: its lock would stay taken when a worker is killed
    ranks: SimpleQueue[int] = context.SimpleQueue()
    for rank in range(count):
        ranks.put(rank)
    ended = threading.Event()
    relay = threading.Thread(target=_relay, args=(heard, listener, ready, ended), daemon=True)
    relay.start()
    initargs = (stage, run, ranks, ticks, devices, count)
    try:
        with ProcessPoolExecutor(count, mp_context=context, initializer=_open, initargs=initargs) as pool:
            try:
                left = iter(units)
                doing = {pool.submit(_work, unit) for unit in islice(left, _AHEAD * count)}
                while doing:
                    done, doing = wait_for(doing, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda future: future.exception() is not None):
                        yield future.result()  # that of a lost worker last
                    doing |= {pool.submit(_work, unit) for unit in islice(left, len(done))}
            except BrokenProcessPool:
                return
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        ended.set()
        relay.join()


def _relay(heard: Connection[Any, int], listener: Listener, ready: threading.Event, ended: threading.Event) -> None:
    while heard.poll(0.1) or not ended.is_set():
        if heard.poll():
            count = heard.recv()
            ready.set()
            listener.advance(count)


# -- in the worker process

_STATE: dict[str, Any] = {}


def _open(stage: Stage, run: Run, ranks: Any, ticks: Any, devices: list[str], count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank = ranks.get()
    worker = Worker(rank, count, devices[rank % len(devices)], tick=ticks.send, skip=ticks.send)
    stack = ExitStack()
    Finalize(None, stack.close, exitpriority=1)  # while threads can still be begun, which a store's client does
    try:
        _STATE["work"] = stack.enter_context(opened(stage, run, worker))
    except Exception as error:  # raised by the first unit: an initializer that raises would only break the pool
        _STATE["error"] = error
    ticks.send(0)  # it is ready


def _work(unit: int) -> Report:
    if "error" in _STATE:
        raise _STATE["error"]
    report: Report = _STATE["work"](unit)
    return report


def _end_with_parent() -> None:
    """A worker whose parent was killed must not linger: it would wait for units for ever."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
