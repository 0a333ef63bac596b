"""Whether masks that guide pretraining improve an encoder.

``python benchmarks/learning.py --data DATA`` trains every method of ``pipelines/free-atm-tiny.yaml`` without masks,
guided by masks, and guided by masks at wrong places, with several seeds. It evaluates each encoder on held-out
composites with exact labels, masks and captions, and with ``--photos`` on real photos. It writes
``results/learning.json`` and, by ``learning_report.py``, ``docs/results.md``. A stopped run resumes. DATA is the folder
that ``synthgen.tiny.fetch`` prepared.

``--pipeline pipelines/methods-tiny.yaml --name methods`` compares all methods that learn from images alone, and writes
``results/methods.json``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import multiprocessing as mp
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import make_parser, write_result
from _composites import write_composites
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
from synthgen.tiny.compositor import Compositor, Names
from synthgen.tiny.truth import SEED

ROOT = Path(__file__).resolve().parent.parent
CLASSIFICATION = (Choice("knn"), Choice("linear_probe"))
SEGMENTATION = Choice("segmentation", {"decoder": False, "seeds": 1})
RETRIEVAL = Choice("retrieval")


@dataclass(frozen=True)
class TestSet:
    """Images to train heads on, images to evaluate them on, and the evaluators."""

    name: str
    evaluators: tuple[Choice, ...]
    train: str
    test: str


@dataclass(frozen=True)
class Training:
    """A training and the test sets of its encoder."""

    run: Path
    stage: Pretrain
    test_sets: tuple[TestSet, ...]
    baselines: bool  # also evaluate a random encoder and the pixels


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--pipeline", type=Path, default=ROOT / "pipelines" / "free-atm-tiny.yaml")
    parser.add_argument("--name", default="learning", help="name of the result file")
    parser.add_argument("--photos", type=Path, help="folder with caltech25-train.tar, caltech25-test.tar, coco159.tar")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="trainings in parallel, of one thread each")
    parser.add_argument(
        "--truth", type=int, nargs=2, default=(2048, 1024), help="held-out composites to train heads and to evaluate on"
    )
    parser.add_argument("--report-only", action="store_true", help="report what has been trained, without training")
    args = parser.parse_args()
    pipeline = read_pipeline(args.pipeline)
    if not args.report_only:
        list(pipeline.select(last="shards").execute(engine=Local(workers=args.workers)))
        truth = write_truth(args.data, pipeline, args.truth)
        run_trainings(trainings(pipeline, test_sets(truth, args.photos), args.seeds), args.workers)
    print(write_result(args.name, figures(pipeline, args.seeds)))
    if args.name == "learning":
        write_report(ROOT)


# -- test data


def write_truth(data: Path, pipeline: Pipeline, nums: Sequence[int]) -> Path:
    """Write two tars of held-out composites of the objects that the prompts name."""
    folder = pipeline.run / "truth"
    names = Names.load()
    words = {word for prompt in read_prompts(pipeline.stages[0].settings()["prompts"]) for word in prompt.words}
    compositor = Compositor(data, names, held_out=True)
    compositor.weights = compositor.weights * torch.tensor([name in words for name in names.own])
    for k, (split, num) in enumerate(zip(("train", "test"), nums, strict=True)):
        path = folder / f"{split}.tar"
        if not path.is_file():
            write_composites(path, compositor, num, seed=SEED + 10_000 * (k + 1), prefix=str(k))
    return folder


def test_sets(truth: Path, photos: Path | None) -> tuple[TestSet, ...]:
    """All test sets."""
    composites = str(truth / "train.tar"), str(truth / "test.tar")
    found = [
        TestSet("composites", (*CLASSIFICATION, SEGMENTATION), *composites),
        TestSet("captions", (RETRIEVAL,), *composites),
    ]
    if photos:
        caltech = str(photos / "caltech25-train.tar"), str(photos / "caltech25-test.tar")
        found.append(TestSet("photos", CLASSIFICATION, *caltech))
        found.append(TestSet("photo-captions", (RETRIEVAL,), "", str(photos / "coco159.tar")))
    return tuple(found)


# -- trainings


def trainings(pipeline: Pipeline, test_sets: Sequence[TestSet], seeds: int) -> Iterator[Training]:
    """All trainings of the first seed, then of the next, so that partial results are comparable."""
    for seed in range(seeds):
        for stage in pipeline.stages:
            if isinstance(stage, Pretrain):
                has_text = stage.method.name == "vlp"
                usable = tuple(one for one in test_sets if has_text or one.evaluators != (RETRIEVAL,))
                stage = replace(stage, seed=seed, label=f"{stage.label}-{seed}")
                yield Training(pipeline.run, stage, usable, seed == 0)


def run_trainings(trainings: Iterator[Training], workers: int) -> None:
    """Run all trainings, ``workers`` in parallel."""
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool:
        futures = [pool.submit(train_and_evaluate, training) for training in trainings]
        for number, future in enumerate(as_completed(futures), start=1):
            minutes = (time.perf_counter() - start) / 60
            print(f"{future.result()} is done: {number} of {len(futures)}, {minutes:.1f} min", flush=True)


def train_and_evaluate(training: Training) -> str:
    """Train, then evaluate the encoder on all test sets and its snapshots on the first."""
    torch.set_num_threads(1)
    run, label = Run.open(training.run), training.stage.label
    run_stage(training.stage, run, Local(workers=1))
    folder = run.folder(training.stage.artifacts()[0])
    for test_set in training.test_sets:
        evaluate(run, folder, test_set, f"{label}-{test_set.name}", baselines=training.baselines)
    for snapshot in sorted((folder / "snapshots").iterdir())[:-1]:  # the last one is the encoder itself
        evaluate(run, snapshot, training.test_sets[0], f"{label}-{snapshot.name}", baselines=False)
    return label


def evaluate(run: Run, encoder: Path, test_set: TestSet, label: str, *, baselines: bool) -> None:
    """Run the stage ``evaluate``."""
    stage = Evaluate(
        evaluators=test_set.evaluators,
        train=test_set.train,
        test=test_set.test,
        encoder=str(encoder),
        label=label,
        baselines=baselines,
    )
    run_stage(stage, run, Local(workers=1))


# -- results


def figures(pipeline: Pipeline, seeds: int) -> dict[str, Any]:
    """The scores by training and seed, the scores of snapshots, the baselines, and what was trained on."""
    run = Run.open(pipeline.run)
    stages = [stage for stage in pipeline.stages if isinstance(stage, Pretrain)]
    scores: dict[str, dict[str, list[float]]] = {stage.label: {} for stage in stages}
    curves: dict[str, dict[str, dict[str, list[float]]]] = {stage.label: {} for stage in stages}
    baselines: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {stage.label: [] for stage in stages}
    for stage in stages:
        for seed in range(seeds):
            name = f"{stage.label}-{seed}"
            marker = run.folder("pretrain") / name / "done.json"
            if not marker.is_file():
                continue
            done = read_json(marker)
            config = read_json(marker.with_name("config.json"))
            seconds[stage.label].append(done["seconds"])
            for path in sorted(run.folder("evaluate").glob(f"{name}-*.json")):
                source = path.stem.removeprefix(f"{name}-")
                is_snapshot = source.startswith("step-")
                step = int(source.removeprefix("step-")) if is_snapshot else done["steps"]
                for row, found in read_json(path)["scores"].items():
                    for task, value in tasks("composites" if is_snapshot else source, found):
                        if is_snapshot or (row == name and source == "composites"):
                            curves[stage.label].setdefault(task, {}).setdefault(str(step), []).append(value)
                        if is_snapshot:
                            continue
                        if row == name:
                            scores[stage.label].setdefault(task, []).append(value)
                        else:
                            baselines.setdefault(row, {})[task] = value
    description = read_json(run.folder("shards") / "dataset.json")
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
        "truth": {split: len(open_dataset(pipeline.run / "truth" / f"{split}.tar")) for split in ("train", "test")},
        "encoder": config,
        "settings": {stage.label: stage.settings() for stage in stages},
    }


def tasks(source: str, found: dict[str, dict[str, float]]) -> Iterator[tuple[str, float]]:
    """The first score of each evaluator, by evaluator and test set."""
    for evaluator, scores in found.items():
        yield f"{evaluator}, {source}", next(iter(scores.values()))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
