"""How the command line shows progress: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from synthgen.devices import place
from synthgen.progress import Progress
from synthgen.rejected import FILTER, rejected_summary
from synthgen.run import Run
from synthgen.runner import Summary
from synthgen.stages import Stage
from synthgen.stages.evaluate import Evaluate
from synthgen.status.text import scores
from synthgen.text import counted, duration, plain

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = [
    "ConsoleProgress",
    "print_note",
    "print_result",
    "print_scores",
    "print_summary",
    "progress",
    "step_printer",
    "summary_line",
]

_RESULTS = {"shards": "shards", "pretrain": "encoder"}  # stage → what it writes for people and other programs


def summary_line(summary: Summary) -> str:
    """The summary of a stage in one line."""
    done = summary.units - summary.done_before
    if not done:
        many = f"all {summary.units} units were" if summary.units != 1 else "the one unit was"
        return f"{summary.stage}: nothing to do, {many} done"
    rate = summary.samples / summary.seconds if summary.seconds else 0.0
    parts = [f"{counted(summary.samples, 'samples')} in {duration(summary.seconds)} ({rate:.1f}/s)"]
    if summary.done_before:
        parts.append(f"{summary.done_before} of {summary.units} units were done before")
    parts += [counted(count, remark) for remark, count in summary.notes.items() if count]
    return f"{summary.stage}: {', '.join(parts)}"


def print_summary(summary: Summary) -> None:
    """Print :func:`summary_line` at once, before any later error; each of several processes adds its rank."""
    here = place()
    rank = f"[{here.rank} of {here.size}] " if here.size > 1 else ""
    print(f"{rank}{summary_line(summary)}", flush=True)


def print_note(text: str) -> None:
    """Print a note, if there is one; of several processes the first one does."""
    if text and not place().rank:
        print(plain(f"note: {text}"), flush=True)


def print_scores(run: Run, name: str = "") -> None:
    """Print the scores of a run's evaluations, or of the one called ``name``; of several processes the first one does.

    Rows are cut to the width of a terminal, but not in files and pipes.
    """
    if not place().rank:
        for line in scores(run, name, whole=not sys.stdout.isatty()):
            print(line)


def print_result(stage: Stage, run: Run) -> None:
    """Print where shards, an encoder or scores were written; of several processes the first one does."""
    if not place().rank:
        if isinstance(stage, Evaluate):
            print(f"scores: {stage.path(run)}", flush=True)
        elif stage.name == FILTER:
            print(f"rejected: {rejected_summary(run)}", flush=True)
        elif stage.name in _RESULTS:
            print(f"{_RESULTS[stage.name]}: {run.folder(*stage.artifacts())}", flush=True)


def step_printer(command: str) -> Callable[[str], None]:
    """A function that prints the steps of ``command`` to standard error on terminals; files get errors only."""

    def print_step(text: str) -> None:
        if sys.stderr.isatty():
            print(f"{command}: {plain(text)}", file=sys.stderr, flush=True)

    return print_step


def progress() -> Progress:
    """A bar in the first process of this machine, nothing in the others."""
    return Progress() if place().local_rank else ConsoleProgress()


class ConsoleProgress(Progress):
    """Progress on standard error, with rate and time left."""

    every_seconds = 10.0  # between two lines where there is no terminal

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._remark = ""

    def start(self, stage: str, total: int, done: int) -> None:
        """Start a bar at ``done`` of ``total`` samples."""
        self._stage, self._total, self._done, self._before = stage, total, done, done
        self._measured = False
        self._started = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(), TextColumn("{task.fields[remark]}"),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(stage, total=total, completed=done, rate="", remark="")
            self._bar.start()

    def advance(self, count: int) -> None:
        """Move on by ``count`` samples."""
        self._done += count
        now = time.monotonic()
        if not self._measured:  # the time before the first samples went into loading libraries and models
            self._measured, self._started, self._before = True, now, self._done
        rate = (self._done - self._before) / max(now - self._started, 1e-6)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{_rate_text(rate)}/s" if rate else "")
        elif rate and now - self._printed >= self.every_seconds:
            self._printed = now
            left = duration((self._total - self._done) / rate)
            text = f", {self._remark}" if self._remark else ""
            print(
                f"{self._stage}: {self._done}/{self._total}, {_rate_text(rate)}/s, {left} left{text}", file=sys.stderr
            )

    def skip(self, count: int) -> None:
        """Move on by ``count`` samples that were made before; the rate is that of the samples from here on."""
        self._done += count
        self._started, self._before = time.monotonic(), self._done

    def describe(self, text: str) -> None:
        """Put a remark beside the bar."""
        self._remark = text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, remark=text)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _rate_text(rate: float) -> str:
    """A rate with two significant digits, or all digits before the point."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
