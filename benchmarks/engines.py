"""What the engines themselves cost: time beside the work, two workers against one, the status of a large run.

``python benchmarks/engines.py`` writes ``results/engines.json``. A unit of the first part only sleeps, so that a busy
machine disturbs it little; it wants idle cores for the second. An engine that is not installed is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
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
        """Sleep, write, and note when the unit began and ended."""

        def work(unit: int) -> Report:
            began = time.time()
            with run.write("sleep", unit) as tar:
                time.sleep(self.seconds)
                tar.add(sample_key(unit, 0), {"txt": b"slept"})
            with open(run.path / f"times-{worker.rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps([unit, began, time.time()]) + "\n")
            return Report(unit, 1)

        yield work


def beside_the_work(name: str, units: int, seconds: float) -> dict[str, Any]:
    """What a worker does beside a unit, as a share of it; what comes before the first unit and after the last."""
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
    each = median(gaps) + median(inside)
    return {
        "between_units_ms": round(1e3 * median(gaps), 2),
        "writing_ms": round(1e3 * median(inside), 2),
        "share_of_a_unit": round(each / seconds, 5),
        "start_seconds": round(min(row[0][1] for row in rows) - began, 2),
        "end_seconds": round(ended - max(row[-1][2] for row in rows), 2),
    }


def work_of_one(folder: str, options: dict[str, Any], units: int, seconds: float) -> None:
    """What the measured process does."""
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
    """AttentionCut masks of drawn images with one worker and with two, in turns."""

    @dataclass(frozen=True)
    class Scenes(Stage):
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

    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(folder)
        (run.path / "prompt.txt").write_text("a [word0] and a [word1]\n", encoding="utf-8")
        run_stage(Scenes(), run, Choice("local", {"workers": 1}))
        for turn in range(repeats):
            for workers in (1, 2) if turn % 2 else (2, 1):
                shutil.rmtree(run.folder("masks"), ignore_errors=True)
                engine = Choice("local", {"workers": workers})
                seconds[workers].append(api.masks(run, engine=engine, refine=Choice("attentioncut")).seconds)
    best = {workers: min(taken) for workers, taken in seconds.items()}
    return {
        "units": units,
        "samples": units * unit_size,
        "seconds_of_one": round(best[1], 2),
        "seconds_of_two": round(best[2], 2),
        "speedup": round(best[1] / best[2], 3),
        "speedup_median": round(median(seconds[1]) / median(seconds[2]), 3),
    }


def large_run(units: int) -> dict[str, Any]:
    """Seconds that ``status`` and a command with nothing to do take on a run of so many units."""
    with tempfile.TemporaryDirectory() as folder:
        run, stage = Run.create(folder), Sleep(units=units, seconds=0.0)
        run.note(stage)
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
    parser.add_argument("--units", type=int, default=20, help="units of each engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="what a unit takes")
    parser.add_argument("--repeats", type=int, default=3, help="turns of one worker and two")
    parser.add_argument(
        "--mask-units",
        type=int,
        default=200,
        help="units of 16 images for the masks; few of them measure how processes start",
    )
    parser.add_argument("--large", type=int, default=10_000, help="units of the large run")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what this script gives to a process of an engine
    args = parser.parse_args()
    if args.one:
        work_of_one(*json.loads(args.one))
        return
    figures: dict[str, Any] = {"units": args.units, "seconds": args.seconds, "workers": WORKERS, "engines": {}}
    for name in CALLS:
        try:
            ENGINES.load(CALLS[name][1]["name"])
        except MissingDependency as error:
            print(f"{name}: left out, {error}")
            continue
        figures["engines"][name] = beside_the_work(name, args.units, args.seconds)
        print(name, figures["engines"][name], flush=True)
    figures["masks, 2 workers against 1"] = speed_of_two(args.mask_units, 16, args.repeats)
    print("masks", figures["masks, 2 workers against 1"], flush=True)
    figures["large run"] = large_run(args.large)
    print("large run", figures["large run"])
    print(write_result("engines", figures))


if __name__ == "__main__":
    main()
