"""The machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RayTaskError

from synthgen.engines import Listener
from synthgen.engines._work import DeviceFailed, opened
from synthgen.errors import ConfigError, SynthgenError, one_line
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.stores import is_in_memory

__all__ = ["Ray"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Deal units out to ``workers`` actors of a Ray cluster; each opens the stage once, then works on unit after unit.

    The cluster is the one at ``address`` ("auto": the one that ``ray start`` began on this machine), else at
    RAY_ADDRESS, else one of this machine that begins and ends with this process. Its machines need synthgen installed
    and must see the run, and the files that settings name, under the same paths.

    A unit whose worker is killed, or whose machine is lost, or whose GPU fails, is given to another up to ``retries``
    times. The worker is begun again on any machine with room; where there is none, a worker that finds no more units
    makes some. One that ends while it opens the stage, or whose GPU fails, is begun again as often in a row, and then
    left out.
    """

    collective: ClassVar = False

    workers: int = 0  # at most; 0: as many as the cluster has room for
    address: str = ""  # of the cluster, such as head:6379; RAY_ADDRESS, or one here, where it is empty
    cpus: float = 1.0  # of each worker
    gpus: float = -1.0  # of each worker of a stage that can use them; -1: 1 where the cluster has any
    retries: int = 3  # of a unit whose worker was lost, and of a worker that is lost while it loads

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (as many as fit) or more, not {self.workers}")
        if not self.cpus > 0:
            raise ValueError(f"cpus must be above 0, not {self.cpus}")
        if self.gpus < 0 and self.gpus != -1:
            raise ValueError(f"gpus must be 0 or more, or -1 (1 where there are any), not {self.gpus}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, not {self.retries}")

    def map(self, stage: Stage, run: Run, units: Sequence[int], listener: Listener) -> Iterator[Report]:
        """One report for each unit, as they come.

        Raises:
            ConfigError: there is no cluster at the address, or its workers cannot see the run.
            DeviceFailed: the devices of all workers failed.
            SynthgenError, or whatever else the stage could not be opened for (no weights, say, or every worker ends
                while it loads): no unit can be made.
        """
        if is_in_memory(run.path):
            raise ConfigError(f"{run.path} lies in the memory of this process, where Ray's workers cannot see it")
        self.join()
        gpus = self.gpus_of(stage)
        count = min(self.workers or self.room(gpus), len(units))
        options = {"num_cpus": self.cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        shared = (stage, replace(run, path=run.path.absolute()), str(Path.cwd()))
        doing: dict[Any, tuple[Any, int, int | None]] = {}  # task → its actor, the rank of that, and the unit, if any

        def begin(rank: int) -> None:  # an actor lives as long as something in ``doing`` holds it
            actor = _ACTOR.options(**options).remote(*shared, rank, count)
            doing[actor.ready.remote()] = (actor, rank, None)

        for rank in range(count):
            begin(rank)
        left, lost, fallen = deque(units), Counter[int](), Counter[int]()
        try:
            while left or any(unit is not None for _, _, unit in doing.values()):
                (task,), _ = ray.wait(list(doing))
                actor, rank, unit = doing.pop(task)
                report, end = _result(task)
                if end is not None:
                    reason = end.short if isinstance(end, DeviceFailed) else str(end)
                    if unit is not None:  # elsewhere then; this worker has no other until it is back
                        lost[unit] += 1
                        if lost[unit] <= self.retries:
                            left.append(unit)
                        else:
                            report = Report(unit, error=f"its worker was lost {lost[unit]} times: {reason}")
                    if isinstance(end, DeviceFailed):
                        ray.kill(actor)  # its process computes no more, and may hang when it is asked to end
                    if unit is None or isinstance(end, DeviceFailed):
                        fallen[rank] += 1
                    if fallen[rank] <= self.retries:
                        begin(rank)
                    else:
                        how = reason if isinstance(end, DeviceFailed) else f"it ended while it loaded; {reason}"
                        logger.warning("worker %d is left out: %s", rank, how)
                        if left and not doing:  # one that had found no more units may be called back
                            begin(_spare(stage, [fallen[each] for each in range(count)], self.retries, end))
                else:
                    if report is not None:
                        del fallen[rank]
                    if left:
                        following = left.popleft()
                        doing[actor.work.remote(following)] = (actor, rank, following)
                if not left:  # wait for no new workers, and let one without work make room
                    doing = {task: value for task, value in doing.items() if value[2] is not None}
                del actor
                if report is not None:
                    if not report.error:
                        listener.advance(stage.size(run, report.unit))
                    yield report
        finally:
            for actor, _, _ in doing.values():
                ray.kill(actor)

    def join(self) -> None:
        """Connect to the cluster, unless this process has done so.

        Raises:
            ConfigError: there is no cluster at the address, or this process has joined another.
        """
        if ray.is_initialized():
            joined = ray.get_runtime_context().gcs_address
            if self.address not in ("", "auto", "local", joined) and not self.address.startswith("ray://"):
                raise ConfigError(
                    f"this process is connected to the Ray cluster at {joined}, not {self.address}; "
                    "leave the address out, or call ray.shutdown() first"
                )
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we begin reports to nobody
        where = self.address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            _knock(where)
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RayError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster could be joined at {where} ({one_line(error)}); "
                "begin one with: ray start --head, or give another --address"
            ) from None

    def gpus_of(self, stage: Stage) -> float:
        """GPUs of each worker."""
        if not stage.accelerated:
            return 0.0
        return self.gpus if self.gpus >= 0 else float(_resources().get("GPU", 0) > 0)

    def room(self, gpus: float) -> int:
        """How many workers the cluster has room for now."""
        has = _resources()
        fit = has.get("CPU", 0) / self.cpus
        return max(1, int(min(fit, has.get("GPU", 0) / gpus) if gpus else fit))


def _spare(stage: Stage, fallen: Sequence[int], retries: int, last: SynthgenError) -> int:
    """The rank of a worker that is not left out, by how often each has ended in a row.

    Raises:
        DeviceFailed, SynthgenError: there is none, because of what the ``last`` one ended with.
    """
    for rank, times in enumerate(fallen):
        if times <= retries:
            return rank
    if isinstance(last, DeviceFailed):
        raise last
    raise SynthgenError(
        f"every Ray worker ended while it loaded what {stage.name} needs, the last one {retries + 1} times in a row: "
        f"{last}; give them more memory, or a smaller model"
    )


def _knock(address: str) -> None:
    """See that something listens at an address of host and port; Ray itself would try for minutes.

    Raises:
        OSError, ValueError: nothing does, or it is no address.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _resources() -> dict[str, float]:
    """All CPUs and GPUs of the cluster, in use or not."""
    found: dict[str, float] = ray.cluster_resources()
    return found


def _result(task: Any) -> tuple[Report | None, SynthgenError | None]:
    """What a task ended with: a report, or nothing of a worker that is ready; and why its worker was lost, if it was.

    A worker whose device failed is lost, though its process lives.

    Raises:
        Whatever the stage could not be opened for.
        ConfigError: a worker cannot be begun at all.
    """
    try:
        return ray.get(task), None
    except RayTaskError as error:  # units report what goes wrong with them: this is the stage that cannot be opened
        if isinstance(error.cause, DeviceFailed):
            return None, error.cause
        raise error.cause from None
    except RayError as error:
        if getattr(error, "actor_init_failed", False):
            raise ConfigError(
                f"a Ray worker could not be begun ({one_line(error)}); synthgen must be installed on every machine"
            ) from None
        return None, SynthgenError(f"killed, or out of memory ({one_line(error)})")


class _Actor:
    """A worker of the cluster."""

    def __init__(self, stage: Stage, run: Run, folder: str, rank: int, count: int) -> None:
        if Path(folder).is_dir():  # relative paths mean what they mean where the command was given
            os.chdir(folder)
        device = "cuda:0" if ray.get_gpu_ids() else "cpu"  # Ray shows a worker its own GPUs alone
        self._stack = ExitStack()
        self._error: Exception | None = None
        try:
            self._work = self._stack.enter_context(opened(stage, run, Worker(rank, count, device)))
        except Exception as error:  # told by ``ready``, as it was raised
            self._error = error

    def ready(self) -> None:
        """Return when the stage is open, or raise why it is not."""
        if self._error is not None:
            raise self._error

    def work(self, unit: int) -> Report:
        """Work on a unit."""
        self.ready()
        return self._work(unit)


_ACTOR: Any = ray.remote(_Actor)
