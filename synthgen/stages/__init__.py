"""Stages: each reads what earlier ones wrote and writes folders of its own."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from synthgen.config import build, dump
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.redact import redacted
from synthgen.registry import Registry

if TYPE_CHECKING:
    from synthgen.run import Run

__all__ = ["STAGES", "Stage", "Work", "Worker", "make_stage", "runtime_field", "unhashed"]

Work = Callable[[int], Report]


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


def runtime_field() -> Any:
    """A field that :meth:`Stage.prepare` fills and ``dataclasses.replace`` resets to None; it is not a setting."""
    return dataclasses.field(default=None, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Stage(ABC):
    """A frozen dataclass: its fields are its settings, so it travels to any worker as it is."""

    name: ClassVar[str]  # the command, and the name in a pipeline file
    reads: ClassVar[tuple[str, ...]]
    writes: ClassVar[tuple[str, ...]]
    collective: ClassVar[bool] = False  # False: units are dealt out. True: one unit for all workers (training)
    accelerated: ClassVar[bool] = False  # True: a worker for every GPU where there are any

    def artifacts(self) -> tuple[str, ...]:
        """The folders that this stage fills, under the run."""
        return self.writes

    def inputs(self, run: Run) -> dict[str, str]:
        """What else the result depends on besides settings and artifacts read: a name and a hash each."""
        return {}

    def complete(self) -> Self:
        """The same stage with every option of its parts spelled out, so that a changed default is a changed setting.

        Raises:
            UnknownName, ConfigError: a part that the settings name does not exist, or does not take an option.
        """
        return self

    def check_sources(self, run: Run) -> None:
        """Check that what the stage reads beside the artifacts of ``run`` is there. Nothing is written.

        Raises:
            SynthgenError: something is missing or cannot be read.
        """

    def prepare(self, run: Run) -> Self:
        """Called once before the units, when inputs and settings have been checked; the stage to work with."""
        return self

    def with_runtime(self, **values: Any) -> Self:
        """A copy whose fields declared by :func:`runtime_field` have these values."""
        stage = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(stage, name, value)
        return stage

    def source_names(self) -> tuple[str, ...]:
        """What the stage works from, for people: artifacts of its run, and what it was given beside them."""
        return self.reads

    @abstractmethod
    def plan(self, run: Run) -> list[int]:
        """The numbers of the units there are, done or not. Cheap and deterministic."""

    def planned(self, run: Run) -> int:
        """How many units the plan has, for a report; stages whose plan costs much may know it otherwise."""
        return len(self.plan(run))

    def todo(self, run: Run) -> list[int]:
        """The units of the plan that are not done yet with the present settings."""
        names = self.artifacts()
        if not names or type(self).done is not Stage.done:
            return [unit for unit in self.plan(run) if not self.done(run, unit)]
        done = [run.finished_units(name, run.artifact(name)["fingerprint"]) for name in names]
        return [unit for unit in self.plan(run) if not all(unit in units for units in done)]

    def done(self, run: Run, unit: int) -> bool:
        """Whether a unit is done with the present settings, by whoever did it."""
        names = self.artifacts()
        return bool(names) and all(run.has_unit(name, unit, run.artifact(name)["fingerprint"]) for name in names)

    @abstractmethod
    def size(self, run: Run, unit: int) -> int:
        """How many samples the unit holds, for the progress bar."""

    def sizes(self, run: Run, units: Sequence[int]) -> dict[int, int]:
        """How many samples each of the units holds."""
        return {unit: self.size(run, unit) for unit in units}

    @abstractmethod
    def open(self, run: Run, worker: Worker) -> AbstractContextManager[Work]:
        """What works on a unit. Heavy: called once a worker."""

    def finish(self, run: Run) -> None:
        """Called once when every unit is done."""

    def settings(self) -> dict[str, Any]:
        """Every setting with its value, as plain data without passwords and tokens: it is written down."""
        plain: dict[str, Any] = redacted(dump(self))
        return plain

    def recorded_settings(self, run: Run) -> dict[str, Any]:
        """The settings as they are written down in ``run``."""
        return self.settings()

    @classmethod
    def folder_of(cls, settings: Mapping[str, Any]) -> str:
        """The artifact whose settings a command with these settings goes on with."""
        return cls.writes[0]

    def fingerprinted(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        kept = {item.name for item in dataclasses.fields(self) if not item.metadata.get("unhashed")}
        return {name: value for name, value in self.settings().items() if name in kept}


STAGES: Registry[Stage] = Registry(__name__)


def make_stage(name: str, settings: Mapping[str, Any]) -> Stage:
    """The stage of that name, its settings checked.

    Raises:
        UnknownName, ConfigError: there is no such stage or setting; names the nearest.
    """
    return build(STAGES.load(name), settings, where=f"stages.{name}", listed=name)
