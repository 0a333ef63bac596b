"""How much there is to do: images, units and training steps of a pipeline, in all and left. Nothing is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from synthgen.errors import ConfigError, MissingArtifact, PipelineError, StaleArtifact
from synthgen.pipeline import Pipeline
from synthgen.plan.eval_counts import COMPARED, Judged, Looked, expected, judged, prompts_of
from synthgen.plan.source import Pictures
from synthgen.prompts import Survey, expand, iter_prompts
from synthgen.records import Prompt, sample_key
from synthgen.run import Run
from synthgen.stages import Stage
from synthgen.stages._init_weights import find_start
from synthgen.stages._layout import split_of
from synthgen.stages.attend import Attend
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.generate import Generate
from synthgen.stages.masks import Masks
from synthgen.stages.pretrain import Pretrain
from synthgen.stages.shards import Shards
from synthgen.stores import parse_location
from synthgen.units import counts_of

__all__ = ["NOTHING", "Counts", "count", "first_of"]

_MAX_UNITS = 10**6  # that a key can tell apart
_DRAWN = 10**6  # images, at most, for each of which the split is drawn; of more it is what is expected


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
    judged: Judged | None = None  # of an evaluation


NOTHING = Counts(0, 0, 0, 0)  # of a stage of which nothing is said


def first_of(pipeline: Pipeline) -> Generate | Attend:
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


def count(pipeline: Pipeline, survey: Survey | Pictures, notes: list[str]) -> list[Counts]:
    """What each stage has to do; remarks for a person are added to ``notes``.

    Raises:
        PipelineError: a stage reads what neither an earlier one nor the run has.
        StaleArtifact, MissingArtifact, ConfigError: what the run itself would be refused for.
    """
    line = _Line(pipeline.path, _run_of(pipeline), survey, notes)
    return [line.count(stage.complete()) for stage in pipeline.stages]


def _run_of(pipeline: Pipeline) -> Run:
    """The run as it is, or as it will be.

    Raises:
        StaleArtifact: it was begun with another seed.
    """
    try:
        run = Run.open(pipeline.run)
    except MissingArtifact:
        return Run(parse_location(pipeline.run), pipeline.seed)
    if run.seed != pipeline.seed and run.manifest()["artifacts"]:
        raise StaleArtifact(
            f"{pipeline.run} was made with seed {run.seed}, not {pipeline.seed}; choose another --run folder"
        )
    return replace(run, seed=pipeline.seed)


@dataclass
class _Line:
    """A pipeline, stage after stage."""

    path: Path
    run: Run
    survey: Survey | Pictures
    notes: list[str]
    first: Generate | Attend | None = None
    images: Counts = NOTHING
    drawn: set[int] = field(default_factory=set)  # the units of images that are done
    packing: Shards | None = None
    shards: Counts = NOTHING
    training: Pretrain | None = None
    made: set[str] = field(default_factory=set)  # artifacts
    trainings: set[Path] = field(default_factory=set)  # folders of those that are not finished
    whole: bool = True  # every stage so far has done all

    def count(self, stage: Stage) -> Counts:
        """What ``stage`` has to do after those before it."""
        for artifact in stage.reads:
            if artifact not in self.made and not self._in_run(artifact):
                raise PipelineError(
                    f"{self.path}: stages.{stage.name} reads {artifact}, which no stage before it makes and "
                    f"{self.run.path} does not hold; add the stage that makes it"
                )
        if isinstance(stage, Generate | Attend):
            self.first, self.images = stage, self._first(stage)
            found = self.images
        elif isinstance(stage, Masks):
            found = self._left_by_marks(stage, self.images)
        elif isinstance(stage, Shards):
            self.packing, self.shards = stage, self._shards(stage)
            found = self.shards
        elif isinstance(stage, Pretrain):
            self.training, found = stage, self._pretrain(stage)
        else:
            found = self._evaluate(stage) if isinstance(stage, Evaluate) else NOTHING
        self.made.update(stage.writes)
        self.whole = self.whole and not found.units_left
        return found

    def _in_run(self, artifact: str) -> bool:
        try:
            return bool(self.run.artifact(artifact))
        except (MissingArtifact, ConfigError):  # there is none, or not even a run
            return False

    def _first(self, stage: Generate | Attend) -> Counts:
        images = self.survey.count * (stage.images_per_prompt if isinstance(stage, Generate) else 1)
        images = min(images, stage.limit) if stage.limit else images
        full, rest = divmod(images, stage.unit_size)
        units = full + bool(rest)
        if units > _MAX_UNITS:
            raise ConfigError(
                f"{images:,} images in units of {stage.unit_size} are {units:,} units, of {_MAX_UNITS:,} at most; "
                f"set unit_size of stages.{stage.name} to {-(-images // _MAX_UNITS)} or more"
            )
        tars = {count: number for count, number in ((stage.unit_size, full), (rest, int(rest > 0))) if number}
        return self._left_by_marks(stage, Counts(units, units, images, images, tars))

    def _left_by_marks(self, stage: Stage, whole: Counts) -> Counts:
        """``whole`` without the units that are marked as done."""
        size = max(whole.tars)
        sizes = {unit: min(size, whole.images - unit * size) for unit in self._marked(stage) if unit < whole.units}
        done = self._grown(stage, sizes)
        left = whole.images - sum(sizes[unit] for unit in done)
        return replace(whole, units_left=whole.units - len(done), images_left=left)

    def _grown(self, stage: Stage, sizes: Mapping[int, int]) -> list[int]:
        """Those of the marked units that hold all their samples: the last one may be of a run that was smaller."""
        done = list(sizes)
        for name in stage.artifacts():
            found = self.run.finished_units(name, self.run.artifact(name)["fingerprint"]) if done else {}
            least = sizes if name == "images" else counts_of(self.run.folder("images"), done)
            done = [unit for unit in done if found[unit] >= least.get(unit, 0)]
        if isinstance(stage, Generate | Attend):
            self.drawn = set(done)
        return [unit for unit in done if unit in self.drawn]

    def _marked(self, stage: Stage) -> list[int]:
        """The units that are done with the present settings.

        Raises:
            StaleArtifact: they were made with others.
        """
        if not all(map(self._in_run, stage.artifacts())):
            return []
        if isinstance(stage, Generate | Attend) and self.survey.count > COMPARED:
            self._compare_settings(stage)
        else:
            self.run.check(stage)
        done = [self.run.finished_units(name, self.run.artifact(name)["fingerprint"]) for name in stage.artifacts()]
        return sorted(set(done[0]).intersection(*done[1:]))

    def _compare_settings(self, stage: Stage) -> None:
        """What :meth:`Run.check` does, but for the prompts or images, which it would have to read."""
        if not any(map(self.run.is_nonempty, stage.artifacts())):
            return
        before = self.run.artifact("images")["settings"]
        changed = [name for name, value in stage.fingerprinted().items() if before.get(name) != value]
        if changed:
            raise StaleArtifact(
                f"{self.run.folder('images')} was made with another {', '.join(changed)}; use the same settings, or "
                "choose another run folder"
            )
        what = "prompts" if isinstance(stage, Generate) else "images"
        self.notes.append(f"that {self.run.path} was begun with the same {what} is taken for granted: they are many")

    def _shards(self, stage: Shards) -> Counts:
        if self.whole and self.images.images <= _DRAWN:  # then it is known which images there are
            run = self._held(stage)
            sizes, todo = {unit: stage.size(run, unit) for unit in stage.plan(run)}, stage.todo(run)
            left = sum(sizes[unit] for unit in todo)
            train = sum(len(shard.keys) for shard in stage.layout(run) if shard.split == "train")
            return Counts(len(sizes), len(todo), sum(sizes.values()), left, Counter(sizes.values()), train=train)
        if self.images.units_left and self._in_run("shards"):
            self.notes.append(
                f"{self.run.folder('shards')} has the images made so far; when there are more, delete it first"
            )
        train, basis = self._train_images(stage)
        tars = Counter[int]()
        for images in (train, self.images.images - train):
            full, rest = divmod(images, stage.samples_per_shard)
            tars.update({stage.samples_per_shard: full, rest: 1} if rest else {stage.samples_per_shard: full})
        units, images = tars.total(), self.images.images
        return Counts(units, units, images, images, +tars, basis, train=train)

    def _train_images(self, stage: Shards) -> tuple[int, str]:
        """Images of the training split, and how that is known."""
        images, size = self.images.images, max(self.images.tars)
        if images > _DRAWN:
            return round(
                images * (1 - stage.val_ratio)
            ), f"counted; the split is what val_ratio {stage.val_ratio:g} gives"
        keys = (sample_key(*divmod(number, size)) for number in range(images))
        return sum(split_of(self.run, key, stage.val_ratio) == "train" for key in keys), "counted"

    def _held(self, stage: Stage) -> Run:
        """The run as ``stage`` would work on it.

        Raises:
            StaleArtifact, MissingArtifact: see :meth:`Run.check`.
        """
        entry = self.run.check(stage)
        held = {name: self.run.artifact(name) for name in stage.reads} | dict.fromkeys(stage.artifacts(), entry)
        return replace(self.run, claimed=held)

    def _pretrain(self, stage: Pretrain) -> Counts:
        planned = not stage.data and "shards" in self.made
        order = stage.order(self.run, self.shards.train if planned else len(stage.dataset(self.run)))
        images, done = order.steps * order.batch_size, 0
        begun = all(map(self._in_run, stage.artifacts()))
        if stage.start and not begun and not self._begins_later(stage):
            find_start(stage.start, stage.method.name)
        if begun and (not planned or self.whole):
            done = self._trained(stage, order.steps) * order.batch_size
        basis = self.shards.basis if planned else "counted"
        if stage.start:
            basis += f"; begins with {stage.start}"
        if done < images:
            self.trainings.add(self.run.folder(stage.artifacts()[0]).absolute())
        return Counts(1, int(done < images), images, images - done, basis=basis, batch_size=order.batch_size)

    def _begins_later(self, stage: Pretrain) -> bool:
        """Whether the weights that a training begins from are yet to be made, by one before it."""
        start = parse_location(stage.start).absolute()
        return any(folder in (start, *start.parents) for folder in self.trainings)

    def _trained(self, stage: Pretrain, steps: int) -> int:
        """Steps that need not be made again."""
        run = self._held(stage)
        if not stage.todo(run):
            return steps
        found = (run.folder(stage.artifacts()[0]) / "checkpoints").glob("step-*.safetensors")
        made = [int(path.stem.removeprefix("step-")) for path in found if path.stem.removeprefix("step-").isdecimal()]
        return min(max(made, default=0), steps - 1)  # an encoder is yet to be written

    def _evaluate(self, stage: Evaluate) -> Counts:
        held = None if self.whole or not self.shards.images else self._own_shards()
        found = judged(stage, self.run, held, self.training)
        done = self.whole and stage.done(self.run, 0)
        if self.whole and not done:
            stage.prepare(self.run)
        batch = min(stage.batch_size, max(found.train.images, found.test.images, 1))
        left = 0 if done else found.images
        return Counts(1, int(not done), found.images, left, basis=found.basis, batch_size=batch, judged=found)

    def _own_shards(self) -> tuple[Looked, Looked]:
        """What is known of the shards that there will be: of train, and of val."""
        assert self.packing is not None
        prompts, each = self._prompts()
        images, size, masks = self.images.images, max(self.images.tars), self.packing.masks
        train = self.shards.train
        shown: dict[str, list[int]] = {"train": [], "val": []}
        if each and images <= _DRAWN:
            for number in range(images):
                split = split_of(self.run, sample_key(*divmod(number, size)), self.packing.val_ratio)
                shown[split].append(number % len(prompts))
            return (
                expected(train, prompts, shown["train"], masks=masks),
                expected(images - train, prompts, shown["val"], masks=masks),
            )
        return expected(train, prompts, None, masks=masks), expected(images - train, prompts, None, masks=masks)

    def _prompts(self) -> tuple[Sequence[Prompt], bool]:
        """The prompts of the images, and whether these are all of them."""
        if isinstance(self.survey, Pictures):
            return prompts_of(self.survey, self.first.caption if isinstance(self.first, Attend) else ""), False
        if self.survey.count <= COMPARED and isinstance(self.first, Generate):
            if (own := self.first.own_prompts(self.run)) is not None:
                return [own[number] for number in range(len(own))], True
            return list(iter_prompts(self.first.prompts, self.first.template or None)), True
        few = self.survey.prompts
        return expand(few, self.survey.templates[:1]) if self.survey.templates else few, False
