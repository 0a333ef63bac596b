"""Engines distribute the units of a stage over workers. Any number of workers gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

from synthgen.devices import place
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.registry import Registry
from synthgen.run import Run
from synthgen.stages import Stage

__all__ = ["ENGINES", "Engine", "default_engine"]


class Engine(Protocol):
    """A frozen dataclass whose fields are its settings."""

    collective: ClassVar[bool]  # whether stages whose workers share one unit (training) can run on it

    def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
        """Work on each unit; one report for each, in any order. A failure is a report too."""
        ...


ENGINES: Registry[Engine] = Registry(__name__, "engine")


def default_engine() -> str:
    """``accelerate`` in one of several processes that ``accelerate launch`` started, else ``local``."""
    return "accelerate" if place().size > 1 else "local"
