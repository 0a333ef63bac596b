"""What many prompts cost before the first image: memory and time of the command that begins, and of each worker.

``python benchmarks/prompts.py`` writes ``results/prompts.json`` in about two minutes; with ``--counts 10000000`` it
takes ten times as long and 8 GB of memory. The other contender holds the list of all prompts. Both write the same copy
and make the same requests; no model is loaded, and each figure is of a process of its own, beyond what that took before
it read a prompt.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from _common import write_result

from synthgen.prompt_copy import Content, content_of, keep_copy
from synthgen.prompts import read_prompts, request_for
from synthgen.records import Prompt, Request
from synthgen.run import Run
from synthgen.stages.generate import Generate

LINE = "a photo of a [golden retriever] beside a [house number {}] in the evening\n"
UNITS = 16  # that a worker takes after the first, evenly apart


@dataclass(frozen=True)
class WholeList(Generate):
    """``generate`` if it held its prompts: read once in each process, and looked up by their numbers."""

    def inputs(self, run: Run) -> dict[str, str]:
        """The content of the copy."""
        return {"prompts": content(self.prompts).sha256}

    def prepare(self, run: Run) -> Self:
        """Write the copy."""
        keep_copy(run.path, held(self.prompts), content(self.prompts))
        return self

    def requests(self, run: Run, unit: int) -> list[Request]:
        """The images of one unit."""
        prompts = held(self.prompts)
        return [request_for(prompts, run.seed, unit, row, self.unit_size) for row in range(self.size(run, unit))]


@cache
def held(path: str) -> list[Prompt]:
    """All prompts of a file."""
    return read_prompts(path)


@cache
def content(path: str) -> Content:
    """What their copy holds."""
    return content_of(held(path))


CONTENDERS: dict[str, type[Generate]] = {"block by block": Generate, "whole list": WholeList}


def begin(folder: str, stage: Generate) -> Run:
    """What a command does until its engine has the units; the run as workers are given it."""
    with Run.create(folder).claim(stage) as run:
        stage = stage.prepare(run)
        plan, todo = stage.plan(run), stage.todo(run)
        sizes = stage.sizes(run, plan)
    if not len(plan) == len(todo) == len(sizes):
        raise SystemExit(f"{folder} had been begun before")
    return run


def ask(run: Run, stage: Generate, units: list[int]) -> tuple[str, float, float]:
    """A hash of all that a worker asks its backbone for; seconds before it can ask for the first unit, and for each
    unit after that.
    """
    told, began = hashlib.sha256(), time.perf_counter()
    told.update(repr(stage.requests(run, units[0])).encode())
    first = time.perf_counter() - began
    for unit in units[1:]:
        told.update(repr(stage.requests(run, unit)).encode())
    return told.hexdigest(), first, (time.perf_counter() - began - first) / (len(units) - 1)


def in_a_process(call: Callable[..., Any], *arguments: Any) -> tuple[dict[str, float], Any]:
    """Seconds, processor seconds and megabytes of a call in a fresh process, and what it returns."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, call, arguments))
    process.start()
    theirs.close()
    told: tuple[dict[str, float], Any] = ours.recv()
    process.join()
    return told


def answer(pipe: Connection[Any, Any], call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What the measured process does."""
    before, began, used = resident("VmRSS"), time.perf_counter(), time.process_time()
    value = call(*arguments)
    taken = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
    pipe.send((taken | {"megabytes": max(0.0, resident("VmHWM") - before)}, value))


def resident(name: str) -> float:
    """Main memory of this process in MB: ``VmRSS`` now, ``VmHWM`` at its peak. Only Linux tells."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def compare(count: int) -> dict[str, Any]:
    """Both contenders with so many prompts."""
    figures: dict[str, Any] = {"prompts": count}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(LINE.format(number) for number in range(count))
        figures["file_bytes"] = path.stat().st_size
        told, copies = set(), set()
        for name, kind in CONTENDERS.items():
            stage = kind(prompts=str(path)).complete()
            started, run = in_a_process(begin, f"{folder}/{name}", stage)
            again, _ = in_a_process(begin, f"{folder}/{name}", stage)
            last = -(-count // stage.unit_size) - 1
            worked, (said, first, each) = in_a_process(ask, run, stage, [n * last // UNITS for n in range(UNITS + 1)])
            figures[name] = {
                "begin": rounded(started),
                "resume": rounded(again),
                "worker": rounded(worked | {"seconds": first}),
                "unit_milliseconds": round(1e3 * each, 2),
            }
            print(count, name, figures[name], flush=True)
            told.add(said)
            copies.add((run.path / "prompts.jsonl").stat().st_size)
            (run.path / "prompts.jsonl").unlink()
    if len(told) != 1 or len(copies) != 1:
        raise SystemExit("the contenders did not do the same")
    return figures


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Two digits behind the point."""
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    """Measure both contenders and write the figures down."""
    parser = argparse.ArgumentParser(prog="python benchmarks/prompts.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000_000], help="prompts")
    args = parser.parse_args()
    figures = {"line_bytes": len(LINE), "sizes": [compare(count) for count in args.counts]}
    print(write_result("prompts", figures))


if __name__ == "__main__":
    main()
