"""What the workers of every engine do: open the stage once, then work on unit after unit."""

from __future__ import annotations

import logging
import re
import socket
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

__all__ = ["DeviceFailed", "opened"]

logger = logging.getLogger(__name__)

#: What torch says when a device or one of its libraries fails; cuDNN and cuBLAS raise plain RuntimeErrors.
_OF_A_DEVICE = re.compile(
    r"\b(CUDA|HIP|cuDNN|MIOpen)( driver)? error\b|\b(CUDNN|(CU|HIP)(BLAS|SOLVER|FFT))_STATUS_|\bmiopenStatus"
)
#: Where these stand in it the device is well: the unit asks for too much, or for what the library does not do.
_OF_A_UNIT = re.compile(
    r"out of memory|ALLOC_FAILED|AllocFailed|_STATUS_(NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE|ARCH_MISMATCH)"
)


class DeviceFailed(SynthgenError):
    """A device, or what this process has of it, is broken: whatever the process asks of it from now on fails too."""

    def __init__(self, device: str, host: str, reason: str, trace: str = "") -> None:
        self.device, self.trace = device, trace
        self.short = redact(f"{device} of {host} failed ({reason})")
        self._given = (device, host, reason, trace)
        super().__init__(
            f"{self.short}; see what nvidia-smi says of it, then restart the machine, or leave the device out with "
            "CUDA_VISIBLE_DEVICES, and give the same command again: it goes on"
        )

    def __reduce__(self) -> tuple[type[DeviceFailed], tuple[str, ...]]:
        """As it is sent to another process."""
        return type(self), self._given

    @classmethod
    def of(cls, error: Exception, device: str) -> DeviceFailed | None:
        """What ``error``, met by a worker on ``device``, says of the device; nothing if it is of the unit alone.

        After most errors of CUDA every later call in the same process fails at once, so that a worker which went on
        would spoil unit after unit.
        """
        if isinstance(error, cls):
            return error
        text = str(error)
        known = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)  # torch's; imported late
        known = known or (isinstance(error, RuntimeError) and _OF_A_DEVICE.search(text) is not None)
        if not known or _OF_A_UNIT.search(text):
            return None
        first = f"{type(error).__name__}: {text}".splitlines()[0][:300]  # the others say how CUDA is debugged
        return cls(device, socket.gethostname(), first, redact(traceback.format_exc()))


@contextmanager
def opened(stage: Stage, run: Run, worker: Worker) -> Iterator[Work]:
    """Open ``stage``; what is yielded makes a report of whatever goes wrong, so that one bad unit does not end the job.

    A unit that somebody else made meanwhile is not made again. The error of a collective stage, which has one unit, is
    the stage's own and is raised. ``logs/<stage>-<rank>.jsonl`` tells what became of every unit.

    Raises:
        DeviceFailed: also by what is yielded: the worker's device is broken; the unit may be made elsewhere.
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
            if failed := DeviceFailed.of(error, worker.device):
                told = {**about, "unit": unit, "samples": 0, "seconds": round(time.perf_counter() - started, 3)}
                told["trace"] = failed.trace
                logger.warning("unit %06d is left to another worker: %s", unit, failed.short, extra=told)
                raise failed from None
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
            if not stage.collective and (failed := DeviceFailed.of(error, worker.device)):
                raise failed from None
            raise
