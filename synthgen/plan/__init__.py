"""What a pipeline will cost before it starts: images, units, bytes, hours and memory.

Prompts are counted line by line, as ``generate`` would read them, images that exist as ``attend`` would
(:mod:`synthgen.plan.count`). Time, bytes and memory are those of a small sample that is really made
(:mod:`synthgen.plan.sample`), times what there is. Every figure says what it stands on.
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
from synthgen.plan.count import Counts, count, first_of
from synthgen.plan.meter import Took
from synthgen.plan.sample import MEASURED, ROUNDS, SECONDS, Sample, sampled
from synthgen.plan.source import Pictures, survey_copy, survey_pictures
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

_FEW = 64  # images of a source that a sample may be made of, unless it needs more


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and what it stands on."""

    value: float
    basis: str  # such as "extrapolated from 48 images in 3 rounds"
    low: float | None = None  # were all like the cheapest of the rounds that were measured
    high: float | None = None  # or like the dearest; None where only one was measured


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
    bytes: dict[str, Estimate] = field(default_factory=dict)  # of each artifact, whole
    unknown: str = ""  # why something was not measured

    @property
    def share_left(self) -> float:
        """Of the images, those that are left."""
        return self.images_left / max(self.images, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that ``synthgen plan`` tells."""

    file: str
    run: str
    seed: int
    engine: str
    prompts: int  # templates applied; 0 where the images are there already
    images: int
    stages: tuple[StagePlan, ...]
    seconds: Estimate | None  # the sum over the stages that were measured
    at_best_seconds: Estimate | None
    bytes: Estimate | None
    disk_free: int | None  # bytes where the run lies; None: not on a disk of this machine
    device: str  # that images were drawn on for the sample; empty: there was none
    notes: tuple[str, ...]  # what a person should know

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def pipeline_of(stage: Stage, run: str | Path) -> Pipeline:
    """A pipeline of one stage, on a run that may be there already."""
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
        workers: that will share the work; 0: as many as the engine would take here.
        measure: make a sample; without it there are counts alone, and no model is loaded.
        sample: images of it, at most; 0: three batches, or what can be drawn in about a minute.
        describe: is told what is counted or made, before it is.

    Raises:
        PipelineError: it makes no images, or a stage reads what none before it makes.
        MissingArtifact, PromptError, StaleArtifact, ConfigError, MissingWeights: what the run would be refused for.
    """
    first = first_of(pipeline)
    engine = pipeline.resolve_engine(engine)
    engines = [check_engine(stage, engine) for stage in pipeline.stages]
    most = sample or ROUNDS * first.batch_size * getattr(first, "window", 1)
    describe(f"counting {', '.join(first.source_names())}")
    survey = _survey(first, most, Run(parse_location(pipeline.run), pipeline.seed))
    notes: list[str] = []
    lines = [stage.complete() for stage in pipeline.stages]
    describe(f"counting what there is to do in {pipeline.run}")
    counts = count(pipeline, survey, notes)
    plans = [_counted(stage, counted) for stage, counted in zip(lines, counts, strict=True)]
    total = counts[lines.index(first)].images
    device = ""
    if measure and any(counted.units_left for counted in counts):
        seconds = inf if sample else SECONDS
        with sampled(survey, seed=pipeline.seed, most=min(most, total), seconds=seconds) as made:
            device = _measure(lines, counts, engines, made, workers, plans, describe)
    notes += [f"{plan.stage}: {plan.unknown}" for plan in plans if plan.unknown]
    whole = _sum(made for plan in plans for made in plan.bytes.values())
    free = _free(pipeline.run)
    left = sum(sum(made.value for made in plan.bytes.values()) * plan.share_left for plan in plans)
    if free is not None and left > free:
        notes.append(f"{pipeline.run} will take {size(round(left))} more, and {size(free)} are free there")
    return Plan(
        str(pipeline.path),
        str(pipeline.run),
        pipeline.seed,
        _name(engines[0]),
        0 if isinstance(survey, Pictures) else survey.count,
        total,
        tuple(plans),
        _sum(plan.seconds for plan in plans if plan.seconds),
        _sum(plan.at_best_seconds for plan in plans if plan.at_best_seconds),
        whole,
        free,
        device,
        tuple(notes),
    )


def _survey(stage: Generate | Attend, most: int, run: Run) -> Survey | Pictures:
    if isinstance(stage, Attend):
        return survey_pictures(stage.images, stage.metadata, limit=stage.limit, most=max(_FEW, most))
    own = stage.own_prompts(run)
    if own is not None:
        return survey_copy(own)
    return survey_prompts(stage.prompts, stage.template or None)


def _counted(stage: Stage, counted: Counts) -> StagePlan:
    numbers = (counted.units, counted.units_left, counted.images, counted.images_left)
    unknown = "" if stage.name in MEASURED else "not estimated"
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
    """Put estimates into ``plans`` as far as something is left to do; the device that images were drawn on."""
    device = ""
    for index, (stage, counted) in enumerate(zip(stages, counts, strict=True)):
        if not any(later.units_left for later in counts[index:]):
            break
        if stage.name not in MEASURED:
            continue
        describe(f"trying {stage.name} on a small sample")
        try:
            took = sample.take(stage, counted)
        except SynthgenError as error:
            if not device:  # not even an image
                raise
            for later, plan in enumerate(plans[index:], start=index):
                why = (
                    f"could not be measured: {error}"
                    if later == index
                    else f"not measured, because {stage.name} was not"
                )
                plans[later] = replace(plan, unknown=why)
            break
        device = device or took.device
        plans[index] = _estimated(plans[index], stage, counted, took, engines[index], workers)
        plans[index] = replace(plans[index], bytes=_bytes(stage, counted, took, sample))
    return device


# -- estimates


def _estimated(plan: StagePlan, stage: Stage, counted: Counts, took: Took, engine: Engine, workers: int) -> StagePlan:
    """With time and memory."""
    basis = f"extrapolated from {took.basis}"
    there, together = _workers(stage, engine, workers, counted.units_left)
    slowest = counted.images_left / together if stage.collective else _busiest(counted, together)
    once = took.start_seconds if counted.units_left else 0.0
    memory = f"the peak by torch on {took.device}" if took.on_gpu else "the peak of a process beyond its start"
    if took.held:
        memory += f", and {size(took.held)} for the features of all images (what evaluators copy is as in the sample)"
    asked = counted.batch_size or getattr(stage, "batch_size", took.batch)
    asked = min(asked, max(counted.tars, default=asked))  # a batch is never larger than a unit
    if took.batch < asked:
        memory += f", in batches of {took.batch}; those of the pipeline are of {asked} and will take more"
    return replace(
        plan,
        seconds=_scaled(took.rounds, counted.images_left, basis, once),
        start_seconds=took.start_seconds,
        workers=there,
        at_best_seconds=_scaled(took.rounds, slowest, basis, once) if there else None,
        memory=Estimate(took.memory + took.held, memory),
        sample=took.sample,
    )


def _busiest(counted: Counts, workers: int) -> float:
    """Images of the worker that has the most units."""
    return min(counted.images_left, -(-counted.units_left // workers) * max(counted.tars, default=0))


def _workers(stage: Stage, engine: Engine, asked: int, units: int) -> tuple[int | None, int]:
    """How many workers there will be, None where only the engine can tell; and how many of them can work at once."""
    name, asked = _name(engine), asked or getattr(engine, "workers", 0)
    if isinstance(stage, Evaluate):  # all of it is one piece of work
        return 1, 1
    if name == "accelerate":
        processes = asked or place().size
        return processes, processes
    if stage.collective:
        return 1, 1
    if name == "local":
        devices = len(devices_for(stage))
        there = max(1, min(asked or devices, units))
        return there, min(there, devices)
    return asked or None, asked or 1


def _name(engine: Engine) -> str:
    return type(engine).__module__.rpartition(".")[2]


def _scaled(rounds: Sequence[float], factor: float, basis: str, once: float = 0.0) -> Estimate:
    """The mean of the rounds and their bounds, each times ``factor``, plus ``once``."""
    low, high = (min(rounds), max(rounds)) if len(rounds) > 1 else (None, None)
    mean, *bounds = (None if each is None else each * factor + once for each in (fmean(rounds), low, high))
    return Estimate(mean or 0.0, basis, *bounds)


def _bytes(stage: Stage, counted: Counts, took: Took, sample: Sample) -> dict[str, Estimate]:
    """What each artifact takes on disk, when all is done."""
    if isinstance(stage, Pretrain):
        return {stage.artifacts()[0]: _training_bytes(stage, counted, sample)}
    if isinstance(stage, Evaluate):
        return {stage.name: Estimate(took.files, "measured: the scores of the sample")}
    found = {}
    for name in stage.artifacts():
        files = sample.tar_files(name)
        each = files.content
        mean, low, high = (files.total(counted.tars, content) for content in (fmean(each), min(each), max(each)))
        bounds = (low, high) if len(each) > 1 else (None, None)
        found[name] = Estimate(mean, f"extrapolated from {took.basis}", *bounds)
    return found


def _training_bytes(stage: Pretrain, counted: Counts, sample: Sample) -> Estimate:
    from synthgen.train.checkpoint import Checkpoints

    files, steps = sample.training_files(stage), counted.images // counted.batch_size
    kept = min(Checkpoints.keep, -(-steps // stage.save_every))
    records = -(-steps // stage.log_every)
    total = kept * files.checkpoint + files.rest + stage.snapshots * files.encoder + records * files.record
    return Estimate(total, f"measured: one checkpoint, of which {kept} stay; the encoder")


def _sum(estimates: Iterable[Estimate]) -> Estimate | None:
    """All together; what has no bounds counts as it is in the sum's."""
    parts = list(estimates)
    if not parts:
        return None
    low, high = (
        sum(part.value if bound is None else bound for part, bound in zip(parts, bounds, strict=True))
        for bounds in ([part.low for part in parts], [part.high for part in parts])
    )
    return Estimate(sum(part.value for part in parts), "sum", low, high)


# -- the machine


def _free(run: Path) -> int | None:
    """Bytes that are free where the run lies, or will."""
    folder = parse_location(run)
    if isinstance(folder, RemotePath):
        return None
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
