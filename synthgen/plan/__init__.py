"""Estimate what a pipeline costs before it starts: images, units, bytes, hours and memory.

:mod:`synthgen.plan.count` counts what there is to do, :mod:`synthgen.plan.sample` measures a small sample, and this
module extrapolates from the sample to all of it. Every figure comes with its basis.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from synthgen.config import Choice
from synthgen.devices import devices_for, place
from synthgen.engines import Engine, default_engine
from synthgen.errors import MissingArtifact, SynthgenError
from synthgen.pipeline import Pipeline
from synthgen.plan.count import Counts, count, image_stage
from synthgen.plan.files import tar_files, training_bytes
from synthgen.plan.meter import Measurement
from synthgen.plan.sample import MEASURED, ROUNDS, SECONDS, Sample, draw_sample
from synthgen.plan.source import ImageSurvey, survey_copy, survey_images
from synthgen.prompts import Survey, survey_prompts
from synthgen.run import Run
from synthgen.runner import EngineLike, check_engine
from synthgen.stages import Stage
from synthgen.stages.attend import Attend
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.generate import Generate
from synthgen.stages.pretrain import Pretrain
from synthgen.stores import parse_location
from synthgen.stores.remote import RemotePath
from synthgen.text import size

__all__ = ["Estimate", "Plan", "StagePlan", "pipeline_of", "plan"]

_FEW = 64  # existing images to choose the sample from, unless it is larger


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its basis."""

    value: float
    basis: str  # such as "extrapolated from 48 images in 3 rounds"
    low: float | None = None  # if all rounds were like the fastest; None: only one was measured
    high: float | None = None  # if all were like the slowest


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage will cost."""

    stage: str
    artifacts: tuple[str, ...]
    units: int
    units_left: int
    images: int  # that it makes, packs or looks at; of a training those that it sees, each as often as it does
    images_left: int
    basis: str  # of these numbers
    seconds: Estimate | None = None  # of one worker for what is left, with its start; None: not measured
    start_seconds: float | None = None  # of every worker, before its first image
    workers: int | None = None  # that there will be; None: as many as the engine finds
    at_best_seconds: Estimate | None = None  # with these workers, and the start, if none slows another down
    memory: Estimate | None = None  # bytes, of each worker
    sample: str = ""  # what was measured, such as "48 images in 3 rounds"
    bytes: dict[str, Estimate] = field(default_factory=dict)  # of each finished artifact
    unknown: str = ""  # why something was not measured


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that ``synthgen plan`` reports."""

    file: str
    run: str
    seed: int
    engine: str
    prompts: int  # templates applied; 0 for existing images
    images: int
    stages: tuple[StagePlan, ...]
    seconds: Estimate | None  # the sum over the stages that were measured
    at_best_seconds: Estimate | None
    bytes: Estimate | None
    disk_free: int | None  # bytes where the run lies; None: not on a disk of this machine
    device: str  # on which the images of the sample were made; empty: there was no sample
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def pipeline_of(stage: Stage, run: str | Path) -> Pipeline:
    """A pipeline of one stage, on a run that may exist already."""
    try:
        seed = Run.open(run).seed
    except MissingArtifact:
        seed = 0
    return Pipeline(Path(f"synthgen {stage.name}"), parse_location(run), seed, Choice(default_engine()), (stage,))


def plan(
    pipeline: Pipeline,
    *,
    engine: EngineLike = None,
    workers: int = 0,
    measure: bool = True,
    sample: int = 0,
    describe: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Count what a pipeline will make, and measure a sample of it. Nothing is written to its run.

    Args:
        pipeline: with the stage ``generate`` or ``attend``.
        engine: instead of the pipeline's; see :meth:`~synthgen.pipeline.Pipeline.resolve_engine`.
        workers: that will share the work; 0: as many as the engine would start here.
        measure: measure a sample; otherwise only count, and load no model.
        sample: its images, at most; 0: three batches, or as many as fit in about a minute.
        describe: called before each step with its description.

    Raises:
        PipelineError: it makes no images, or a stage reads what none before it makes.
        MissingArtifact, PromptError, StaleArtifact, ConfigError, MissingWeights: what the run would be refused for.
    """
    first, engine = image_stage(pipeline), pipeline.resolve_engine(engine)
    engines = [check_engine(stage, engine) for stage in pipeline.stages]
    stages = [stage.complete() for stage in pipeline.stages]
    most = sample or ROUNDS * first.batch_size * getattr(first, "window", 1)
    describe(f"counting {', '.join(first.source_names())}")
    survey = _survey(first, most, Run(parse_location(pipeline.run), pipeline.seed))
    notes: list[str] = []
    describe(f"counting what there is to do in {pipeline.run}")
    counts = count(pipeline, survey, notes)
    plans = [_stage_plan(stage, counted) for stage, counted in zip(stages, counts, strict=True)]
    images, device = counts[stages.index(first)].images, ""
    if measure and any(counted.units_left for counted in counts):
        seconds = inf if sample else SECONDS
        with draw_sample(survey, seed=pipeline.seed, most=min(most, images), seconds=seconds) as drawn:
            device = _measure(stages, counts, engines, drawn, workers, plans, describe)
    notes += [f"{plan.stage}: {plan.unknown}" for plan in plans if plan.unknown]
    free = _disk_free(pipeline.run)
    left = sum(made.value * plan.images_left / max(plan.images, 1) for plan in plans for made in plan.bytes.values())
    if free is not None and left > free:
        notes.append(f"{pipeline.run} will take {size(round(left))} more, and {size(free)} are free there")
    return Plan(
        str(pipeline.path),
        str(pipeline.run),
        pipeline.seed,
        _name(engines[0]),
        0 if isinstance(survey, ImageSurvey) else survey.count,
        images,
        tuple(plans),
        _sum(plan.seconds for plan in plans if plan.seconds),
        _sum(plan.at_best_seconds for plan in plans if plan.at_best_seconds),
        _sum(made for plan in plans for made in plan.bytes.values()),
        free,
        device,
        tuple(notes),
    )


def _survey(stage: Generate | Attend, most: int, run: Run) -> Survey | ImageSurvey:
    if isinstance(stage, Attend):
        return survey_images(stage.images, stage.metadata, limit=stage.limit, most=max(_FEW, most))
    own = stage.own_prompts(run)
    return survey_prompts(stage.prompts, stage.template or None) if own is None else survey_copy(own)


def _stage_plan(stage: Stage, counted: Counts) -> StagePlan:
    numbers = (counted.units, counted.units_left, counted.images, counted.images_left)
    unknown = "" if stage.name in MEASURED else "not estimated"
    if isinstance(stage, Evaluate) and not counted.evaluation.test:
        unknown = "not measured, because masks are compared in milliseconds"
    return StagePlan(stage.name, stage.artifacts(), *numbers, counted.basis, unknown=unknown)


def _measure(
    stages: Sequence[Stage],
    counts: Sequence[Counts],
    engines: Sequence[Engine],
    sample: Sample,
    workers: int,
    plans: list[StagePlan],
    describe: Callable[[str], None],
) -> str:
    """Put estimates into ``plans`` up to the last stage with something to do; the device that made the images.

    Raises:
        SynthgenError: not even the images can be made.
    """
    device, last = "", max(index for index, counted in enumerate(counts) if counted.units_left)
    for index, (stage, counted) in enumerate(zip(stages[: last + 1], counts[: last + 1], strict=True)):
        if plans[index].unknown:
            continue
        describe(f"trying {stage.name} on a small sample")
        try:
            measured = sample.measure(stage, counted)
        except SynthgenError as error:
            if not device:
                raise
            plans[index] = replace(plans[index], unknown=f"could not be measured: {error}")
            because = f"not measured, because {stage.name} was not"
            plans[index + 1 :] = [replace(later, unknown=because) for later in plans[index + 1 :]]
            break
        device = device or measured.device
        estimated = _with_estimates(plans[index], stage, counted, measured, engines[index], workers)
        plans[index] = replace(estimated, bytes=_bytes(stage, counted, measured, sample))
    return device


# -- estimates


def _with_estimates(
    plan: StagePlan, stage: Stage, counted: Counts, measured: Measurement, engine: Engine, workers: int
) -> StagePlan:
    """``plan`` with time and memory."""
    basis = "; ".join([f"extrapolated from {measured.sample}", *measured.parts])
    started, working = _workers(stage, engine, workers, counted.units_left)
    slowest = counted.images_left / working if stage.collective else _most_images(counted, working)
    start = measured.start_seconds if counted.units_left else 0.0
    return replace(
        plan,
        seconds=_extrapolate(measured.rounds, counted.images_left, basis, start),
        start_seconds=measured.start_seconds,
        workers=started,
        at_best_seconds=_extrapolate(measured.rounds, slowest, basis, start) if started else None,
        memory=Estimate(measured.memory + measured.features, _memory_basis(stage, counted, measured)),
        sample=measured.sample,
    )


def _memory_basis(stage: Stage, counted: Counts, measured: Measurement) -> str:
    on_gpu = measured.device.startswith("cuda")
    basis = f"the peak by torch on {measured.device}" if on_gpu else "the peak of a process beyond its start"
    if measured.features:
        basis += f", and {size(measured.features)} for the features of all images"
    batch = counted.batch_size or getattr(stage, "batch_size", measured.batch)
    batch = min(batch, max(counted.tars, default=batch))  # a batch is never larger than a unit
    if measured.batch < batch:
        basis += f", in batches of {measured.batch}; those of the pipeline are of {batch} and will take more"
    return basis


def _most_images(counted: Counts, workers: int) -> float:
    """Images of the worker that has the most units."""
    return min(counted.images_left, -(-counted.units_left // workers) * max(counted.tars, default=0))


def _workers(stage: Stage, engine: Engine, given: int, units: int) -> tuple[int | None, int]:
    """The workers that start (None: only the engine knows), and how many of them can work at the same time."""
    name, given = _name(engine), given or getattr(engine, "workers", 0)
    if isinstance(stage, Evaluate):  # in one process with every engine
        return 1, 1
    if name == "accelerate":
        processes = given or place().size
        return processes, processes
    if stage.collective:
        return 1, 1
    if name == "local":
        devices = len(devices_for(stage))
        started = max(1, min(given or devices, units))
        return started, min(started, devices)
    return given or None, given or 1


def _name(engine: Engine) -> str:
    return type(engine).__module__.rpartition(".")[2]


def _extrapolate(rounds: Sequence[float], factor: float, basis: str, start: float = 0.0) -> Estimate:
    """The mean of the rounds and their bounds, each times ``factor``, plus ``start``."""
    mean, low, high = (each * factor + start for each in (fmean(rounds), min(rounds), max(rounds)))
    return Estimate(mean, basis, low, high) if len(rounds) > 1 else Estimate(mean, basis)


def _bytes(stage: Stage, counted: Counts, measured: Measurement, sample: Sample) -> dict[str, Estimate]:
    """The size of each finished artifact; scores are a few kilobytes and left out."""
    from synthgen.train.checkpoint import Checkpoints

    probe, rounds = sample.run("probe"), sample.run("rounds")
    if isinstance(stage, Pretrain):
        (name,), steps = stage.artifacts(), counted.images // counted.batch_size
        kept, records = min(Checkpoints.keep, -(-steps // stage.save_every)), -(-steps // stage.log_every)
        total = training_bytes(rounds.folder(name), checkpoints=kept, snapshots=stage.snapshots, records=records)
        return {name: Estimate(total, f"measured: one checkpoint, times the {kept} that are kept; the encoder")}
    found = {}
    for name in stage.artifacts():
        files = tar_files(probe, rounds, name)
        each, basis = files.content, f"extrapolated from {measured.sample}"
        mean, low, high = (files.total(counted.tars, content) for content in (fmean(each), min(each), max(each)))
        found[name] = Estimate(mean, basis, low, high) if len(each) > 1 else Estimate(mean, basis)
    return found


def _sum(estimates: Iterable[Estimate]) -> Estimate | None:
    """The sum; an estimate without bounds adds its value to both bounds."""
    parts = list(estimates)
    if not parts:
        return None
    low = sum(part.value if part.low is None else part.low for part in parts)
    high = sum(part.value if part.high is None else part.high for part in parts)
    return Estimate(sum(part.value for part in parts), "sum", low, high)


def _disk_free(run: Path) -> int | None:
    """Bytes that are free on the disk of the run; None for a store."""
    folder = parse_location(run)
    if isinstance(folder, RemotePath):
        return None
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
