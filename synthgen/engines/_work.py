"""What the workers of every engine do: open the stage once, then work on unit after unit."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from synthgen.errors import SynthgenError
from synthgen.log import logged_to
from synthgen.records import Report
from synthgen.redact import redact
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker

__all__ = ["opened"]

logger = logging.getLogger(__name__)


@contextmanager
def opened(stage: Stage, run: Run, worker: Worker) -> Iterator[Work]:
    """Open ``stage``; what is yielded makes a report of whatever goes wrong, so that one bad unit does not end the job.

    A unit that somebody else made meanwhile is not made again. The error of a collective stage, which has one unit, is
    the stage's own and is raised. ``logs/<stage>-<rank>.jsonl`` tells what became of every unit.
    """
    about = {"stage": stage.name, "rank": worker.rank}

    def guarded(unit: int) -> Report:
        if stage.done(run, unit):
            worker.skip(stage.size(run, unit))
            return Report(unit)
        started = time.perf_counter()
        try:
            report = work(unit)
        except Exception as error:
            reason = redact(" ".join(str(error).split())) or "no message"
            trace = "" if isinstance(error, SynthgenError) else redact(traceback.format_exc())
            report = Report(unit, error=f"{type(error).__name__}: {reason}", trace=trace)
        seconds = round(time.perf_counter() - started, 3)
        told = {**about, "unit": unit, "samples": report.count, "seconds": seconds}
        if report.error:
            logger.warning("unit %06d failed: %s", unit, report.error, extra=told | {"trace": report.trace})
        else:
            logger.info("unit %06d done", unit, extra=told)
        return report

    with logged_to(run.path / "logs" / f"{stage.name}-{worker.rank}.jsonl"):
        try:
            with stage.open(run, worker) as work:
                logger.info("opened on %s, one of %d workers", worker.device, worker.world_size, extra=about)
                yield work if stage.collective else guarded
        except Exception as error:
            logger.error("%s: %s", type(error).__name__, error, extra=about)
            raise
