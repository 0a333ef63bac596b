"""What a plan measures: a few images, masks, a shard, training steps and scores, made in a run that is deleted.

Each stage works in a fresh process, as a worker of its own would: first on one image, to warm up and to see how many
are affordable, then in a few rounds that count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.devices import devices_for
from synthgen.plan.files import link_tars
from synthgen.plan.meter import Measurement, Meter, run_in_process
from synthgen.plan.source import ImageSurvey, evenly_spaced
from synthgen.progress import Progress
from synthgen.prompts import Survey
from synthgen.run import Run
from synthgen.stages import Stage
from synthgen.stages.attend import Attend

if TYPE_CHECKING:
    from synthgen.plan.count import Counts
    from synthgen.stages.evaluate import Evaluate
    from synthgen.stages.generate import Generate
    from synthgen.stages.pretrain import Pretrain
    from synthgen.stages.shards import Shards

__all__ = ["MEASURED", "ROUNDS", "SECONDS", "Sample", "draw_sample"]

ROUNDS = 3  # that are timed
SECONDS = 60.0  # that the rounds of a stage should take, unless the size of the sample is given
_FEW = 32  # images of the first training steps
_TEMPLATES = 8  # that the sample uses at most


@contextmanager
def draw_sample(survey: Survey | ImageSurvey, *, seed: int, most: int, seconds: float = SECONDS) -> Iterator[Sample]:
    """A sample of at most ``most`` prompts or existing images, in a temporary folder that is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="synthgen-plan-") as folder:
        yield Sample(Path(folder), survey, seed, most, seconds)


@dataclass(frozen=True)
class Sample:
    """Two runs: ``probe`` with one image, ``rounds`` with a unit for each round."""

    folder: Path
    survey: Survey | ImageSurvey
    seed: int
    most: int  # images
    seconds: float  # that the rounds of a stage should take

    def measure(self, stage: Stage, counts: Counts) -> Measurement:
        """Run ``stage`` on the sample, after those that make what it reads.

        Raises:
            SynthgenError: it fails, for the reason that it would have in a run.
        """
        return run_in_process(MEASURED[stage.name], stage, self, counts)

    def run(self, name: str) -> Run:
        """``probe`` or ``rounds``."""
        return Run.create(self.folder / name, seed=self.seed)

    def restrict(self, stage: Generate | Attend, images: int, unit_size: int, batch_size: int) -> Generate | Attend:
        """``stage`` with so many images, of the sample's prompts or images."""
        batch_size = min(batch_size, unit_size)
        if isinstance(stage, Attend):
            assert isinstance(self.survey, ImageSurvey)
            folder = self.folder / "pictures"
            if not folder.exists():
                self.survey.write(folder)
            stage = replace(stage, images=str(folder), metadata="")
            return replace(stage, limit=images, unit_size=unit_size, batch_size=batch_size)
        assert isinstance(self.survey, Survey)
        templates = evenly_spaced(self.survey.templates, min(_TEMPLATES, images))
        lines = evenly_spaced(self.survey.lines, -(-images // max(1, len(templates))))
        ending = Path(stage.prompts).suffix if stage.prompts else ".jsonl"  # of the run's own copy
        prompts, template = self.folder / f"prompts{ending}", self.folder / "templates.txt"
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        template.write_text("\n".join(templates) + "\n", encoding="utf-8")
        stage = replace(stage, prompts=str(prompts), template=str(template) if templates else "")
        return replace(stage, images_per_prompt=images, limit=images, unit_size=unit_size, batch_size=batch_size)


# -- how each stage is measured


def _images(stage: Generate | Attend, sample: Sample, counts: Counts, meter: Meter) -> Measurement:
    device = devices_for(stage)[0]
    window = 1 if device == "cpu" else getattr(stage, "window", 1)  # of attend, which groups images of one shape
    (seconds,) = meter.work(sample.restrict(stage, 1, 1, 1), sample.run("probe"))
    affordable = int(min(sample.most, sample.seconds / seconds))
    size, rounds = rounds_of(min(window * stage.batch_size, stage.unit_size), sample.most, affordable, device)
    taken = meter.work(sample.restrict(stage, size * rounds, size, stage.batch_size), sample.run("rounds"))
    each = tuple(seconds / size for seconds in taken)
    batch = min(stage.batch_size, size)
    return Measurement(each, size * rounds, batch, meter.start_seconds, device, meter.memory(device))


def rounds_of(batch_size: int, most: int, affordable: int, device: str) -> tuple[int, int]:
    """Images of a round, and the number of rounds, if there are at most ``most`` and ``affordable`` fit in the time.

    On a GPU the batch is the pipeline's own, because memory depends on it; on a CPU that may take too long.
    """
    batch = min(batch_size, most if device.startswith("cuda") else max(1, affordable // ROUNDS))
    return batch, max(1, min(ROUNDS, affordable // batch))


def _masks(stage: Stage, sample: Sample, counts: Counts, meter: Meter) -> Measurement:
    return _unit_by_unit(stage, "masks", sample, meter, "cpu")


def _filter(stage: Stage, sample: Sample, counts: Counts, meter: Meter) -> Measurement:
    return _unit_by_unit(stage, "filter", sample, meter, devices_for(stage)[0])


def _unit_by_unit(stage: Stage, artifact: str, sample: Sample, meter: Meter, device: str) -> Measurement:
    meter.work(stage, sample.run("probe"))
    run = sample.run("rounds")
    seconds = meter.work(stage, run)
    return _took(meter, seconds, [len(run.keys(artifact, unit)) for unit in run.units(artifact)], device)


def _shards(stage: Shards, sample: Sample, counts: Counts, meter: Meter) -> Measurement:
    run = sample.run("rounds")
    stage = replace(
        stage,
        filtered=False,
        val_ratio=0.0,
        samples_per_shard=max(len(run.keys("images", unit)) for unit in run.units("images")),
    )
    meter.work(stage, sample.run("probe"))
    seconds = meter.work(stage, run)
    return _took(meter, seconds, [stage.size(run, shard) for shard in stage.plan(run)])


def _took(meter: Meter, seconds: list[float], images: list[int], device: str = "cpu") -> Measurement:
    each = tuple(taken / count for taken, count in zip(seconds, images, strict=True))
    return Measurement(each, sum(images), 1, meter.start_seconds, device, meter.memory(device))


def _pretrain(stage: Pretrain, sample: Sample, counts: Counts, meter: Meter) -> Measurement:
    device, batch = devices_for(stage)[0], counts.batch_size
    stage = replace(stage, batch_size=batch, start="")  # those weights may not exist yet, and cost a step no time
    if not stage.data:
        tars = sorted(sample.run("rounds").folder("shards").glob("train/*.tar"))
        stage = replace(stage, data=(str(link_tars(tars, sample.folder / "data", batch)),))
    few = max(stage.accumulate, min(batch, _FEW) // stage.accumulate * stage.accumulate)
    (seconds,) = _steps(stage, few, 2, sample.run("probe"), meter)
    if device.startswith("cuda") or ROUNDS * batch * seconds < sample.seconds:
        few = batch
    taken = _steps(stage, few, ROUNDS + 2, sample.run("rounds"), meter)[:-1]  # the last step writes a checkpoint
    return Measurement(tuple(taken), few * len(taken), few, meter.start_seconds, device, meter.memory(device))


def _steps(stage: Pretrain, batch: int, count: int, run: Run, meter: Meter) -> list[float]:
    """Seconds an image of each of ``count`` training steps of ``batch`` images but the first."""
    stage = replace(
        stage,
        samples_seen=count * batch,
        batch_size=batch,
        log_every=1,  # waits for a GPU
        save_every=10**9,
        snapshots=0,
        trackers=(),
    )
    steps = _StepTimes()
    meter.work(stage, run, steps)
    return [(after - before) / batch for before, after in pairwise(steps.ends)]


class _StepTimes(Progress):
    """When each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def advance(self, count: int) -> None:
        self.ends.append(time.perf_counter())


def _evaluate(stage: Evaluate, sample: Sample, counts: Counts, meter: Meter) -> Measurement:
    from synthgen.plan.evaluate import measure_evaluation

    return measure_evaluation(stage, sample, counts.evaluation, ROUNDS, meter)


#: How each stage is measured; others are not.
MEASURED: dict[str, Callable[..., Measurement]] = {
    "generate": _images,
    "attend": _images,
    "masks": _masks,
    "filter": _filter,
    "shards": _shards,
    "pretrain": _pretrain,
    "evaluate": _evaluate,
}
