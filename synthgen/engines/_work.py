"""What the workers of every engine share: a stage is opened once, and errors of its units become reports."""

from __future__ import annotations

import logging
import re
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from synthgen.errors import CorruptFile, SynthgenError
from synthgen.log import logged_to
from synthgen.records import Report
from synthgen.redact import redact
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker

__all__ = ["DeviceFailed", "open_stage"]

logger = logging.getLogger(__name__)

#: In torch's messages when a device or one of its libraries fails; cuDNN and cuBLAS raise plain RuntimeErrors.
_DEVICE_ERROR = re.compile(
    r"\b(CUDA|HIP|cuDNN|MIOpen)( driver)? error\b|\b(CUDNN|(CU|HIP)(BLAS|SOLVER|FFT))_STATUS_|\bmiopenStatus"
)
#: In those that leave the device usable: the unit needs more memory, or what the library does not support.
_UNIT_ERROR = re.compile(
    r"out of memory|ALLOC_FAILED|AllocFailed|_STATUS_(NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE|ARCH_MISMATCH)"
)


class DeviceFailed(SynthgenError):
    """A device failed, or this process can no longer use it: all later calls of the process on it fail too.

    Args:
        device: as torch names it.
        host: the machine.
        reason: the first line of the error.
        trace: where it came from.
    """

    def __init__(self, device: str, host: str, reason: str, trace: str = "") -> None:
        self.device, self.trace = device, trace
        self._args = (device, host, reason, trace)
        super().__init__(
            f"{device} of {host} failed ({reason})",
            "see what nvidia-smi says of it, then restart the machine, or leave the device out with "
            "CUDA_VISIBLE_DEVICES, and give the same command again: it goes on",
        )

    def __reduce__(self) -> tuple[type[DeviceFailed], tuple[str, ...]]:
        """How it is sent to another process."""
        return type(self), self._args

    @classmethod
    def from_error(cls, error: Exception, device: str) -> DeviceFailed | None:
        """The failure that ``error`` means for the ``device`` it was raised on; None if only the unit failed.

        After most errors of CUDA every later call in the same process fails at once, so that a worker which went on
        would fail unit after unit.
        """
        if isinstance(error, cls):
            return error
        message = str(error)
        known = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)  # torch's; imported late
        known = known or (isinstance(error, RuntimeError) and _DEVICE_ERROR.search(message) is not None)
        if not known or _UNIT_ERROR.search(message):
            return None
        reason = f"{type(error).__name__}: {message}".splitlines()[0][:300]  # the other lines explain how to debug CUDA
        return cls(device, socket.gethostname(), reason, redact(traceback.format_exc()))


@contextmanager
def open_stage(stage: Stage, run: Run, worker: Worker) -> Iterator[Work]:
    """Open ``stage`` and yield what works on a unit; an error of one unit is in its report and does not end the call.

    A unit that was made meanwhile elsewhere is skipped. A collective stage has one unit, and raises its error.
    ``logs/<stage>-<rank>.jsonl`` has a line for every unit.

    Raises:
        DeviceFailed: the worker's device failed, while the stage was opened or while it worked on a unit, which may be
            tried elsewhere.
        Exception: the stage cannot be opened.
    """
    fields = {"stage": stage.name, "rank": worker.rank}

    def run_unit(unit: int) -> Report:
        if stage.done(run, unit):
            worker.progress.skip(stage.size(run, unit))
            return Report(unit)
        started = time.perf_counter()
        try:
            report = work(unit)
        except Exception as error:
            if failure := DeviceFailed.from_error(error, worker.device):
                seconds = round(time.perf_counter() - started, 3)
                extra = fields | {"unit": unit, "samples": 0, "seconds": seconds, "trace": failure.trace}
                logger.warning("unit %06d is left to another worker: %s", unit, failure.problem, extra=extra)
                raise failure from None
            reason = redact(" ".join(str(error).split())) or "no message"
            trace = "" if isinstance(error, SynthgenError) else redact(traceback.format_exc())
            damaged = str(error.path or "") if isinstance(error, CorruptFile) else ""
            report = Report(unit, error=f"{type(error).__name__}: {reason}", trace=trace, damaged=damaged)
        seconds = round(time.perf_counter() - started, 3)
        extra = fields | {"unit": unit, "samples": report.count, "seconds": seconds}
        if report.error:
            logger.warning("unit %06d failed: %s", unit, report.error, extra=extra | {"trace": report.trace})
        else:
            logger.info("unit %06d done", unit, extra=extra)
        return report

    with logged_to(run.path / "logs" / f"{stage.name}-{worker.rank}.jsonl"):
        try:
            with stage.open(run, worker) as work:
                logger.info("opened on %s, one of %d workers", worker.device, worker.world_size, extra=fields)
                yield work if stage.collective else run_unit
        except Exception as error:
            logger.error("%s: %s", type(error).__name__, error, extra=fields)
            if not stage.collective and (failure := DeviceFailed.from_error(error, worker.device)):
                raise failure from None
            raise
