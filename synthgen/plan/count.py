"""How much a pipeline has to do: images, units and training steps, in all and left. Nothing is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from synthgen.errors import ConfigError, MissingArtifact, PipelineError, StaleArtifact
from synthgen.pipeline import Pipeline
from synthgen.plan.source import ImageSurvey, survey_images
from synthgen.prompts import Survey, iter_prompts
from synthgen.records import Prompt, sample_key
from synthgen.rejected import FILTER
from synthgen.run import Run
from synthgen.stages import Stage
from synthgen.stages._eval_sources import open_source, used_samples
from synthgen.stages._init_weights import find_start
from synthgen.stages._layout import split_of
from synthgen.stages.attend import Attend
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.filter import Filter
from synthgen.stages.generate import Generate
from synthgen.stages.masks import Masks
from synthgen.stages.pretrain import Pretrain
from synthgen.stages.shards import Shards
from synthgen.stores import parse_location
from synthgen.units import sample_counts

__all__ = ["Counts", "EvalCounts", "count", "image_stage"]

_MAX_UNITS = 10**6  # that a key can number
_MAX_SPLIT = 10**6  # images, at most, whose split is computed one by one; of more the ratio is used
_MAX_PROMPTS = 10**5  # prompts, at most, whose labels are counted


@dataclass(frozen=True)
class EvalCounts:
    """What an evaluation looks at, at most."""

    train: int = 0  # images to learn from
    test: int = 0  # images to test on
    classes: int = 0  # 0: not known before the images are there
    truth: int = 0  # images with true masks
    encoder: str = ""  # its folder or hub id; empty: only masks or a generator are evaluated


@dataclass(frozen=True)
class Counts:
    """What a stage has to do."""

    units: int
    units_left: int
    images: int  # that it makes, packs or looks at; of a training those that it sees, each as often as it does
    images_left: int
    tars: Mapping[int, int] = field(default_factory=dict)  # images in a tar → number of such tars
    basis: str = "counted"
    train: int = 0  # images of the training split, of shards
    batch_size: int = 0  # of a training or an evaluation: smaller than asked for, where there are fewer images
    evaluation: EvalCounts = EvalCounts()


_NOTHING = Counts(0, 0, 0, 0)


def image_stage(pipeline: Pipeline) -> Generate | Attend:
    """The stage whose prompts or images are counted, with every option of its backbone.

    Raises:
        PipelineError: there is none.
    """
    for stage in pipeline.stages:
        if isinstance(stage, Generate | Attend):
            return stage.complete()
    raise PipelineError(
        f"{pipeline.path} has neither generate nor attend, and a plan counts what they make; add stages.generate or "
        "stages.attend, or give --prompts or --images"
    )


def count(pipeline: Pipeline, survey: Survey | ImageSurvey, notes: list[str]) -> list[Counts]:
    """What each stage has to do; remarks for the user are added to ``notes``.

    Raises:
        PipelineError: a stage reads what neither an earlier one nor the run has.
        StaleArtifact, MissingArtifact, ConfigError: what the run itself would be refused for.
    """
    counter = _Counter(pipeline.path, _run_of(pipeline), survey, notes)
    return [counter.count(stage.complete()) for stage in pipeline.stages]


def _run_of(pipeline: Pipeline) -> Run:
    """The run as it is, or as it will be.

    Raises:
        StaleArtifact: it was started with another seed.
    """
    try:
        run = Run.open(pipeline.run)
    except MissingArtifact:
        return Run(parse_location(pipeline.run), pipeline.seed)
    if run.seed != pipeline.seed and run.artifacts():
        raise StaleArtifact(
            f"{pipeline.run} was made with seed {run.seed}, not {pipeline.seed}; choose another --run folder"
        )
    return replace(run, seed=pipeline.seed)


@dataclass
class _Counter:
    """Counts stage after stage; each depends on those before it."""

    path: Path
    run: Run
    survey: Survey | ImageSurvey
    notes: list[str]
    up_to_date: bool = True  # every stage so far has nothing left to do
    made: set[str] = field(default_factory=set)  # artifacts of the stages so far
    first: Generate | Attend | None = None
    images: Counts = _NOTHING
    finished_images: set[int] = field(default_factory=set)  # units
    shards: Counts = _NOTHING
    val_images: int = 0
    training: Pretrain | None = None  # the last one
    unfinished_trainings: set[Path] = field(default_factory=set)  # their folders

    def count(self, stage: Stage) -> Counts:
        """What ``stage`` has to do after those before it."""
        for artifact in stage.reads:
            if artifact not in self.made and not self._in_run(artifact):
                raise PipelineError(
                    f"{self.path}: stages.{stage.name} reads {artifact}, which no stage before it makes and "
                    f"{self.run.path} does not hold; add the stage that makes it"
                )
        if isinstance(stage, Generate | Attend):
            self.first, self.images = stage, self._images(stage)
            found = self.images
        elif isinstance(stage, Masks | Filter):
            found = self._left(stage, self.images)
        elif isinstance(stage, Shards):
            found = self.shards = self._shards(stage)
        elif isinstance(stage, Pretrain):
            self.training, found = stage, self._pretrain(stage)
        else:
            found = self._evaluate(stage) if isinstance(stage, Evaluate) else _NOTHING
        self.made.update(stage.writes)
        self.up_to_date = self.up_to_date and not found.units_left
        return found

    def _in_run(self, artifact: str) -> bool:
        try:
            return bool(self.run.artifact(artifact))
        except (MissingArtifact, ConfigError):  # there is none, or not even a run
            return False

    def _images(self, stage: Generate | Attend) -> Counts:
        images = self.survey.count * (stage.images_per_prompt if isinstance(stage, Generate) else 1)
        images = min(images, stage.limit) if stage.limit else images
        full, rest = divmod(images, stage.unit_size)
        units = full + bool(rest)
        if units > _MAX_UNITS:
            raise ConfigError(
                f"{images:,} images in units of {stage.unit_size} are {units:,} units, of {_MAX_UNITS:,} at most; "
                f"set unit_size of stages.{stage.name} to {-(-images // _MAX_UNITS)} or more"
            )
        return self._left(stage, Counts(units, units, images, images, _tars([images], stage.unit_size)))

    def _left(self, stage: Stage, planned: Counts) -> Counts:
        """``planned`` without the finished units. The last one may be of a run that was smaller, and is made again.

        Raises:
            StaleArtifact: the units were made with other settings.
        """
        if not all(map(self._in_run, stage.artifacts())):
            return replace(planned, units_left=planned.units, images_left=planned.images)
        fingerprint, unit_size = self.run.check(stage)["fingerprint"], max(planned.tars)
        sizes = {unit: min(unit_size, planned.images - unit * unit_size) for unit in range(planned.units)}
        finished = set(sizes) if "images" in stage.artifacts() else set(self.finished_images)
        for name in stage.artifacts():
            found = self.run.finished_units(name, fingerprint)
            least = sizes if name == "images" else sample_counts(self.run.folder("images"), list(found))
            finished &= {unit for unit in found if found[unit] >= least.get(unit, 0)}
        if "images" in stage.artifacts():
            self.finished_images = finished
        images_left = planned.images - sum(sizes[unit] for unit in finished)
        return replace(planned, units_left=planned.units - len(finished), images_left=images_left)

    def _shards(self, stage: Shards) -> Counts:
        if self.up_to_date:  # so that the keys of all images are known
            run = self._claimed(stage)
            layout, todo = stage.layout(run), stage.todo(run)
            sizes = [len(shard) for shard in layout]
            train = sum(len(shard) for shard in layout if shard.split == "train")
            self.val_images = sum(sizes) - train
            left = sum(sizes[unit] for unit in todo)
            return Counts(len(sizes), len(todo), sum(sizes), left, Counter(sizes), train=train)
        if self.images.units_left and self._in_run("shards"):
            self.notes.append(
                f"{self.run.folder('shards')} has the images made so far; when there are more, delete it first"
            )
        images, basis = self.images.images, "counted"
        if stage.filtered and FILTER in self.made:
            basis += "; a filter may leave some out"
        if images > _MAX_SPLIT:
            train = round(images * (1 - stage.val_ratio))
            basis += f"; the split is what val_ratio {stage.val_ratio:g} gives"
        else:
            unit_size = max(self.images.tars)
            keys = (sample_key(*divmod(number, unit_size)) for number in range(images))
            train = sum(split_of(self.run, key, stage.val_ratio) == "train" for key in keys)
        self.val_images = images - train
        tars = _tars([train, images - train], stage.samples_per_shard)
        units = tars.total()
        return Counts(units, units, images, images, tars, basis, train=train)

    def _claimed(self, stage: Stage) -> Run:
        """The run as ``stage`` would work on it.

        Raises:
            StaleArtifact, MissingArtifact: see :meth:`Run.check`.
        """
        entry = self.run.check(stage)
        read = {name: self.run.artifact(name) for name in stage.reads}
        return replace(self.run, claimed=read | dict.fromkeys(stage.artifacts(), entry))

    def _pretrain(self, stage: Pretrain) -> Counts:
        planned = not stage.data and "shards" in self.made
        order = stage.order(self.run, self.shards.train if planned else len(stage.dataset(self.run)))
        images, seen = order.steps * order.batch_size, 0
        started = all(map(self._in_run, stage.artifacts()))
        if stage.start and not started and not self._is_trained_before(stage.start):
            find_start(stage.start, stage.method.name)
        if started and (not planned or self.up_to_date):
            seen = self._steps_done(stage, order.steps) * order.batch_size
        basis = self.shards.basis if planned else "counted"
        if stage.start:
            basis += f"; begins with {stage.start}"
        if seen < images:
            self.unfinished_trainings.add(self.run.folder(*stage.artifacts()).absolute())
        return Counts(1, int(seen < images), images, images - seen, basis=basis, batch_size=order.batch_size)

    def _is_trained_before(self, start: str) -> bool:
        """Whether a training before makes these weights, and has not finished yet."""
        path = parse_location(start).absolute()
        return any(folder in (path, *path.parents) for folder in self.unfinished_trainings)

    def _steps_done(self, stage: Pretrain, steps: int) -> int:
        """The step of the newest checkpoint."""
        run = self._claimed(stage)
        if not stage.todo(run):
            return steps
        names = [path.stem for path in (run.folder(*stage.artifacts()) / "checkpoints").glob("step-*.safetensors")]
        numbers = [int(number) for name in names if (number := name.removeprefix("step-")).isdecimal()]
        return min(max(numbers, default=0), steps - 1)  # the encoder is not written yet

    def _evaluate(self, stage: Evaluate) -> Counts:
        sizes = self._eval_counts(stage)
        done = self.up_to_date and stage.done(self.run, 0)
        if self.up_to_date and not done:
            stage.prepare(self.run)
        images = sizes.train + sizes.test or sizes.truth
        parts = [f"{sizes.train:,} to learn from, {sizes.test:,} to test on"] * bool(sizes.test)
        parts += [f"{sizes.truth:,} with true masks"] * bool(sizes.truth)
        return Counts(
            1,
            int(not done),
            images,
            0 if done else images,
            basis=f"at most {'; '.join(parts)}",
            batch_size=min(stage.batch_size, max(sizes.train, sizes.test, 1)),
            evaluation=sizes,
        )

    def _eval_counts(self, stage: Evaluate) -> EvalCounts:
        """What ``stage`` looks at; the encoder is that of the last training, if no other is named.

        Raises:
            ConfigError, MissingArtifact: what the stage would be refused for, as far as it is known before.
        """
        if self.training and not stage.encoder:
            stage = replace(stage, encoder=str(self.run.folder(*self.training.artifacts())))
        needs = {evaluator.needs for evaluator in stage.build_evaluators(self.run).values()}
        truth = survey_images(stage.truth).count if stage.truth else 0
        if not stage.needs_images(self.run):
            return EvalCounts(truth=truth)
        own = {} if self.up_to_date or not self.shards.images else {"train": self.shards.train, "val": self.val_images}
        images, classes = {"train": 0, "test": 0}, 0
        for name, split in stage.splits(self.run).items():
            given = getattr(stage, name)
            if split in own and not given:
                if not own[split]:
                    raise ConfigError(
                        f"{self.run.path} will have no image in shards/{split}; plan more images, change the val_ratio "
                        f"of stages.shards, or give --{name}"
                    )
                images[name] = own[split]
                classes = classes or len({prompt.label for prompt in self._prompts()} - {None})
            else:
                source = open_source(name, given or stage.sources(self.run)[name].path)
                images[name] = len(used_samples(source, needs))
                classes = classes or len(set(source.labels.values()))  # those of the training images, which come first
        encoder = stage.encoder or str(stage.encoder_folder(self.run) or "")
        return EvalCounts(images["train"], images["test"], classes, truth, encoder)

    def _prompts(self) -> Iterable[Prompt]:
        """The prompts of the images, at most ``_MAX_PROMPTS``; none for existing images."""
        if not isinstance(self.first, Generate):
            return ()
        own = self.first.own_prompts(self.run)
        if own is not None:
            return (own[number] for number in range(min(len(own), _MAX_PROMPTS)))
        return islice(iter_prompts(self.first.prompts, self.first.template or None), _MAX_PROMPTS)


def _tars(splits: Iterable[int], size: int) -> Counter[int]:
    """The tars of at most ``size`` images that each of the splits fills: images in a tar → number of such tars."""
    tars = Counter[int]()
    for images in splits:
        full, rest = divmod(images, size)
        tars.update({size: full} | ({rest: 1} if rest else {}))
    return +tars
