"""A pool of worker processes on this machine that survives killed workers and failed devices."""

from __future__ import annotations

import copy
import logging
import multiprocessing as mp
import os
import pickle
import threading
import traceback
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from synthgen.engines._work import DeviceFailed, open_stage
from synthgen.errors import SynthgenError, TooLittleMemory, one_line
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker

__all__ = ["WorkerPool"]

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3  # units in a row that end one worker; then the worker is the cause, not the units
_JOIN_SECONDS = 30.0  # that a process has to exit by itself after its last message
_KILLED = "killed, or out of memory"


# -- messages of a worker process to its parent, which sends it the numbers of units, and None to stop it


@dataclass(frozen=True)
class Ready:
    """The stage is open."""


@dataclass(frozen=True)
class Progressed:
    """``count`` more samples are made or, if ``skipped``, were made by an earlier call."""

    count: int
    skipped: bool = False


@dataclass(frozen=True)
class Done:
    """The worker is done with its unit."""

    report: Report


@dataclass(frozen=True)
class Failed:
    """The worker ends."""

    error: Exception


Message = Ready | Progressed | Done | Failed


# -- in the parent process


@dataclass(eq=False)
class _WorkerProcess:
    """A worker process, as its parent sees it."""

    index: int  # among the workers that run together
    device: str
    process: BaseProcess
    conn: Connection[Any, Any]
    unit: int | None = None  # that it works on
    ready: bool = False
    stopping: bool = False
    error: DeviceFailed | TooLittleMemory | None = None  # why it ends

    def assign(self, units: deque[int]) -> None:
        """Send it the first of the ``units``, or stop it if there is none."""
        self.unit = units.popleft() if units else None
        if self.unit is None:
            self.stop()
        else:
            self._send(self.unit)

    def stop(self) -> None:
        """Let it exit when it is done with its unit."""
        self.stopping = True
        self._send(None)

    def join(self) -> None:
        """Wait until it has exited; kill it if it takes too long."""
        self.conn.close()
        self.process.join(_JOIN_SECONDS)
        if self.process.is_alive():  # a driver that hangs
            self.process.kill()
            self.process.join()

    def _send(self, unit: int | None) -> None:
        with suppress(OSError):  # the process is gone: the next ``recv`` raises
            self.conn.send(unit)


@dataclass(frozen=True)
class _LostWorker:
    """Why a worker ended while it worked on a unit."""

    device: str
    error: DeviceFailed | None  # None: it was killed


class WorkerPool:
    """The worker processes of one call.

    A unit whose worker ends (it was killed, or its device failed) is retried once, after all others: by a new worker,
    alone, on another device if there is one. A worker that ended on a unit is restarted, unless it did so
    ``MAX_CONSECUTIVE_FAILURES`` times in a row. Such a worker, and one that ends while it loads, is left out; if its
    device failed, so is the device.

    Args:
        devices: of the workers, in order; several workers may share one.
        rank: of the first worker.
        size: how many workers there are in all processes; 0: those that this pool runs at a time.
    """

    def __init__(
        self, stage: Stage, run: Run, progress: Progress, devices: Sequence[str], *, rank: int = 0, size: int = 0
    ) -> None:
        self.stage, self.run, self.progress, self.devices = stage, run, progress, devices
        self.rank, self.size = rank, size
        self.own_device_error: DeviceFailed | None = None  # why this process itself can compute no more
        self._failed_devices: dict[str, DeviceFailed] = {}
        self._to_retry: dict[int, _LostWorker] = {}  # by unit

    def map(self, units: Iterable[int], num_workers: int = 1, own_work: Work | None = None) -> Iterator[Report]:
        """One report for each unit, in the order in which they are done.

        Args:
            units: the numbers of the units.
            num_workers: how many processes work on them.
            own_work: works on units in this process, in place of the workers, until the device of this process fails.

        Raises:
            DeviceFailed: all devices failed.
            SynthgenError: workers cannot open the stage, or the only one is killed again and again. Other errors of
                opening the stage are raised as they are.
        """
        remaining = deque(units)
        if own_work is not None and self.own_device_error is None:
            yield from self._run_in_this_process(remaining, own_work)
        while remaining:
            devices = self._working_devices()
            count = min(num_workers, len(remaining))
            yield from self._run_workers(remaining, [devices[index % len(devices)] for index in range(count)])
            num_workers = max(1, num_workers // 2)  # if units remain, all workers were left out
        retries, self._to_retry = self._to_retry, {}
        for unit, first in retries.items():
            remaining = deque([unit])
            while remaining:
                devices = self._working_devices()
                device = next((other for other in devices if other != first.device), devices[0])
                yield from self._run_workers(remaining, [device])
            if unit in self._to_retry:
                yield _failure_report(unit, first, self._to_retry.pop(unit))

    def _run_in_this_process(self, units: deque[int], work: Work) -> Iterator[Report]:
        while units:
            unit = units.popleft()
            try:
                report = work(unit)
            except DeviceFailed as error:
                self.own_device_error = error
                self._to_retry[unit] = _LostWorker(error.device, error)
                logger.warning("%s; going on in a fresh process", error.problem)
                return
            yield report

    def _working_devices(self) -> list[str]:
        working = [device for device in self.devices if device not in self._failed_devices]
        if not working:
            raise self._failed_devices[self.devices[-1]]
        return working

    def _run_workers(self, units: deque[int], devices: list[str]) -> Iterator[Report]:
        """Reports of the ``units`` by one worker for each of ``devices``, until no unit or no worker is left.

        If the stage loads a network, the first worker opens it alone: weights are downloaded once, or one error says
        that they cannot be.
        """
        workers: dict[Connection[Any, Any], _WorkerProcess] = {}
        failures: Counter[int] = Counter()  # consecutive ones, by the worker's index
        any_ready = False

        def start(index: int) -> None:
            rank, size = self.rank + index, self.size or len(devices)
            worker = _start_worker(index, devices[index], self.stage, self.run, rank, size)
            workers[worker.conn] = worker

        not_started = deque(range(len(devices)))
        try:
            for _ in range(1 if self.stage.accelerated else len(devices)):
                start(not_started.popleft())
            while workers:
                for conn in wait(list(workers)):
                    worker = workers[conn]  # type: ignore[index]
                    try:
                        message: Message = worker.conn.recv()
                    except (EOFError, OSError):
                        del workers[worker.conn]
                        worker.join()
                        if isinstance(worker.error, TooLittleMemory) and not (any_ready or workers or not_started):
                            raise (self.own_device_error or worker.error) from None
                        if not worker.stopping:
                            restart = self._should_restart(worker, failures, len(devices), len(workers))
                            if restart and units:
                                start(worker.index)
                        if not_started and units and not workers:
                            start(not_started.popleft())
                        continue
                    match message:
                        case Progressed(count, skipped):
                            (self.progress.skip if skipped else self.progress.advance)(count)
                        case Ready():
                            any_ready = worker.ready = True
                            worker.assign(units)
                            while not_started and units:
                                start(not_started.popleft())
                        case Done(report):
                            del failures[worker.index]
                            worker.assign(units)
                            yield report
                        case Failed(error):
                            self._record_error(worker, error)
        finally:
            _stop_all(workers.values())

    def _record_error(self, worker: _WorkerProcess, error: Exception) -> None:
        """Keep the reason why a worker ends.

        Raises:
            Exception: no other worker would do better, so that the error ends the call.
        """
        if isinstance(error, DeviceFailed) or (isinstance(error, TooLittleMemory) and not worker.ready):
            worker.error = error  # another device may work, or fewer workers may fit
        elif not worker.ready or worker.unit is not None:
            raise self.own_device_error or error  # this process keeps its memory, which may be what the worker lacks

    def _should_restart(
        self, worker: _WorkerProcess, failures: Counter[int], num_workers: int, num_others: int
    ) -> bool:
        """Whether to restart a worker that has ended; its unit is kept for a retry.

        Raises:
            SynthgenError: it was killed although it was the only one, and would be again.
        """
        device_error = worker.error if isinstance(worker.error, DeviceFailed) else None
        reason = worker.error.problem if worker.error else _KILLED
        activity = f"loaded what {self.stage.name} needs"
        if worker.unit is not None:
            self._to_retry[worker.unit] = _LostWorker(worker.device, device_error)
            failures[worker.index] += 1
            activity = f"worked on unit {worker.unit:06d}"
            if failures[worker.index] < MAX_CONSECUTIVE_FAILURES:
                logger.warning("worker %d ended while it %s (%s)", self.rank + worker.index, activity, reason)
                return True
        if device_error:
            self._failed_devices[worker.device] = device_error
        elif num_workers == 1:
            raise (
                self.own_device_error
                or worker.error
                or SynthgenError(
                    f"a worker process ended while it {activity} ({reason}), also when it was alone; "
                    "give it more memory, or a smaller model"
                )
            )
        others = f"; {num_others} of {num_workers} workers go on" if num_others else ""
        logger.warning(
            "worker %d is left out: it ended while it %s (%s)%s", self.rank + worker.index, activity, reason, others
        )
        return False


def _failure_report(unit: int, first: _LostWorker, second: _LostWorker) -> Report:
    """The report of a unit on which two workers ended."""
    error = second.error
    if error is None:
        return Report(unit, error=f"a worker process ended ({_KILLED}); fewer --workers need less memory")
    same = first.device == second.device
    tried = "tried twice on one device, which failed" if same else "two devices failed on it, the last one"
    return Report(unit, error=f"{tried}: {error.problem}", trace=error.trace, device_suspect=same)


def _start_worker(index: int, device: str, stage: Stage, run: Run, rank: int, size: int) -> _WorkerProcess:
    context = mp.get_context("spawn")
    try:
        conn, child_conn = context.Pipe()
        process = context.Process(target=_worker_main, args=(child_conn, stage, run, rank, size, device))
        process.start()
    except OSError as error:
        raise SynthgenError(
            f"the process of worker {rank} cannot be started ({one_line(error)}); give fewer --workers, or raise the "
            "limits of processes and open files (ulimit -u, ulimit -n)"
        ) from None
    child_conn.close()  # so that ``recv`` raises EOFError when the process ends
    return _WorkerProcess(index, device, process, conn)


def _stop_all(workers: Collection[_WorkerProcess]) -> None:
    """Let the workers exit when they are done with their units; Ctrl-C meanwhile kills them, as one may hang."""
    try:
        for worker in workers:
            worker.stop()
        for worker in workers:
            with suppress(EOFError, OSError):
                while True:  # a process whose messages nobody reads may block in ``send`` for ever
                    worker.conn.recv()
            worker.join()
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.kill()
        raise


# -- in the worker process


class _SentProgress(Progress):
    """Sends the counts of samples to the parent process, but no remarks: those of several workers would mix."""

    def __init__(self, conn: Connection[Any, Any]) -> None:
        self._conn = conn

    def advance(self, count: int) -> None:
        self._conn.send(Progressed(count))

    def skip(self, count: int) -> None:
        self._conn.send(Progressed(count, skipped=True))


def _worker_main(conn: Connection[Any, Any], stage: Stage, run: Run, rank: int, size: int, device: str) -> None:
    """Open the stage and work on the units that the parent sends, until it sends None."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        worker = Worker(rank, size, device, _SentProgress(conn))
        with suppress(KeyboardInterrupt), open_stage(stage, run, worker) as work:
            conn.send(Ready())
            while (unit := conn.recv()) is not None:
                conn.send(Done(work(unit)))
    except Exception as error:
        with suppress(OSError):
            conn.send(Failed(_picklable(error)))
    finally:
        conn.close()


def _picklable(error: Exception) -> Exception:
    """An error that can be sent: errors of synthgen and of the system as they are, others as a RuntimeError."""
    sent: Exception = RuntimeError(f"{type(error).__name__}: {one_line(error)}")
    with suppress(Exception):
        if isinstance(error, SynthgenError | OSError) and type(copy.copy(error)) is type(error):  # as pickle makes it
            pickle.dumps(error)  # raises if one of its attributes cannot be sent
            sent = error
    if not isinstance(sent, SynthgenError):
        sent.add_note("".join(traceback.format_exception(error)))
    return sent


def _exit_with_parent() -> None:
    """Exit when the parent is killed: nobody needs the unit any more."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
