"""Worker processes of this machine: what is done when one is killed, or its device fails, is decided here."""

from __future__ import annotations

import copy
import logging
import multiprocessing as mp
import os
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from synthgen.engines import Listener
from synthgen.engines._work import DeviceFailed, opened
from synthgen.errors import SynthgenError, TooLittleMemory, one_line
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker

__all__ = ["UNSURE", "Crew"]

logger = logging.getLogger(__name__)

STRIKES = 3  # units in a row that end a worker; then it is not the units
UNSURE = "tried twice on one device, which failed"  # so begins the reason where no other device could tell
_PATIENCE = 30.0  # seconds that a process has to end in order, once it has no more to say
_KILLED = "killed, or out of memory"


@dataclass(eq=False)
class _Hand:
    """A worker process, as its parent sees it."""

    index: int  # in its team
    device: str
    process: BaseProcess
    line: Connection[Any, Any]  # to it: units, then None; from it: None (ready), progress, reports, what ended it
    unit: int | None = None  # what it works on
    opened: bool = False
    dismissed: bool = False
    failed: DeviceFailed | None = None
    refused: TooLittleMemory | None = None  # why it could not be opened

    def give(self, unit: int) -> None:
        self.unit = unit
        with suppress(OSError):  # it is lost, and the line will say so
            self.line.send(unit)

    def dismiss(self) -> None:
        self.dismissed = True
        with suppress(OSError):
            self.line.send(None)

    def end(self) -> None:
        self.line.close()
        self.process.join(_PATIENCE)
        if self.process.is_alive():  # a driver that hangs
            self.process.kill()
            self.process.join()


class Crew:
    """The worker processes of one call.

    A unit whose worker ends (it was killed, or its device failed) is put aside while the others are made, and then
    tried once more: by a fresh worker, alone, on another device if there is one. A worker that has ended on a unit is
    begun again, unless it did so ``STRIKES`` times in a row. That one, and one that ends while it loads, is left out;
    if a device was the reason, so is the device.

    Processes are numbered from ``rank``, of ``size`` workers in all; 0: of those at work.
    """

    def __init__(
        self, stage: Stage, run: Run, listener: Listener, devices: Sequence[str], *, rank: int = 0, size: int = 0
    ) -> None:
        self.stage, self.run, self.listener, self.devices = stage, run, listener, devices
        self.rank, self.size = rank, size
        self.spent: DeviceFailed | None = None  # why this process computes no more
        self._broken: dict[str, DeviceFailed] = {}
        self._aside: dict[int, tuple[str, DeviceFailed | None]] = {}  # unit → the device where a worker ended on it

    def make(self, units: Iterable[int], count: int = 1, here: Work | None = None) -> Iterator[Report]:
        """A report for each unit, as they come, by ``count`` processes; by ``here`` in this one while its device works.

        Raises:
            DeviceFailed: no device is left that works.
            SynthgenError, or whatever else the stage could not be opened for: no unit can be made.
        """
        left = deque(units)
        if here is not None and self.spent is None:
            yield from self._in_this_process(left, here)
        while left:
            devices = self._working()
            yield from self._team(left, [devices[n % len(devices)] for n in range(min(count, len(left)))])
            count = max(1, count // 2)  # if any are left, every worker of the team was left out
        aside, self._aside = self._aside, {}
        for unit, (device, _) in aside.items():
            alone = deque([unit])
            while alone:
                devices = self._working()
                yield from self._team(alone, [next((other for other in devices if other != device), devices[0])])
            if unit in self._aside:
                yield _given_up(unit, device, *self._aside.pop(unit))

    def _in_this_process(self, left: deque[int], work: Work) -> Iterator[Report]:
        while left:
            unit = left.popleft()
            try:
                report = work(unit)
            except DeviceFailed as error:
                self.spent = error
                self._aside[unit] = (error.device, error)
                logger.warning("%s; going on in a fresh process", error.short)
                return
            yield report

    def _working(self) -> list[str]:
        """The devices that are not left out."""
        working = [device for device in self.devices if device not in self._broken]
        if not working:
            raise self._broken[self.devices[-1]]
        return working

    def _team(self, left: deque[int], devices: list[str]) -> Iterator[Report]:
        """Reports of the units ``left``, by a worker on each device, until none is left or every worker is left out."""
        hands: dict[Connection[Any, Any], _Hand] = {}
        strikes: Counter[int] = Counter()
        fits = False  # whether any worker of the team could be opened

        def begin(index: int) -> None:
            hand = _begin(index, devices[index], self.stage, self.run, self.rank + index, self.size or len(devices))
            hands[hand.line] = hand

        try:
            for index in range(len(devices)):
                begin(index)
            while hands:
                for line in wait(list(hands)):
                    hand = hands[line]  # type: ignore[index]
                    try:
                        told = hand.line.recv()
                    except (EOFError, OSError):
                        del hands[hand.line]
                        hand.end()
                        if hand.refused and not (fits or hands):
                            raise (self.spent or hand.refused) from None
                        if not hand.dismissed and self._goes_on(hand, strikes, len(devices), len(hands)) and left:
                            begin(hand.index)
                        continue
                    if isinstance(told, tuple):
                        getattr(self.listener, told[0])(told[1])
                    elif isinstance(told, DeviceFailed):
                        hand.failed = told
                    elif isinstance(told, TooLittleMemory) and not hand.opened:
                        hand.refused = told  # fewer workers may fit
                    elif isinstance(told, Exception):
                        if not hand.opened or hand.unit is not None:
                            raise self.spent or told  # this process holds its memory still: no wonder
                    else:
                        hand.opened = fits = True
                        if told is not None:
                            hand.unit = None
                            del strikes[hand.index]
                        if left:
                            hand.give(left.popleft())
                        else:
                            hand.dismiss()
                        if told is not None:
                            yield told
        finally:
            for hand in hands.values():
                hand.dismiss()
            for hand in hands.values():
                with suppress(EOFError, OSError):
                    while True:  # what it has still to say, or it would never end
                        hand.line.recv()
                hand.end()

    def _goes_on(self, hand: _Hand, strikes: Counter[int], many: int, others: int) -> bool:
        """Whether a worker that has ended is to be begun again; its unit is put aside.

        Raises:
            SynthgenError: it was killed though it was alone, and will be again.
        """
        reason = hand.failed.short if hand.failed else str(hand.refused or _KILLED)
        doing = f"loaded what {self.stage.name} needs"
        if hand.unit is not None:
            self._aside[hand.unit] = (hand.device, hand.failed)
            strikes[hand.index] += 1
            doing = f"worked on unit {hand.unit:06d}"
            if strikes[hand.index] < STRIKES:
                logger.warning("worker %d ended while it %s (%s)", self.rank + hand.index, doing, reason)
                return True
        if hand.failed:
            self._broken[hand.device] = hand.failed
        elif many == 1:
            if self.spent or hand.refused:
                raise self.spent or hand.refused  # type: ignore[misc]
            raise SynthgenError(
                f"a worker process ended while it {doing} ({reason}), also when it was alone; "
                "give it more memory, or a smaller model"
            )
        still = f"; {others} of {many} workers go on" if others else ""
        logger.warning(
            "worker %d is left out: it ended while it %s (%s)%s", self.rank + hand.index, doing, reason, still
        )
        return False


def _given_up(unit: int, first: str, second: str, failed: DeviceFailed | None) -> Report:
    """The report of a unit that ended two workers."""
    if failed is None:
        return Report(unit, error=f"a worker process ended ({_KILLED}); fewer --workers need less memory")
    about = UNSURE if first == second else "two devices failed on it, the last one"
    return Report(unit, error=f"{about}: {failed.short}", trace=failed.trace)


def _begin(index: int, device: str, stage: Stage, run: Run, rank: int, size: int) -> _Hand:
    context = mp.get_context("spawn")
    line, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, stage, run, rank, size, device))
    process.start()
    theirs.close()  # so that the line ends with the process
    return _Hand(index, device, process, line)


# -- in the worker process


def _serve(line: Connection[Any, Any], stage: Stage, run: Run, rank: int, size: int, device: str) -> None:
    """Open the stage, say so, and work on what is given until that is None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(what: str, count: int) -> None:
        line.send((what, count))

    worker = Worker(rank, size, device, tick=partial(tell, "advance"), skip=partial(tell, "skip"))
    try:
        with suppress(KeyboardInterrupt), opened(stage, run, worker) as work:
            line.send(None)
            while (unit := line.recv()) is not None:
                line.send(work(unit))
    except Exception as error:
        with suppress(OSError):
            line.send(_sendable(error))
    finally:
        line.close()


def _sendable(error: Exception) -> Exception:
    """The error as another process can read it: ours and the system's as they are, any other in words."""
    told: Exception = RuntimeError(f"{type(error).__name__}: {one_line(error)}")
    with suppress(Exception):
        if isinstance(error, SynthgenError | OSError) and type(copy.copy(error)) is type(error):  # made anew as there
            told = error
    if not isinstance(told, SynthgenError):
        told.add_note("".join(traceback.format_exception(error)))
    return told


def _end_with_parent() -> None:
    """A worker whose parent was killed must not linger: it would finish a unit that nobody asks for any more."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
