"""Stages: each reads artifacts of a run and writes others.

How the parts work together:

- A :class:`~synthgen.run.Run` is a folder. Each *artifact* in it (``images``, ``masks``, ...) consists of *units*: tars
  of a few samples that are made, and retried, together.
- A :class:`Stage` (``generate``, ``masks``, ...) holds the settings of one step. :meth:`Stage.plan` lists its units,
  :meth:`Stage.open` loads a model or the like and returns a function that makes one unit.
- :func:`synthgen.runner.run_stage` checks that the run's settings are the same, finds the units that are not done, and
  gives them to an *engine* (:mod:`synthgen.engines`).
- The engine distributes the units over :class:`Worker` processes. Each opens the stage once, then writes unit after
  unit: the tar, and last its done mark (:mod:`synthgen.units`). It answers with a :class:`~synthgen.records.Report`.

So a killed command loses only the units in progress, and the same command makes the remaining ones.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from synthgen.config import build, dump, settings_model
from synthgen.errors import ConfigError, SynthgenError
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.redact import redacted
from synthgen.registry import Registry

if TYPE_CHECKING:
    from synthgen.run import Run

__all__ = ["STAGES", "Stage", "Work", "Worker", "growing", "make_stage", "runtime_field", "unhashed"]

Work = Callable[[int], Report]  # makes the unit of a number


@dataclass(frozen=True)
class Worker:
    """The process that works on a unit."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    progress: Progress = dataclasses.field(default_factory=Progress)  # for ``advance``, ``skip`` and ``describe``


def unhashed(default: Any) -> Any:
    """A setting that may differ between two calls on one run, because it changes no result (only speed or display)."""
    return dataclasses.field(default=default, metadata={"unhashed": True})


def growing(default: Any) -> Any:
    """A setting that only limits how many samples there are: a larger value adds samples to those of a run.

    It is not part of the fingerprint. :meth:`synthgen.run.Run.check` says which value is recorded.
    """
    return dataclasses.field(default=default, metadata={"growing": True})


def runtime_field() -> Any:
    """A field that :meth:`Stage.prepare` fills and ``dataclasses.replace`` resets to None; it is not a setting."""
    return dataclasses.field(default=None, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Stage(ABC):
    """A frozen dataclass: its fields are its settings, so it travels to any worker as it is."""

    name: ClassVar[str]  # the command, and the name in a pipeline file
    reads: ClassVar[tuple[str, ...]]
    writes: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]] = ()  # artifacts that the stage takes into account if the run has them
    collective: ClassVar[bool] = False  # False: units are dealt out. True: one unit for all workers (training)
    accelerated: ClassVar[bool] = False  # True: a worker for every GPU where there are any

    def artifacts(self) -> tuple[str, ...]:
        """The folders of the run that this stage writes."""
        return self.writes

    def inputs(self, run: Run) -> dict[str, str]:
        """What the result depends on besides settings and artifacts: names, each with a hash."""
        return {}

    def complete(self) -> Self:
        """The same stage with every option of its parts filled in, so that a changed default is a changed setting.

        Raises:
            UnknownName, ConfigError: a part that the settings name does not exist, or does not take an option.
        """
        return self

    def check_sources(self, run: Run) -> None:
        """Check that the sources outside the run, such as a prompt file, exist. Writes nothing.

        Raises:
            SynthgenError: something is missing or cannot be read.
        """

    def prepare(self, run: Run) -> Self:
        """Called once before any unit, after inputs and settings were checked; returns the stage to open."""
        return self

    def with_runtime(self, **values: Any) -> Self:
        """A copy whose fields declared by :func:`runtime_field` have these values."""
        stage = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(stage, name, value)
        return stage

    def source_names(self) -> tuple[str, ...]:
        """The sources of the stage for a person: artifacts of its run, and files or folders that were given."""
        return self.reads

    @abstractmethod
    def plan(self, run: Run) -> list[int]:
        """The numbers of all units, done or not. Cheap and deterministic."""

    def num_units(self, run: Run) -> int:
        """How many units the plan has; stages with an expensive plan may count them differently."""
        return len(self.plan(run))

    def todo(self, run: Run) -> list[int]:
        """The units of the plan that are not done with the present settings."""
        names, plan = self.artifacts(), self.plan(run)
        if not names or type(self).done is not Stage.done:
            return [unit for unit in plan if not self.done(run, unit)]
        undone = set[int]()
        for name in names:
            done = run.finished_units(name, run.artifact(name)["fingerprint"])
            min_samples = self.min_samples(run, name, plan)
            undone |= {unit for unit in plan if done.get(unit, -1) < min_samples.get(unit, 0)}
        return [unit for unit in plan if unit in undone]

    def done(self, run: Run, unit: int) -> bool:
        """Whether a unit is done with the present settings."""
        for name in self.artifacts():
            min_samples = self.min_samples(run, name, [unit]).get(unit, 0)
            if not run.has_unit(name, unit, run.artifact(name)["fingerprint"], min_samples):
                return False
        return bool(self.artifacts())

    def min_samples(self, run: Run, artifact: str, units: Sequence[int]) -> Mapping[int, int]:
        """How many samples each unit of an artifact must hold to be done, failed ones included; of others, any number.

        Stages whose units can grow override it.
        """
        return {}

    @abstractmethod
    def size(self, run: Run, unit: int) -> int:
        """How many samples the unit has, for the progress bar."""

    def sizes(self, run: Run, units: Sequence[int]) -> dict[int, int]:
        """How many samples each of the units has."""
        return {unit: self.size(run, unit) for unit in units}

    @abstractmethod
    def open(self, run: Run, worker: Worker) -> AbstractContextManager[Work]:
        """A context manager that yields a function which makes one unit. Slow: called once per worker."""

    def finish(self, run: Run) -> None:
        """Called once when every unit is done."""

    def num_samples(self, run: Run) -> int:
        """How many samples the growing settings ask for; 0 for stages without such settings."""
        return 0

    def at_least(self, run: Run, before: Mapping[str, Any]) -> Self:
        """The same stage, with the growing settings of ``before`` if these ask for more samples than its own."""
        names = [item.name for item in dataclasses.fields(self) if item.metadata.get("growing")]
        recorded = {name: before[name] for name in names if isinstance(before.get(name), int)}
        if all(getattr(self, name) == value for name, value in recorded.items()):
            return self
        other = dataclasses.replace(self, **recorded)
        return other if other.num_samples(run) > self.num_samples(run) else self

    def settings(self) -> dict[str, Any]:
        """Every setting with its value, as plain data to be recorded: without passwords and tokens."""
        plain: dict[str, Any] = redacted(dump(self))
        return plain

    def recorded_settings(self, run: Run) -> dict[str, Any]:
        """The settings as they are recorded in ``run``."""
        return self.settings()

    @classmethod
    def folder_of(cls, settings: Mapping[str, Any]) -> str:
        """The artifact whose recorded settings a command with these settings starts from."""
        return cls.writes[0]

    def fingerprinted(self) -> dict[str, Any]:
        """The settings that the result depends on; growing settings only make it larger."""
        left_out = {item.name for item in dataclasses.fields(self) if {"unhashed", "growing"} & item.metadata.keys()}
        return {name: value for name, value in self.settings().items() if name not in left_out}


STAGES: Registry[Stage] = Registry(__name__)


def make_stage(name: str, settings: Mapping[str, Any]) -> Stage:
    """The stage of that name, with checked settings.

    Raises:
        UnknownName, ConfigError: there is no such stage or setting; suggests the closest name.
    """
    stage = STAGES.load(name)
    known = settings_model(stage).model_fields
    for key in settings:
        if key not in known and (path := _closest_option(stage, settings, str(key))):
            raise ConfigError(
                f"stages.{name}.{key}: unknown setting; did you mean {path!r}?; see: synthgen schema {name}"
            )
    return build(stage, settings, where=f"stages.{name}", listed=name)


def _closest_option(stage: type[Stage], settings: Mapping[str, Any], key: str) -> str:
    """The closest option of a part to ``key``, such as "method.mask_ratio"; "" if a setting of the stage is closer."""
    paths = dict.fromkeys(settings_model(stage).model_fields, "")
    with suppress(SynthgenError):  # of other settings
        known = {name: value for name, value in settings.items() if name in paths}
        parts = build(stage, known, where=stage.name).complete().settings()
        for name, part in parts.items():
            if isinstance(part, Mapping) and "name" in part:
                paths = {option: f"{name}.{option}" for option in part if option != "name"} | paths
    return next((paths[near] for near in difflib.get_close_matches(key, paths, n=1)), "")
