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
from synthgen.entries import digest
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.redact import redacted
from synthgen.registry import Registry

if TYPE_CHECKING:
    from synthgen.run import Run

__all__ = ["STAGES", "Stage", "Work", "Worker", "growing", "make_stage", "runtime_field", "unhashed"]

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


def growing(default: Any) -> Any:
    """A setting that only says how many samples there are: a larger one adds samples to those of a smaller one.

    It is in no fingerprint. Of two commands on one run, the settings that ask for more samples are recorded.
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
        names, plan = self.artifacts(), self.plan(run)
        if not names or type(self).done is not Stage.done:
            return [unit for unit in plan if not self.done(run, unit)]
        undone = set[int]()
        for name in names:
            done = run.finished_units(name, run.artifact(name)["fingerprint"])
            least = self.least(run, name, plan)
            undone.update(unit for unit in plan if done.get(unit, -1) < least.get(unit, 0))
        return [unit for unit in plan if unit in undone]

    def done(self, run: Run, unit: int) -> bool:
        """Whether a unit is done with the present settings, by whoever did it."""
        names = self.artifacts()
        return bool(names) and all(
            run.has_unit(name, unit, run.artifact(name)["fingerprint"], self.least(run, name, [unit]).get(unit, 0))
            for name in names
        )

    def least(self, run: Run, artifact: str, units: Sequence[int]) -> Mapping[int, int]:
        """How many samples each unit of an artifact must hold to be done, failed ones included; by default any number.

        Only stages whose units can grow say more.
        """
        return {}

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

    def asked(self, run: Run) -> int:
        """How many samples the growing settings ask for; stages without such settings ask for 0."""
        return 0

    def at_least(self, run: Run, before: Mapping[str, Any]) -> Self:
        """The same stage, with the growing settings of ``before`` if these ask for more samples than its own."""
        names = [item.name for item in dataclasses.fields(self) if item.metadata.get("growing")]
        recorded = {name: before[name] for name in names if isinstance(before.get(name), int)}
        if all(getattr(self, name) == value for name, value in recorded.items()):
            return self
        other = dataclasses.replace(self, **recorded)
        return other if other.asked(run) > self.asked(run) else self

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
        kept = self.hashed_names()
        return {name: value for name, value in self.settings().items() if name in kept}

    def hashed_names(self) -> list[str]:
        """The names of the settings that the result depends on; those that only make it larger are not among them."""
        return [
            item.name
            for item in dataclasses.fields(self)
            if not (item.metadata.get("unhashed") or item.metadata.get("growing"))
        ]

    def fingerprints(self, seed: int, inputs: Mapping[str, str]) -> tuple[str, str]:
        """The fingerprint for a run's seed and inputs, and the one of earlier versions, in which no setting could grow.

        In the first, growing settings have their defaults whatever is asked for. A run with the second one goes on with
        the settings that it was made with, but does not grow.
        """
        settings, growing = (
            self.fingerprinted(),
            [item for item in dataclasses.fields(self) if "growing" in item.metadata],
        )
        plain = {"stage": self.name, "seed": seed, "inputs": dict(inputs)}
        defaults = {item.name: item.default for item in growing}
        given = {item.name: getattr(self, item.name) for item in growing}
        first, second = (digest(plain | {"settings": settings | values}) for values in (defaults, given))
        return first, second


STAGES: Registry[Stage] = Registry(__name__)


def make_stage(name: str, settings: Mapping[str, Any]) -> Stage:
    """The stage of that name, its settings checked.

    Raises:
        UnknownName, ConfigError: there is no such stage or setting; names the nearest.
    """
    return build(STAGES.load(name), settings, where=f"stages.{name}", listed=name)
