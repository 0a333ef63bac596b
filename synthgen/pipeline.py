"""Pipeline files: one YAML, one experiment. Read it, check it, run its stages."""

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
    """A line of stages over one run directory. A stage may come several times, each time with other settings."""

    path: Path
    run: Path
    seed: int
    engine: Choice
    stages: tuple[Stage, ...]

    def select(self, *, only: str = "", first: str = "", last: str = "") -> Pipeline:
        """The same line with one stage, or from ``first`` to ``last``, both included.

        Raises:
            UnknownName: the line has no such stage.
            ConfigError: ``only`` is given beside the others, or ``first`` comes after ``last``.
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
        """The engine to run on: that of the file where none is ``given``.

        A name or a mapping of options keeps the options that the file has for that engine. A :class:`Choice` or an
        engine is taken as it is.

        Raises:
            ConfigError: the mapping has a ``name`` that is no text.
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
        """What would run, a line each, after a check that all sources of the stages are there. Nothing is written.

        What lies in the run's own folder may be made by a stage before; an encoder may be on the hub, which is not
        asked.

        Raises:
            MissingArtifact, PromptError, CorruptFile, ConfigError: the run would be refused for it.
        """
        run, made = Run(parse_location(self.run), self.seed), set[str]()
        there, engine = run.is_there, self.resolve_engine(engine)
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
        """Run each stage; yields its summary when it has ended. For ``engine`` see :meth:`resolve_engine`.

        Raises:
            ConfigError: the engine cannot run one of the stages; nothing has run.
        """
        engine = self.resolve_engine(engine)
        engines = [check_engine(stage, engine) for stage in self.stages]
        with Run.create_or_roll_back(self.run, seed=self.seed) as run:
            for stage, made in zip(self.stages, engines, strict=True):
                yield run_stage(stage, run, made, progress)

    def unevaluated(self, stage: Stage) -> str:
        """A note on the trainings that ``stage``, an evaluation that names no encoder, left out; empty without any."""
        if not isinstance(stage, Evaluate) or stage.encoder:
            return ""
        run = Run.open(self.run)
        if not stage.judges_images(run) or (chosen := stage.encoder_folder(run)) is None:
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
    """Read a pipeline file, put ``overrides`` in, and check all of it before anything runs.

    Args:
        path: of the file.
        overrides: values by their dotted paths, such as ``{"stages.masks.min_area": 0.01}``.

    Raises:
        MissingArtifact: there is no such file.
        PipelineError: it cannot be read, is not YAML, or its stages do not follow from one another.
        ConfigError: a setting is unknown, missing or of the wrong kind; names it with its dotted path.
    """
    path = Path(path)
    content = _load(path)
    for dotted, value in (overrides or {}).items():
        _put(content, dotted, value)
    content = expand_home(content)
    for key in content:
        if key not in _KEYS:
            raise UnknownName.among(f"key of {path}", str(key), _KEYS)
    settings = content.get("stages")
    if not isinstance(settings, dict) or not settings:
        raise PipelineError(f"{path}: 'stages' must name at least one stage; there are: {', '.join(STAGES.names())}")
    seed, run = content.get("seed", 0), content.get("run", "runs/latest")
    if not isinstance(seed, int) or isinstance(seed, bool) or not isinstance(run, str):
        raise PipelineError(f"{path}: 'seed' must be a whole number and 'run' a folder")
    stages = [stage for name, values in settings.items() for stage in _stages(path, name, values)]
    _distinct(path, stages)
    engine = content.get("engine") or {}
    if isinstance(engine, dict):  # options alone are those of the engine that is there by default
        engine = {"name": default_engine(), **engine}
    return Pipeline(path, run_folder(run), seed, Choice.of(engine), tuple(_ordered(path, stages)))


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
        raise PipelineError(f"{path} holds no settings; it needs 'stages' at least")
    return content


def _put(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set what ``dotted`` leads to; where a stage comes several times, each time."""
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
        raise PipelineError(f"--set {dotted}: {step!r} holds no settings")
    found = [dict(one) for one in found]  # what an alias of YAML stands for several times is changed at one place
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
        stage.complete()  # a part that does not exist, or an option that it does not take, is told before anything runs
        yield stage


def _distinct(path: Path, stages: Sequence[Stage]) -> None:
    """See that no two write into the same folder."""
    seen: dict[str, str] = {}
    for stage in stages:
        for artifact in stage.artifacts():
            if artifact in seen:
                how = "; give each a label" if "/" in artifact else ""
                raise PipelineError(
                    f"{path}: stages.{seen[artifact]} and stages.{stage.name} both make {artifact}{how}"
                )
            seen[artifact] = stage.name


def _ordered(path: Path, stages: Sequence[Stage]) -> Sequence[Stage]:
    """The stages as they stand in the file, if each finds before it what it reads from a stage of the same file."""
    writers = {artifact: stage.name for stage in stages for artifact in stage.writes}
    made: set[str] = set()
    for stage in stages:
        for artifact in stage.reads:
            if artifact in writers and artifact not in made:
                raise PipelineError(
                    f"{path}: stages.{stage.name} reads {artifact}, which stages.{writers[artifact]} makes after it; "
                    "put it first"
                )
        made.update(stage.writes)
    return stages
