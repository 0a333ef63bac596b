"""The memory and time that many prompts cost before the first image.

``python benchmarks/prompts.py`` writes ``results/prompts.json`` in about two minutes; with ``--counts 10000000`` it
takes ten times as long and 8 GB of memory. ``block by block`` is the stage ``generate``; ``whole list`` is the same
stage with all prompts in memory. Measured are the command until its engine has the units, the same command again, and
a worker until it can request its first unit. Each runs in a process of its own, whose memory and time before it reads a
prompt are not counted. No model is loaded. The benchmark fails unless both contenders write the same copy of the
prompts and make the same requests.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

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

from _common import make_parser, write_result

from synthgen.prompt_copy import Content, content_of, ensure_copy
from synthgen.prompts import read_prompts, request_for
from synthgen.records import Prompt, Request
from synthgen.run import Run
from synthgen.stages.generate import Generate

LINE = "a photo of a [golden retriever] beside a [house number {}] in the evening\n"
UNITS = 16  # further units of a worker, evenly spaced


@dataclass(frozen=True)
class WholeList(Generate):
    """``generate`` with all prompts in memory, read once per process and looked up by their numbers."""

    def inputs(self, run: Run) -> dict[str, str]:
        """The hash of the prompts."""
        return {"prompts": content(self.prompts).sha256}

    def prepare(self, run: Run) -> Self:
        """Write the copy of the prompts."""
        ensure_copy(run.path, load_all(self.prompts), content(self.prompts))
        return self

    def requests(self, run: Run, unit: int) -> list[Request]:
        """The requests of one unit."""
        prompts = load_all(self.prompts)
        return [request_for(prompts, run.seed, unit, row, self.unit_size) for row in range(self.size(run, unit))]


@cache
def load_all(path: str) -> list[Prompt]:
    """All prompts of a file."""
    return read_prompts(path)


@cache
def content(path: str) -> Content:
    """The content of their copy."""
    return content_of(load_all(path))


CONTENDERS: dict[str, type[Generate]] = {"block by block": Generate, "whole list": WholeList}


def start_command(folder: str, stage: Generate) -> Run:
    """The work of a command until its engine has the units; returns the run that workers get."""
    with Run.create(folder).claim(stage) as run:
        stage = stage.prepare(run)
        plan, todo = stage.plan(run), stage.todo(run)
        sizes = stage.sizes(run, plan)
    if not len(plan) == len(todo) == len(sizes):
        raise SystemExit(f"{folder} has finished units")
    return run


def make_requests(run: Run, stage: Generate, units: list[int]) -> tuple[str, float, float]:
    """The requests of a worker: their hash, the seconds for the first unit, and the mean for each further unit."""
    digest, start = hashlib.sha256(), time.perf_counter()
    digest.update(repr(stage.requests(run, units[0])).encode())
    first = time.perf_counter() - start
    for unit in units[1:]:
        digest.update(repr(stage.requests(run, unit)).encode())
    return digest.hexdigest(), first, (time.perf_counter() - start - first) / (len(units) - 1)


def measure(function: Callable[..., Any], *arguments: Any) -> tuple[dict[str, float], Any]:
    """The seconds, processor seconds and megabytes of a call in a new process, and its result."""
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_here, args=(sender, function, arguments))
    process.start()
    sender.close()
    result: tuple[dict[str, float], Any] = receiver.recv()
    process.join()
    return result


def measure_here(sender: Connection[Any, Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The measured process."""
    memory, start, processor_start = resident("VmRSS"), time.perf_counter(), time.process_time()
    value = function(*arguments)
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor_start}
    sender.send((seconds | {"megabytes": max(0.0, resident("VmHWM") - memory)}, value))


def resident(name: str) -> float:
    """The memory of this process in MB: ``VmRSS`` is the current, ``VmHWM`` the peak value (Linux only)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def compare(count: int) -> dict[str, Any]:
    """Both contenders with ``count`` prompts."""
    figures: dict[str, Any] = {"prompts": count}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(LINE.format(number) for number in range(count))
        figures["file_bytes"] = path.stat().st_size
        requests, copies = set(), set()
        for name, kind in CONTENDERS.items():
            stage = kind(prompts=str(path)).complete()
            begin, run = measure(start_command, f"{folder}/{name}", stage)
            resume, _ = measure(start_command, f"{folder}/{name}", stage)
            last = -(-count // stage.unit_size) - 1
            units = [number * last // UNITS for number in range(UNITS + 1)]
            worker, (digest, first, each) = measure(make_requests, run, stage, units)
            figures[name] = {
                "begin": rounded(begin),
                "resume": rounded(resume),
                "worker": rounded(worker | {"seconds": first}),
                "unit_milliseconds": round(1e3 * each, 2),
            }
            print(count, name, figures[name], flush=True)
            requests.add(digest)
            copies.add((run.path / "prompts.jsonl").stat().st_size)
            (run.path / "prompts.jsonl").unlink()
    if len(requests) != 1 or len(copies) != 1:
        raise SystemExit("the contenders wrote different copies or made different requests")
    return figures


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000_000], help="numbers of prompts")
    args = parser.parse_args()
    figures = {"line_bytes": len(LINE), "sizes": [compare(count) for count in args.counts]}
    print(write_result("prompts", figures))


if __name__ == "__main__":
    main()
