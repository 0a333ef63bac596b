"""The cost of the engines: overhead of each unit, two workers against one, the status of a large run.

``python benchmarks/engines.py`` writes ``results/engines.json`` in under four minutes. A unit of the first part only
sleeps, so that a busy machine disturbs it little; the second wants two idle cores, and says beside the time what
processor time alone allows, which other work hardly changes. An engine that is not installed is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import multiprocessing as mp
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import numpy as np
from _common import write_result

from synthgen import api, codecs
from synthgen.config import Choice
from synthgen.engines import ENGINES
from synthgen.errors import MissingDependency
from synthgen.prompts import read_prompts
from synthgen.records import AFFINITY_OFFSETS, Generation, Maps, Report, Request, sample_key
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Stage, Work, Worker
from synthgen.status import status

WORKERS = 2
CALLS: dict[str, tuple[list[str], dict[str, Any]]] = {  # how each engine is started, and its options
    "local, 1 worker": ([sys.executable], {"name": "local", "workers": 1}),
    "local": ([sys.executable], {"name": "local", "workers": WORKERS}),
    "accelerate": (
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(WORKERS)],
        {"name": "accelerate"},
    ),
    "ray": ([sys.executable], {"name": "ray", "workers": WORKERS}),
}


@dataclass(frozen=True)
class Sleep(Stage):
    """Units that take a known time and write one small sample."""

    name: ClassVar = "sleep"
    reads: ClassVar = ()
    writes: ClassVar = ("sleep",)

    units: int = 20
    seconds: float = 1.0

    def plan(self, run: Run) -> list[int]:
        """All of them."""
        return list(range(self.units))

    def size(self, run: Run, unit: int) -> int:
        """One sample."""
        return 1

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Sleep, write, and record when the unit started and ended."""

        def work(unit: int) -> Report:
            began = time.time()
            with run.write("sleep", unit) as tar:
                time.sleep(self.seconds)
                tar.add(sample_key(unit, 0), {"txt": b"slept"})
            with open(run.path / f"times-{worker.rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps([unit, began, time.time()]) + "\n")
            return Report(unit, 1)

        yield work


def measure_overhead(name: str, units: int, seconds: float) -> dict[str, Any]:
    """The overhead of a unit, relative to its time; the seconds before the first unit and after the last."""
    call, options = CALLS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [*call, str(Path(__file__).resolve()), "--one", json.dumps([folder, options, units, seconds])]
        began = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        files = [path.read_text(encoding="utf-8").splitlines() for path in Path(folder).glob("times-*.jsonl")]
    rows = [[json.loads(line) for line in lines] for lines in files]
    gaps, inside = [], []
    for worker in rows:
        worker.sort(key=lambda row: row[1])
        inside += [stop - start - seconds for _, start, stop in worker]
        gaps += [after[1] - before[2] for before, after in pairwise(worker)]
    return {
        "between_units_ms": round(1e3 * median(gaps), 2),
        "writing_ms": round(1e3 * median(inside), 2),
        "share_of_a_unit": round((fmean(gaps) + fmean(inside)) / seconds, 5),  # means: rare long waits count too
        "start_seconds": round(min(row[0][1] for row in rows) - began, 2),
        "end_seconds": round(ended - max(row[-1][2] for row in rows), 2),
    }


def run_sleep(folder: str, options: dict[str, Any], units: int, seconds: float) -> None:
    """Run the stage: the process that is measured."""
    run_stage(Sleep(units=units, seconds=seconds), Run.create(folder), Choice.of(options))


def draw(request: Request, size: int = 128, grid: int = 16) -> Generation:
    """Two soft discs over noise, and maps of them with noise of their own."""
    rng = np.random.default_rng(request.seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    places = rng.uniform(0.3, 0.7, (2, 2)) * (1, 0.7) + np.array([[0, -0.1], [0, 0.3]])
    discs = np.stack([np.exp(-((y - row) ** 2 + (x - column) ** 2) / 0.02) for row, column in places])
    colors = rng.integers(0, 256, (2, 3))
    image = rng.normal(128, 30, (size, size, 3)) * (1 - discs.max(0))[..., None] + np.einsum(
        "khw,kc->hwc", discs, colors
    )
    coarse = discs.reshape(2, grid, size // grid, grid, size // grid).mean((2, 4))
    weights = np.clip(coarse + rng.normal(0, 0.05, coarse.shape), 0, 1).astype(np.float16)
    affinity = rng.uniform(0.5, 4, (len(AFFINITY_OFFSETS), grid, grid)).astype(np.float16)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return Generation(request, pixels, Maps(request.prompt.words, weights, affinity))


def speed_of_two(units: int, unit_size: int, repeats: int) -> dict[str, Any]:
    """AttentionCut masks of drawn images with one worker and with two, in turns.

    ``speedup`` is of all the time that a command takes, with the start of the workers. ``steady_speedup`` is of the
    rate while they work. ``processor_speedup`` is what the processor time of all processes would allow on idle cores:
    what two workers do beyond the work of one is in it, but not what the machine itself loses when both cores are busy.
    That is ``machine_speedup``: plain arithmetic in two processes.
    """

    @dataclass(frozen=True)
    class Drawings(Stage):
        """Drawn images with their maps."""

        name: ClassVar = "generate"
        reads: ClassVar = ()
        writes: ClassVar = ("images", "maps")

        def plan(self, run: Run) -> list[int]:
            return list(range(units))

        def size(self, run: Run, unit: int) -> int:
            return unit_size

        @contextmanager
        def open(self, run: Run, worker: Worker) -> Iterator[Work]:
            (prompt,) = read_prompts(str(run.path / "prompt.txt"))

            def work(unit: int) -> Report:
                with run.write("maps", unit) as maps, run.write("images", unit) as images:
                    for row in range(unit_size):
                        drawn = draw(Request(sample_key(unit, row), prompt, row))
                        images.add(drawn.request.key, codecs.encode_image(drawn))
                        maps.add(drawn.request.key, codecs.encode_maps(drawn.maps))
                return Report(unit, unit_size)

            yield work

    taken: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(folder)
        (run.path / "prompt.txt").write_text("a [word0] and a [word1]\n", encoding="utf-8")
        run_stage(Drawings(), run, Choice("local", {"workers": 1}))
        for turn in range(repeats):
            for workers in (1, 2) if turn % 2 else (2, 1):
                taken[workers].append(masks_by(workers, run))
    best = {
        workers: {name: max(turn[name] for turn in turns) for name in ("rate", "steady_rate", "rate_of_processor")}
        for workers, turns in taken.items()
    }
    return {
        "units": units,
        "samples": units * unit_size,
        "seconds_of_one": round(units * unit_size / best[1]["rate"], 2),
        "seconds_of_two": round(units * unit_size / best[2]["rate"], 2),
        "start_seconds_of_two": round(min(turn["start_seconds"] for turn in taken[2]), 2),
        "speedup": round(best[2]["rate"] / best[1]["rate"], 3),
        "speedup_median": round(middle(taken[2], "rate") / middle(taken[1], "rate"), 3),
        "steady_speedup": round(best[2]["steady_rate"] / best[1]["steady_rate"], 3),
        "processor_speedup": round(2 * best[2]["rate_of_processor"] / best[1]["rate_of_processor"], 3),
        "machine_speedup": round(arithmetic_in_two(repeats), 3),
    }


def masks_by(workers: int, run: Run) -> dict[str, float]:
    """Rates in images a second, all of them over: the whole call, the time that workers spend on units, their processor
    time; and the seconds before the last of the workers begins.
    """
    for name in ("masks", "logs"):
        shutil.rmtree(run.folder(name), ignore_errors=True)
    before, began = processor_seconds(), time.time()
    done = api.masks(run, engine=Choice("local", {"workers": workers}), refine=Choice("attentioncut"))
    used = processor_seconds() - before
    steady, opened = 0.0, []
    for path in run.folder("logs").glob("masks-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        units = [line for line in lines if "unit" in line]
        opened.append(datetime.fromisoformat(lines[0]["time"]).timestamp() - began)
        if units:
            steady += sum(line["samples"] for line in units) / sum(line["seconds"] for line in units)
    if len(opened) != workers:
        raise SystemExit(f"{len(opened)} workers made the masks, not {workers}")
    return {
        "rate": done.samples / done.seconds,
        "steady_rate": steady,
        "rate_of_processor": done.samples / used,
        "start_seconds": max(opened),
    }


def middle(turns: list[dict[str, float]], name: str) -> float:
    """The median of a figure."""
    return median(turn[name] for turn in turns)


def processor_seconds() -> float:
    """Processor time of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def arithmetic_in_two(repeats: int) -> float:
    """How much faster two processes are than one at twice as much of what needs no memory, disk or other process."""
    context, best = mp.get_context("spawn"), {1: float("inf"), 2: float("inf")}
    for _ in range(repeats):
        for count in best:
            with context.Pool(count) as pool:
                pool.map(count_up, [1] * count, chunksize=1)  # both are there
                began = time.perf_counter()
                pool.map(count_up, [4_000_000] * 2, chunksize=1)
                best[count] = min(best[count], time.perf_counter() - began)
    return best[1] / best[2]


def count_up(to: int) -> int:
    """Some arithmetic."""
    total = 0
    for number in range(to):
        total += number * number % 7
    return total


def large_run(units: int) -> dict[str, Any]:
    """Seconds that ``status`` and a command with nothing to do take on a run of so many units."""
    with tempfile.TemporaryDirectory() as folder:
        run, stage = Run.create(folder), Sleep(units=units, seconds=0.0)
        run.record_settings(stage)
        with run.write("sleep", 0) as tar:
            tar.add(sample_key(0, 0), {"txt": b"slept"})
        data, mark = run.tar("sleep", 0).read_bytes(), run.tar("sleep", 0).with_suffix(".json").read_bytes()
        for unit in range(1, units):
            run.tar("sleep", unit).write_bytes(data)
            run.tar("sleep", unit).with_suffix(".json").write_bytes(mark)
        for unit in range(0, units, 100):
            run.fail(stage, Report(unit, error="RuntimeError: out of memory"))
        taken = {}
        started = time.perf_counter()
        found = status(run, counts=False)
        taken["status_seconds"] = round(time.perf_counter() - started, 2)
        if found.artifacts[0].done != units or found.num_failed != len(range(0, units, 100)):
            raise SystemExit("status does not see the run as it is")
        started = time.perf_counter()
        run_stage(stage, run, Choice("local", {"workers": 1}))
        taken["nothing_to_do_seconds"] = round(time.perf_counter() - started, 2)
    return {"units": units, **taken}


def main() -> None:
    """Measure the engines, two workers, and a large run, and write them down."""
    parser = argparse.ArgumentParser(prog="python benchmarks/engines.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=16, help="units of each engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="what a unit takes")
    parser.add_argument("--repeats", type=int, default=2, help="turns of one worker and two")
    parser.add_argument(
        "--mask-units",
        type=int,
        default=80,
        help="units of 8 images for the masks; few of them measure how processes start",
    )
    parser.add_argument("--large", type=int, default=10_000, help="units of the large run")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what this script gives to a process of an engine
    args = parser.parse_args()
    if args.one:
        run_sleep(*json.loads(args.one))
        return
    figures: dict[str, Any] = {"units": args.units, "seconds": args.seconds, "workers": WORKERS, "engines": {}}
    for name in CALLS:
        try:
            ENGINES.load(CALLS[name][1]["name"])
        except MissingDependency as error:
            print(f"{name}: left out, {error}")
            continue
        figures["engines"][name] = measure_overhead(name, args.units, args.seconds)
        print(name, figures["engines"][name], flush=True)
    figures["masks, 2 workers against 1"] = speed_of_two(args.mask_units, 8, args.repeats)
    print("masks", figures["masks, 2 workers against 1"], flush=True)
    figures["large run"] = large_run(args.large)
    print("large run", figures["large run"])
    print(write_result("engines", figures))


if __name__ == "__main__":
    main()
