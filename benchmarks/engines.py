"""The cost of the engines: overhead per unit, two workers against one, and a run of many units.

``python benchmarks/engines.py`` writes ``results/engines.json`` in under four minutes. Measured are:

* each installed engine on units that only sleep, so that other work on the machine matters little;
* AttentionCut masks by one and by two workers. This needs two idle cores; the ratio of processor times, which other
  work hardly changes, is given as well;
* ``status``, and a command with nothing to do, on a run of many units.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

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

from _common import draw_generation, make_parser, write_result

from synthgen import api, codecs
from synthgen.config import Choice
from synthgen.engines import ENGINES
from synthgen.errors import MissingDependency
from synthgen.prompts import read_prompts
from synthgen.records import Report, Request, sample_key
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Stage, Work, Worker
from synthgen.status import status

WORKERS = 2
COMMANDS: dict[str, tuple[list[str], dict[str, Any]]] = {  # the interpreter of each engine, and its options
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
    """Units that take a fixed time and write one small sample."""

    name: ClassVar = "sleep"
    reads: ClassVar = ()
    writes: ClassVar = ("sleep",)

    units: int = 20
    seconds: float = 1.0

    def plan(self, run: Run) -> list[int]:
        """All units."""
        return list(range(self.units))

    def size(self, run: Run, unit: int) -> int:
        """One sample."""
        return 1

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Sleep, write, and record the times of start and end."""

        def work(unit: int) -> Report:
            start = time.time()
            with run.write("sleep", unit) as tar:
                time.sleep(self.seconds)
                tar.add(sample_key(unit, 0), {"txt": b"done"})
            with open(run.path / f"times-{worker.rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps([unit, start, time.time()]) + "\n")
            return Report(unit, 1)

        yield work


def measure_overhead(name: str, units: int, seconds: float) -> dict[str, Any]:
    """The overhead per unit, and the seconds before the first unit and after the last."""
    command, options = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        script = [str(Path(__file__).resolve()), "--child", json.dumps([folder, options, units, seconds])]
        start = time.time()
        subprocess.run([*command, *script], check=True, stdout=subprocess.DEVNULL)
        end = time.time()
        files = [path.read_text(encoding="utf-8").splitlines() for path in Path(folder).glob("times-*.jsonl")]
    workers = [sorted((json.loads(line) for line in lines), key=lambda row: row[1]) for lines in files]
    writing = [stop - first - seconds for rows in workers for _, first, stop in rows]
    gaps = [after[1] - before[2] for rows in workers for before, after in pairwise(rows)]
    return {
        "between_units_ms": round(1e3 * median(gaps), 2),
        "writing_ms": round(1e3 * median(writing), 2),
        "share_of_a_unit": round((fmean(gaps) + fmean(writing)) / seconds, 5),  # means, to include rare long waits
        "start_seconds": round(min(rows[0][1] for rows in workers) - start, 2),
        "end_seconds": round(end - max(rows[-1][2] for rows in workers), 2),
    }


def run_sleep(folder: str, options: dict[str, Any], units: int, seconds: float) -> None:
    """Run the stage in the measured process."""
    run_stage(Sleep(units=units, seconds=seconds), Run.create(folder), Choice.of(options))


def speed_of_two(units: int, unit_size: int, repeats: int) -> dict[str, Any]:
    """AttentionCut masks of drawn images by one worker and by two, alternating.

    ``speedup`` is that of the whole command, with the start of the workers; ``steady_speedup`` that of the rate while
    they work. ``processor_speedup`` is what the processor time of all processes would allow on idle cores: it includes
    the additional work of two workers, but not what the machine loses when both cores are busy. That is
    ``machine_speedup``, measured by plain arithmetic in two processes.
    """

    @dataclass(frozen=True)
    class Drawings(Stage):
        """Write drawn images with their maps."""

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
                        drawn = draw_generation(Request(sample_key(unit, row), prompt, row), size=128, grid=16)
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
    medians = {workers: median(turn["rate"] for turn in turns) for workers, turns in taken.items()}
    return {
        "units": units,
        "samples": units * unit_size,
        "seconds_of_one": round(units * unit_size / best[1]["rate"], 2),
        "seconds_of_two": round(units * unit_size / best[2]["rate"], 2),
        "start_seconds_of_two": round(min(turn["start_seconds"] for turn in taken[2]), 2),
        "speedup": round(best[2]["rate"] / best[1]["rate"], 3),
        "speedup_median": round(medians[2] / medians[1], 3),
        "steady_speedup": round(best[2]["steady_rate"] / best[1]["steady_rate"], 3),
        "processor_speedup": round(2 * best[2]["rate_of_processor"] / best[1]["rate_of_processor"], 3),
        "machine_speedup": round(arithmetic_in_two(repeats), 3),
    }


def masks_by(workers: int, run: Run) -> dict[str, float]:
    """Images per second of the whole call, of the time spent on units and of processor time; seconds until the last
    worker starts.
    """
    for name in ("masks", "logs"):
        shutil.rmtree(run.folder(name), ignore_errors=True)
    before, start = processor_seconds(), time.time()
    done = api.masks(run, engine=Choice("local", {"workers": workers}), refine=Choice("attentioncut"))
    used = processor_seconds() - before
    steady, starts = 0.0, []
    for path in run.folder("logs").glob("masks-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        units = [line for line in lines if "unit" in line]
        starts.append(datetime.fromisoformat(lines[0]["time"]).timestamp() - start)
        if units:
            steady += sum(line["samples"] for line in units) / sum(line["seconds"] for line in units)
    if len(starts) != workers:
        raise SystemExit(f"{len(starts)} workers made the masks, not {workers}")
    return {
        "rate": done.samples / done.seconds,
        "steady_rate": steady,
        "rate_of_processor": done.samples / used,
        "start_seconds": max(starts),
    }


def processor_seconds() -> float:
    """The processor time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def arithmetic_in_two(repeats: int) -> float:
    """The speedup of two processes over one in work that needs no memory, disk or communication."""
    context, best = mp.get_context("spawn"), {1: float("inf"), 2: float("inf")}
    for _ in range(repeats):
        for count in best:
            with context.Pool(count) as pool:
                pool.map(count_up, [1] * count, chunksize=1)  # wait until all processes run
                start = time.perf_counter()
                pool.map(count_up, [4_000_000] * 2, chunksize=1)
                best[count] = min(best[count], time.perf_counter() - start)
    return best[1] / best[2]


def count_up(limit: int) -> int:
    return sum(number * number % 7 for number in range(limit))


def large_run(units: int) -> dict[str, Any]:
    """The seconds of ``status`` and of a command with nothing to do, on a run of many units."""
    with tempfile.TemporaryDirectory() as folder:
        run, stage = Run.create(folder), Sleep(units=units, seconds=0.0)
        with run.claim(stage):  # writes its settings
            pass
        with run.write("sleep", 0) as tar:
            tar.add(sample_key(0, 0), {"txt": b"done"})
        data, mark = run.tar("sleep", 0).read_bytes(), run.tar("sleep", 0).with_suffix(".json").read_bytes()
        for unit in range(1, units):
            run.tar("sleep", unit).write_bytes(data)
            run.tar("sleep", unit).with_suffix(".json").write_bytes(mark)
        for unit in range(0, units, 100):  # failures that a retry has resolved
            run.fail(stage, Report(unit, error="RuntimeError: out of memory"))
        start = time.perf_counter()
        found = status(run, counts=False)
        status_seconds = round(time.perf_counter() - start, 2)
        if found.artifacts[0].done != units or found.num_failed:
            raise SystemExit("status reports wrong counts")
        start = time.perf_counter()
        run_stage(stage, run, Choice("local", {"workers": 1}))
        nothing_to_do_seconds = round(time.perf_counter() - start, 2)
    return {"units": units, "status_seconds": status_seconds, "nothing_to_do_seconds": nothing_to_do_seconds}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--units", type=int, default=16, help="units for each engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each of these units")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of one worker and two")
    parser.add_argument(
        "--mask-units",
        type=int,
        default=80,
        help="units of 8 images for the masks; with few of them the start of the processes dominates",
    )
    parser.add_argument("--large", type=int, default=10_000, help="units of the large run")
    parser.add_argument("--child", help="internal: run the stage of sleeping units with these arguments")
    args = parser.parse_args()
    if args.child:
        run_sleep(*json.loads(args.child))
        return
    if args.units <= WORKERS:
        parser.error(f"--units must be more than {WORKERS}, so that some worker has two")
    figures: dict[str, Any] = {"units": args.units, "seconds": args.seconds, "workers": WORKERS, "engines": {}}
    for name, (_, options) in COMMANDS.items():
        try:
            ENGINES.load(options["name"])
        except MissingDependency as error:
            print(f"{name}: skipped, {error}")
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
