"""Run one stage: find the units that are not done, give them to an engine, and collect its reports.

Only this module resumes: stages and engines get nothing but units that are still to be made.
"""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import dataclass, field

from synthgen.config import Choice
from synthgen.engines import ENGINES, Engine, default_engine
from synthgen.errors import ConfigError, UnitsFailed
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage
from synthgen.stores import temporaries
from synthgen.stores.tar import is_abandoned

__all__ = ["EngineLike", "Progress", "Summary", "check_engine", "run_stage"]

EngineLike = Engine | Choice | str | None  # None: see ``default_engine``

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """The result of one call of :func:`run_stage`."""

    stage: str
    units: int = 0  # of the plan
    done_before: int = 0  # units that were done before this call
    samples: int = 0  # made in this call
    seconds: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)  # counts by remark, see ``Report``


def check_engine(stage: Stage, engine: EngineLike) -> Engine:
    """The engine that ``engine`` names, if ``stage`` can run on it.

    Raises:
        UnknownName: there is no such engine or setting.
        MissingDependency: its library is not installed.
        ConfigError: a setting is wrong, or the engine distributes units and the stage is collective.
    """
    if engine is None or isinstance(engine, Choice | str):
        engine = ENGINES.build(engine or default_engine())
    if stage.collective and not engine.collective:
        raise ConfigError(
            f"{stage.name} is a single unit, which the workers of {type(engine).__name__.lower()} cannot share; "
            f"run it alone with --engine local, or on several GPUs with: accelerate launch -m synthgen {stage.name}"
        )
    return engine


def run_stage(stage: Stage, run: Run, engine: EngineLike = None, progress: Progress | None = None) -> Summary:
    """Make the units of ``stage`` that are not done. Several processes may do so on one run at the same time.

    Raises:
        MissingArtifact, StaleArtifact: see :meth:`Run.check`.
        UnitsFailed: some units failed; the others are done.
        ConfigError: see :func:`check_engine`.
    """
    engine = check_engine(stage, engine)
    stage = stage.complete()
    with run.claim(stage) as claimed:
        return _run_units(stage, claimed, engine, progress or Progress())


def _run_units(stage: Stage, run: Run, engine: Engine, progress: Progress) -> Summary:
    stage = stage.prepare(run)
    plan, todo = stage.plan(run), stage.todo(run)
    sizes = stage.sizes(run, plan)
    summary = Summary(stage.name, units=len(plan), done_before=len(plan) - len(todo))
    started = time.perf_counter()
    failed: list[Report] = []
    if todo:
        progress.start(stage.name, sum(sizes.values()), sum(sizes.values()) - sum(sizes[unit] for unit in todo))
        try:
            for report in engine.map(stage, run, todo, progress):
                if report.error:
                    run.fail(stage, report)
                    failed.append(report)
                    logger.info("%s: unit %06d failed: %s", stage.name, report.unit, report.error)
                summary.samples += report.count
                for remark, count in report.notes.items():
                    summary.notes[remark] = summary.notes.get(remark, 0) + count
        finally:
            progress.stop()
    summary.seconds = time.perf_counter() - started
    for report in [report for report in failed if stage.done(run, report.unit)]:  # made by another command
        run.clear_failure(stage, report.unit)
        failed.remove(report)
    if failed:
        first = failed[0]
        many = f"{len(failed)} of {len(plan)} units" if len(plan) > 1 else "its one unit"
        raise UnitsFailed(
            f"{stage.name}: {many} failed; unit {first.unit:06d}: {first.error}; "
            f"run the same command again to retry only those, or see: synthgen status {shlex.quote(str(run.path))}"
        )
    stage.finish(run)
    _remove_leftovers(stage, run)
    return summary


def _remove_leftovers(stage: Stage, run: Run) -> None:
    """Remove partial files of killed processes."""
    for name in stage.artifacts():
        for path in temporaries(run.folder(name)):
            if is_abandoned(path):
                path.unlink(missing_ok=True)
