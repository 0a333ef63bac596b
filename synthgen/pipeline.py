"""Pipeline files: one YAML file describes one experiment. Read and check it, then run its stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from synthgen.config import Choice, expand_home, load_yaml, run_folder
from synthgen.engines import Engine, default_engine
from synthgen.errors import ConfigError, MissingArtifact, PipelineError, UnknownName
from synthgen.run import Run
from synthgen.runner import EngineLike, Progress, Summary, check_engine, run_stage
from synthgen.stages import STAGES, Stage, make_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.pretrain import Pretrain
from synthgen.stores import parse_location
from synthgen.untrusted import read_file

__all__ = ["Pipeline", "read_pipeline"]

_KEYS = ("run", "seed", "engine", "stages")


@dataclass(frozen=True)
class Pipeline:
    """Stages and the run that they work on. A stage may occur several times, with different settings."""

    path: Path
    run: Path
    seed: int
    engine: Choice
    stages: tuple[Stage, ...]

    def select(self, *, only: str = "", first: str = "", last: str = "") -> Pipeline:
        """The same pipeline with only one stage, or with those from ``first`` to ``last``, both included.

        Raises:
            UnknownName: the pipeline has no such stage.
            ConfigError: ``only`` is given with one of the others, or ``first`` comes after ``last``.
        """
        if only and (first or last):
            other = f"--from {first}" if first else f"--to {last}"
            raise ConfigError(f"--only {only} and {other} ask for different stages; give one of them")
        names = [stage.name for stage in self.stages]
        for name in (only, first, last):
            if name and name not in names:
                raise UnknownName.among(f"stage of {self.path}", name, names)
        start = names.index(only or first) if only or first else 0
        stop = len(names) - names[::-1].index(only or last) if only or last else len(names)
        if start >= stop:
            raise PipelineError(f"{self.path}: {first!r} comes after {last!r}; swap --from and --to")
        return Pipeline(self.path, self.run, self.seed, self.engine, self.stages[start:stop])

    def resolve_engine(self, given: EngineLike | Mapping[str, Any] = None) -> Engine | Choice:
        """The engine to run on: the file's if none is ``given``.

        A name or a mapping is merged with the options that the file has for that engine. A :class:`Choice` or an engine
        is used unchanged.

        Raises:
            ConfigError: the mapping has a ``name`` that is not a text.
        """
        if not given:
            return self.engine
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            return given
        same = given.get("name", self.engine.name) == self.engine.name
        return Choice.of({**(self.engine.dump() if same else {}), **given})

    def dry_run(self, engine: EngineLike | Mapping[str, Any] = None) -> list[str]:
        """Check that all sources of the stages exist, and describe what would run, a line each. Writes nothing.

        Sources in the run's own folder may be written by an earlier stage, and encoders may be on the hub: these are
        not checked.

        Raises:
            MissingArtifact, PromptError, CorruptFile, ConfigError: as for the run itself.
        """
        run, made = Run(parse_location(self.run), self.seed), set[str]()
        there, engine = run.exists(), self.resolve_engine(engine)
        for stage in self.stages:
            check_engine(stage, engine)
        for stage in self.stages:
            for name in stage.reads:
                if name not in made and not there:
                    raise run.missing_artifact(name)
                if name not in made:
                    run.artifact(name)
            stage.check_sources(run)
            made.update(stage.artifacts())
        named = [
            (stage, ", ".join(stage.source_names()), ", ".join(stage.artifacts() or stage.writes))
            for stage in self.stages
        ]
        return [f"run: {self.run}", *(f"{stage.name}: {given} -> {made}" for stage, given, made in named)]

    def execute(
        self, *, engine: EngineLike | Mapping[str, Any] = None, progress: Progress | None = None
    ) -> Iterator[Summary]:
        """Run the stages, and yield the summary of each when it has ended. For ``engine`` see :meth:`resolve_engine`.

        Raises:
            ConfigError: the engine cannot run one of the stages; no stage was run.
        """
        engine = self.resolve_engine(engine)
        engines = [check_engine(stage, engine) for stage in self.stages]
        with Run.create_or_roll_back(self.run, seed=self.seed) as run:
            for stage, made in zip(self.stages, engines, strict=True):
                yield run_stage(stage, run, made, progress)

    def unevaluated(self, stage: Stage) -> str:
        """A note on the trainings that ``stage``, an evaluation without an encoder setting, left out; "" for none."""
        if not isinstance(stage, Evaluate) or stage.encoder:
            return ""
        run = Run.open(self.run)
        if not stage.needs_images(run) or (chosen := stage.encoder_folder(run)) is None:
            return ""
        named = {parse_location(one.encoder).absolute() for one in self.stages if isinstance(one, Evaluate)}
        trainings = [run.folder(*one.artifacts()) for one in self.stages if isinstance(one, Pretrain)]
        left = [one for one in trainings if one.absolute() not in {*named, chosen.absolute()}]
        if not left:
            return ""
        every = ", ".join(f"{{encoder: {folder}}}" for folder in trainings)
        return (
            f"evaluate: of the trainings of {self.path} this is {chosen.name}, which ended last, and not "
            f"{', '.join(one.name for one in left)}; for all of them write evaluate: [{every}]"
        )


def read_pipeline(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Pipeline:
    """Read a pipeline file, apply ``overrides``, and check all of it before anything runs.

    Args:
        path: of the file.
        overrides: values by dotted paths, such as ``{"stages.masks.min_area": 0.01}``.

    Raises:
        MissingArtifact: there is no such file.
        PipelineError: it cannot be read, is not YAML, or a stage comes before one whose output it reads.
        ConfigError: a setting is unknown, missing or of the wrong type; names it with its dotted path.
    """
    path = Path(path)
    content = _load(path)
    for dotted, value in (overrides or {}).items():
        _put(content, dotted, value)
    content = expand_home(content)
    for key in content:
        if key in STAGES.names():
            raise PipelineError(f"{path}: {key!r} is a stage; its settings are those of stages.{key}")
        if key not in _KEYS:
            raise UnknownName.among(f"key of {path}", str(key), _KEYS)
    settings = content.get("stages")
    if not isinstance(settings, dict) or not settings:
        names = ", ".join(STAGES.names())
        raise PipelineError(f"{path}: 'stages' must name a stage with its settings, as masks: {{}}; there are: {names}")
    seed, run = content.get("seed", 0), content.get("run", "runs/latest")
    if not isinstance(seed, int) or isinstance(seed, bool) or not isinstance(run, str):
        raise PipelineError(f"{path}: 'seed' must be a whole number and 'run' a folder")
    stages = [stage for name, values in settings.items() for stage in _stages(path, name, values)]
    _check_artifacts(path, stages)
    _check_order(path, stages)
    engine = content.get("engine") or {}
    if isinstance(engine, dict):  # options without a name are those of the default engine
        engine = {"name": default_engine(), **engine}
    return Pipeline(path, run_folder(run), seed, Choice.of(engine), tuple(stages))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(read_file(path).decode())
    except FileNotFoundError:
        raise MissingArtifact(f"there is no pipeline file {path}; look into pipelines/ for examples") from None
    except OSError as error:
        raise PipelineError(f"{path} cannot be read: {error.strerror or error}; give a pipeline file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise PipelineError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{path} has no settings; it needs at least 'stages'")
    return content


def _put(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value at the path ``dotted``; in every entry of a stage that has a list of settings."""
    places, (*path, last) = [content], dotted.split(".")
    for step in path:
        places = [inner for place in places for inner in _within(place, step, dotted)]
    for place in places:
        place[last] = value


def _within(content: dict[str, Any], step: str, dotted: str) -> list[dict[str, Any]]:
    inner = content.get(step)
    if isinstance(inner, str):  # a part written as its bare name cannot take an option
        raise PipelineError(f"--set {dotted}: {step!r} is a name; write it as {{name: {inner}}} in the file")
    found = inner if isinstance(inner, list) else [{} if inner is None else inner]
    if not all(isinstance(one, dict) for one in found):
        raise PipelineError(f"--set {dotted}: {step!r} has no settings")
    found = [dict(one) for one in found]  # copies: a YAML alias is the same object in several places
    content[step] = found if isinstance(inner, list) else found[0]
    return found


def _stages(path: Path, name: str, values: Any) -> Iterator[Stage]:
    several = values if isinstance(values, list) else [values]
    if not several:
        raise PipelineError(f"{path}: stages.{name} is an empty list; give settings, or leave it out")
    for settings in several:
        if not isinstance(settings, dict | None):
            raise PipelineError(f"{path}: stages.{name} must hold settings, not {settings!r:.200}")
        stage = make_stage(name, settings or {})
        stage.complete()  # raises for an unknown part or option
        yield stage


def _check_artifacts(path: Path, stages: Sequence[Stage]) -> None:
    """Check that no two stages write the same artifact."""
    seen: dict[str, str] = {}
    for stage in stages:
        for artifact in stage.artifacts():
            if artifact in seen:
                how = "; give each a label" if "/" in artifact else ""
                raise PipelineError(
                    f"{path}: stages.{seen[artifact]} and stages.{stage.name} both make {artifact}{how}"
                )
            seen[artifact] = stage.name


def _check_order(path: Path, stages: Sequence[Stage]) -> None:
    """Check that no stage comes before one whose output it reads or takes into account."""
    writers = {artifact: stage.name for stage in stages for artifact in stage.writes}
    made: set[str] = set()
    for stage in stages:
        for artifact in (*stage.reads, *stage.uses):
            if artifact in writers and artifact not in made:
                raise PipelineError(
                    f"{path}: stages.{stage.name} uses {artifact}, which stages.{writers[artifact]} makes after it; "
                    "put it first"
                )
        made.update(stage.writes)
