"""Does an encoder learn more where masks guide its training? ``python benchmarks/learning.py --data DATA``.

Runs ``pipelines/free-atm-tiny.yaml`` with several seeds, evaluates each encoder on held-out composites whose labels,
masks and captions are exact, and on photos where there are some, and writes ``results/learning.json``; then
``learning_report.py`` writes ``docs/results.md``. Stop it at any moment; it goes on where it stopped. DATA is what
``synthgen.tiny.fetch`` prepared. With ``--pipeline pipelines/methods-tiny.yaml --name methods`` it compares all methods
that learn from images alone, and writes ``results/methods.json``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import multiprocessing as mp
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from learning_report import write_report
from pyarrow import parquet

from synthgen.config import Choice
from synthgen.datasets import open_dataset
from synthgen.engines.local import Local
from synthgen.pipeline import Pipeline, read_pipeline
from synthgen.prompts import read_prompts
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.pretrain import Pretrain
from synthgen.stores.tar import TarWriter
from synthgen.tiny.compositor import Compositor, Names
from synthgen.tiny.truth import SEED, png

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64  # composites drawn at once
OF_IMAGES = (Choice("knn"), Choice("linear_probe"))
OF_PIXELS = Choice("segmentation", {"decoder": False, "seeds": 1})
OF_TEXTS = Choice("retrieval")


@dataclass(frozen=True)
class Test:
    """Images to train a head on, images to evaluate it on, and the evaluators."""

    name: str
    evaluators: tuple[Choice, ...]
    train: str
    test: str


@dataclass(frozen=True)
class Job:
    """One training with its evaluations."""

    run: Path
    stage: Pretrain
    tests: tuple[Test, ...]
    baselines: bool  # also of a random encoder and of the pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--pipeline", type=Path, default=ROOT / "pipelines" / "free-atm-tiny.yaml")
    parser.add_argument("--name", default="learning", help="of the file of results")
    parser.add_argument("--photos", type=Path, help="folder with caltech25-train.tar, caltech25-test.tar, coco159.tar")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="trainings at the same time, one thread each")
    parser.add_argument(
        "--truth", type=int, nargs=2, default=(2048, 1024), help="held-out composites: to learn, to judge"
    )
    parser.add_argument("--report-only", action="store_true", help="what is there already, without training more")
    args = parser.parse_args()
    line = read_pipeline(args.pipeline)
    if not args.report_only:
        list(line.select(last="shards").execute(engine=Local(workers=args.workers)))
        truth = write_truth(args.data, line, args.truth)
        work(jobs(line, tests(truth, args.photos), args.seeds), args.workers)
    write_result(args.name, figures(line, args.seeds))
    if args.name == "learning":
        write_report(ROOT)


# -- test data


def write_truth(data: Path, line: Pipeline, nums: Sequence[int]) -> Path:
    """Two tars of held-out composites of the objects that the prompts name, each with label, caption and masks."""
    folder = line.run / "truth"
    names = Names.load()
    asked = {word for prompt in read_prompts(line.stages[0].settings()["prompts"]) for word in prompt.words}
    for part, (split, num) in enumerate(zip(("train", "test"), nums, strict=True)):
        if (folder / f"{split}.tar").is_file():
            continue
        compositor = Compositor(data, names, held_out=True)
        compositor.weights = compositor.weights * torch.tensor([name in asked for name in names.own])
        with TarWriter(folder / f"{split}.tar") as tar:
            for start in range(0, num, BATCH):
                drawn = compositor.draw(
                    BATCH, torch.Generator().manual_seed(SEED + 10_000 * (part + 1) + start // BATCH)
                )
                drawn = drawn.first(min(BATCH, num - start))
                for row, objects in enumerate(drawn.objects):
                    numbers = torch.arange(1, len(drawn.masks[row]) + 1, dtype=torch.uint8)[:, None, None]
                    about = {"words": objects, "label": objects[0] if len(objects) == 1 else None}
                    members = {
                        "json": json.dumps(about).encode(),
                        "mask.png": png((drawn.masks[row] * numbers).amax(dim=0).numpy()),
                        "png": png(drawn.images[row].numpy()),
                        "txt": drawn.captions[row].encode(),
                    }
                    tar.add(f"{part}{start + row:09d}", members)
    return folder


def tests(truth: Path, photos: Path | None) -> tuple[Test, ...]:
    """All tests of an encoder."""
    own = str(truth / "train.tar"), str(truth / "test.tar")
    found = [Test("composites", (*OF_IMAGES, OF_PIXELS), *own), Test("captions", (OF_TEXTS,), *own)]
    if photos:
        found.append(
            Test("photos", OF_IMAGES, *(str(photos / f"caltech25-{split}.tar") for split in ("train", "test")))
        )
        found.append(Test("photo-captions", (OF_TEXTS,), "", str(photos / "coco159.tar")))
    return tuple(found)


# -- trainings


def jobs(line: Pipeline, tests: Sequence[Test], seeds: int) -> Iterator[Job]:
    """Seed by seed, so that what is there at any time is comparable."""
    for seed in range(seeds):
        for stage in line.stages:
            if isinstance(stage, Pretrain):
                told = tuple(test for test in tests if test.evaluators != (OF_TEXTS,) or stage.method.name == "vlp")
                yield Job(line.run, replace(stage, seed=seed, label=f"{stage.label}-{seed}"), told, seed == 0)


def work(jobs: Iterator[Job], workers: int) -> None:
    """Every job, ``workers`` at a time."""
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool:
        waiting = [pool.submit(do, job) for job in jobs]
        for number, future in enumerate(as_completed(waiting), start=1):
            minutes = (time.perf_counter() - started) / 60
            print(f"{future.result()} is done: {number} of {len(waiting)}, {minutes:.1f} min", flush=True)


def do(job: Job) -> str:
    """Train, then evaluate the encoder, and on composites its snapshots as well."""
    torch.set_num_threads(1)
    run = Run.open(job.run)
    run_stage(job.stage, run, Local(workers=1))
    folder = run.folder(job.stage.artifacts()[0])
    for test in job.tests:
        evaluate(run, folder, test, f"{job.stage.label}-{test.name}", baselines=job.baselines)
    for snapshot in sorted((folder / "snapshots").iterdir())[:-1]:  # the last one is the encoder itself
        evaluate(run, snapshot, job.tests[0], f"{job.stage.label}-{snapshot.name}", baselines=False)
    return job.stage.label


def evaluate(run: Run, encoder: Path, test: Test, label: str, *, baselines: bool) -> None:
    given = Evaluate(evaluators=test.evaluators, train=test.train, test=test.test, baselines=baselines)
    run_stage(replace(given, encoder=str(encoder), label=label), run, Local(workers=1))


# -- results


def figures(line: Pipeline, seeds: int) -> dict[str, Any]:
    """Every score by arm and seed, the scores on the way, the baselines, and what was trained on."""
    run = Run.open(line.run)
    arms = [stage for stage in line.stages if isinstance(stage, Pretrain)]
    scores: dict[str, dict[str, list[float]]] = {stage.label: {} for stage in arms}
    curves: dict[str, dict[str, dict[str, list[float]]]] = {stage.label: {} for stage in arms}
    baselines: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {stage.label: [] for stage in arms}
    for stage in arms:
        for seed in range(seeds):
            name = f"{stage.label}-{seed}"
            if not (run.folder("pretrain") / name / "done.json").is_file():
                continue
            done = json.loads((run.folder("pretrain") / name / "done.json").read_text())
            seconds[stage.label].append(done["seconds"])
            for path in sorted(run.folder("evaluate").glob(f"{name}-*.json")):
                what = path.stem.removeprefix(f"{name}-")
                for row, found in json.loads(path.read_text())["scores"].items():
                    for task, value in tasks(what, found):
                        if what.startswith("step-"):
                            steps = curves[stage.label].setdefault(task, {})
                            steps.setdefault(str(int(what.removeprefix("step-"))), []).append(value)
                        elif row == name:
                            scores[stage.label].setdefault(task, []).append(value)
                            if what == "composites":
                                steps = curves[stage.label].setdefault(task, {})
                                steps.setdefault(str(done["steps"]), []).append(value)
                        else:
                            baselines.setdefault(row, {})[task] = value
    description = json.loads((run.folder("shards") / "dataset.json").read_text())
    tables = [
        parquet.read_table(path, columns=["mask_area"]) for path in (run.folder("shards") / "train").glob("*.parquet")
    ]
    areas = [row for table in tables for row in table["mask_area"].to_pylist()]
    return {
        "scores": scores,
        "curves": curves,
        "baselines": baselines,
        "seconds": seconds,
        "images": sum(split["samples"] for split in description["splits"].values()),
        "made_with": description["made_from"]["images"],
        "with_masks": sum(any(area or 0 for area in row) for row in areas),
        "truth": {split: len(open_dataset(line.run / "truth" / f"{split}.tar")) for split in ("train", "test")},
        "encoder": json.loads((run.folder("pretrain") / name / "config.json").read_text()),
        "settings": {stage.label: stage.settings() for stage in arms},
    }


def tasks(what: str, found: dict[str, dict[str, float]]) -> Iterator[tuple[str, float]]:
    """The first figure of each evaluator, under a name that says on what."""
    on = "composites" if what.startswith("step-") else what
    for evaluator, numbers in found.items():
        yield f"{evaluator}, {on}", next(iter(numbers.values()))


if __name__ == "__main__":
    main()
