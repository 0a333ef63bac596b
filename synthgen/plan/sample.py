"""What a plan measures: a few images, masks, a shard, training steps and scores, made in a run that is deleted.

Each stage works in a fresh process, as a worker of its own would: first on one image, which warms everything up and
tells how much can be afforded, then in a few rounds that count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.devices import devices_for
from synthgen.plan.evaluate import measure_evaluation
from synthgen.plan.files import TarFiles, TrainingFiles, repeated, tar_files, training_files
from synthgen.plan.meter import Meter, Took, in_a_process
from synthgen.plan.source import Pictures
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

__all__ = ["MEASURED", "ROUNDS", "SECONDS", "Sample", "sampled"]

ROUNDS = 3  # that are timed
SECONDS = 60.0  # that the rounds of a stage should take, unless somebody asks for more
_FEW = 32  # images of the first training steps
_TEMPLATES = 8  # that the sample uses at most


@contextmanager
def sampled(survey: Survey | Pictures, *, seed: int, most: int, seconds: float = SECONDS) -> Iterator[Sample]:
    """A sample of prompts, or of images that exist, in a temporary folder, which is deleted in the end.

    Args:
        survey: what the prompt file holds, or the source of images.
        seed: of the run.
        most: images.
        seconds: that the rounds of a stage should take.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="synthgen-plan-") as folder:
        yield Sample(Path(folder), survey, seed, most, seconds)


@dataclass(frozen=True)
class Sample:
    """Two runs: ``probe`` with one image, ``rounds`` with a unit for each round."""

    folder: Path
    survey: Survey | Pictures
    seed: int
    most: int
    seconds: float

    def take(self, stage: Stage, counted: Counts) -> Took:
        """Let ``stage`` work on the sample, after those that make what it reads.

        Raises:
            SynthgenError: it cannot, for the reason that it would give in a run.
        """
        return in_a_process(MEASURED[stage.name], stage, self, counted)

    def run(self, name: str) -> Run:
        """``probe`` or ``rounds``."""
        return Run.create(self.folder / name, seed=self.seed)

    def tar_files(self, artifact: str) -> TarFiles:
        """What the files of an artifact take."""
        return tar_files(self.run("probe"), self.run("rounds"), artifact)

    def training_files(self, stage: Pretrain) -> TrainingFiles:
        """What a training leaves behind."""
        return training_files(self.run("rounds").folder(*stage.artifacts()))

    def first(self, stage: Generate | Attend, images: int, unit_size: int, batch_size: int) -> Generate | Attend:
        """``stage`` with so many images, of prompts or images of the sample."""
        batch_size = min(batch_size, unit_size)
        if isinstance(stage, Attend):
            assert isinstance(self.survey, Pictures)
            folder = self.folder / "pictures"
            if not folder.exists():
                self.survey.write(folder)
            seen = replace(stage, images=str(folder), metadata="")
            return replace(seen, limit=images, unit_size=unit_size, batch_size=batch_size)
        assert isinstance(self.survey, Survey)
        few = _spread(self.survey.templates, min(_TEMPLATES, images))
        lines = _spread(self.survey.lines, -(-images // max(1, len(few))))
        ending = Path(stage.prompts).suffix if stage.prompts else ".jsonl"  # of the run's own copy
        prompts, template = self.folder / f"prompts{ending}", self.folder / "templates.txt"
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        template.write_text("\n".join(few) + "\n", encoding="utf-8")
        drawn = replace(stage, prompts=str(prompts), template=str(template) if few else "", images_per_prompt=images)
        return replace(drawn, limit=images, unit_size=unit_size, batch_size=batch_size)


def _spread(items: tuple[str, ...], count: int) -> list[str]:
    """``count`` of the items, evenly apart; all, where there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


# -- what each stage does with the sample


def _first(stage: Generate | Attend, sample: Sample, counted: Counts, meter: Meter) -> Took:
    device = devices_for(stage)[0]
    window = 1 if device == "cpu" else getattr(stage, "window", 1)  # of attend, which chooses images of one shape
    (seconds,) = meter.work(sample.first(stage, 1, 1, 1), sample.run("probe"))
    affordable = int(min(sample.most, sample.seconds / seconds))
    size, rounds = rounds_of(min(window * stage.batch_size, stage.unit_size), sample.most, affordable, device)
    images = size * rounds
    taken = meter.work(sample.first(stage, images, size, stage.batch_size), sample.run("rounds"))
    each = tuple(seconds / size for seconds in taken)
    batch = min(stage.batch_size, size)
    return Took(each, images, batch, meter.start_seconds, device, meter.memory(device))


def rounds_of(batch_size: int, most: int, affordable: int, device: str) -> tuple[int, int]:
    """How many images to make together, and how often, if there may be ``most`` and time is for ``affordable``.

    On a GPU the batch is the pipeline's own, because memory depends on it; on a CPU that may take too long.
    """
    batch = min(batch_size, most if device.startswith("cuda") else max(1, affordable // ROUNDS))
    return batch, max(1, min(ROUNDS, affordable // batch))


def _masks(stage: Stage, sample: Sample, counted: Counts, meter: Meter) -> Took:
    meter.work(stage, sample.run("probe"))
    run = sample.run("rounds")
    return _took(meter, meter.work(stage, run), [len(run.keys("masks", unit)) for unit in run.units("masks")])


def _shards(stage: Shards, sample: Sample, counted: Counts, meter: Meter) -> Took:
    run = sample.run("rounds")
    stage = replace(
        stage, val_ratio=0.0, samples_per_shard=max(len(run.keys("images", unit)) for unit in run.units("images"))
    )
    meter.work(stage, sample.run("probe"))
    taken = meter.work(stage, run)
    return _took(meter, taken, [stage.size(run, shard) for shard in stage.plan(run)])


def _took(meter: Meter, taken: list[float], counts: list[int]) -> Took:
    each = tuple(seconds / count for seconds, count in zip(taken, counts, strict=True))
    return Took(each, sum(counts), 1, meter.start_seconds, "cpu", meter.memory("cpu"))


def _pretrain(stage: Pretrain, sample: Sample, counted: Counts, meter: Meter) -> Took:
    device, whole = devices_for(stage)[0], counted.batch_size
    stage = replace(stage, batch_size=whole, start="")  # which may not be there yet, and costs no step anything
    if not stage.data:
        tars = sorted(sample.run("rounds").folder("shards").glob("train/*.tar"))
        stage = replace(stage, data=(str(repeated(tars, sample.folder / "data", whole)),))
    shares = stage.accumulate
    few = max(shares, min(whole, _FEW) // shares * shares)
    (seconds,) = _steps(stage, few, 2, sample.run("probe"), meter)
    if device.startswith("cuda") or ROUNDS * whole * seconds < sample.seconds:
        few = whole
    taken = _steps(stage, few, ROUNDS + 2, sample.run("rounds"), meter)[:-1]  # the last step writes a checkpoint
    return Took(tuple(taken), few * len(taken), few, meter.start_seconds, device, meter.memory(device))


def _steps(stage: Pretrain, batch: int, count: int, run: Run, meter: Meter) -> list[float]:
    """Seconds an image of each of ``count`` training steps of ``batch`` images but the first."""
    stage = replace(
        stage,
        samples_seen=count * batch,
        batch_size=batch,
        log_every=1,  # so that a GPU is waited for
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


def _evaluate(stage: Evaluate, sample: Sample, counted: Counts, meter: Meter) -> Took:
    assert counted.judged is not None
    return measure_evaluation(stage, sample, counted.judged, ROUNDS, meter)


#: How each stage is measured; what is not here is not.
MEASURED: dict[str, Callable[..., Took]] = {
    "generate": _first,
    "attend": _first,
    "masks": _masks,
    "shards": _shards,
    "pretrain": _pretrain,
    "evaluate": _evaluate,
}
