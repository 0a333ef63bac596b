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

from synthgen.engines._work import DeviceFailed, open_stage
from synthgen.errors import ConfigError, SynthgenError, one_line
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.stores import is_in_memory

__all__ = ["Ray"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Distribute units over ``workers`` actors of a Ray cluster; each opens the stage once, then works on its units.

    The cluster is the one at ``address`` ("auto": the one that ``ray start`` started on this machine), else at
    RAY_ADDRESS, else one on this machine that starts and ends with this process. Its machines need synthgen installed
    and must see the run, and the files that settings name, under the same paths.

    A unit whose worker is killed, or whose machine is lost, or whose GPU fails, is assigned to another up to
    ``retries`` times. The worker is restarted on any machine with room; where there is none, a worker that finds no
    more units takes some. One that ends while it opens the stage, or whose GPU fails, is restarted as often in a row,
    and then left out.
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

    def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
        """One report for each unit, in the order in which they are done.

        Raises:
            ConfigError: there is no cluster at the address, or its workers cannot see the run.
            DeviceFailed: the devices of all workers failed.
            SynthgenError: workers cannot open the stage (no weights, say), or all end while they load. Other errors
                of opening the stage are raised as they are.
        """
        if is_in_memory(run.path):
            raise ConfigError(f"{run.path} lies in the memory of this process, where Ray's workers cannot see it")
        self.connect()
        yield from _Dispatcher(self, stage, run, units).run_all(progress)

    def connect(self) -> None:
        """Connect to the cluster, unless this process is connected already.

        Raises:
            ConfigError: there is no cluster at the address, or this process is connected to another.
        """
        if ray.is_initialized():
            connected = ray.get_runtime_context().gcs_address
            if self.address not in ("", "auto", "local", connected) and not self.address.startswith("ray://"):
                raise ConfigError(
                    f"this process is connected to the Ray cluster at {connected}, not {self.address}; "
                    "leave the address out, or call ray.shutdown() first"
                )
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # clusters that synthgen starts report to nobody
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            _check_port(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RayError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster could be joined at {address} ({one_line(error)}); "
                "begin one with: ray start --head, or give another --address"
            ) from None

    def gpus_per_worker(self, stage: Stage) -> float:
        """GPUs of each worker of ``stage``."""
        if not stage.accelerated:
            return 0.0
        return self.gpus if self.gpus >= 0 else float(_cluster_resources().get("GPU", 0) > 0)

    def max_workers(self, gpus: float) -> int:
        """How many workers with so many ``gpus`` each the cluster has room for."""
        resources = _cluster_resources()
        by_cpus = resources.get("CPU", 0) / self.cpus
        return max(1, int(min(by_cpus, resources.get("GPU", 0) / gpus) if gpus else by_cpus))


@dataclass(frozen=True)
class _Task:
    """A call that an actor works on; the actor lives as long as something refers to it."""

    actor: Any
    rank: int
    unit: int | None = None  # None: it opens the stage


class _Dispatcher:
    """Assigns the units of one call to actors, and restarts the actors that are lost."""

    def __init__(self, engine: Ray, stage: Stage, run: Run, units: Sequence[int]) -> None:
        gpus = engine.gpus_per_worker(stage)
        self.stage, self.run, self.retries = stage, run, engine.retries
        self.num_workers = min(engine.workers or engine.max_workers(gpus), len(units))
        self.options = {"num_cpus": engine.cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        self.shared = (stage, replace(run, path=run.path.absolute()), str(Path.cwd()))
        self.units = deque(units)  # that no actor works on
        self.tasks: dict[Any, _Task] = {}  # by Ray's reference to the result
        self.losses: Counter[int] = Counter()  # of workers, by the unit that they worked on
        self.failures: Counter[int] = Counter()  # consecutive ones, to load or of the device, by the worker's rank

    def run_all(self, progress: Progress) -> Iterator[Report]:
        """One report for each unit."""
        for rank in range(self.num_workers):
            self._start(rank)
        try:
            while self.units or any(task.unit is not None for task in self.tasks.values()):
                report = self._next_result()
                if report is not None:
                    if not report.error:
                        progress.advance(self.stage.size(self.run, report.unit))
                    yield report
        finally:
            for task in self.tasks.values():
                ray.kill(task.actor)

    def _start(self, rank: int) -> None:
        actor = _ACTOR.options(**self.options).remote(*self.shared, rank, self.num_workers)
        self.tasks[actor.ready.remote()] = _Task(actor, rank)

    def _next_result(self) -> Report | None:
        """Wait until an actor is ready, done with its unit, or lost; the report of its unit, if it has one now."""
        (reference,), _ = ray.wait(list(self.tasks))
        task = self.tasks.pop(reference)
        report, loss = _result(reference)
        if loss is not None:
            report = self._handle_loss(task, loss)
        else:
            if report is not None:
                del self.failures[task.rank]
            if self.units:
                unit = self.units.popleft()
                self.tasks[task.actor.work.remote(unit)] = replace(task, unit=unit)
        if not self.units:  # wait for no new workers, and let one without work make room
            self.tasks = {reference: task for reference, task in self.tasks.items() if task.unit is not None}
        return report

    def _handle_loss(self, task: _Task, loss: SynthgenError) -> Report | None:
        """Return the unit of a lost worker to the others, and restart the worker, unless it was lost too often.

        Returns:
            The report of a unit whose worker was lost too often.

        Raises:
            DeviceFailed, SynthgenError: no worker is left.
        """
        report = None
        device_failed = isinstance(loss, DeviceFailed)
        if task.unit is not None:
            self.losses[task.unit] += 1
            if self.losses[task.unit] <= self.retries:
                self.units.append(task.unit)
            else:
                report = Report(task.unit, error=f"its worker was lost {self.losses[task.unit]} times: {loss.problem}")
        if device_failed:
            ray.kill(task.actor)  # its process can compute no more, and may hang when it is asked to exit
        if task.unit is None or device_failed:
            self.failures[task.rank] += 1
        if self.failures[task.rank] <= self.retries:
            self._start(task.rank)
            return report
        cause = loss.problem if device_failed else f"it ended while it loaded; {loss.problem}"
        logger.warning("worker %d is left out: %s", task.rank, cause)
        if self.units and not self.tasks:
            self._start(self._usable_rank(loss))
        return report

    def _usable_rank(self, last: SynthgenError) -> int:
        """The rank of a worker that is not left out; it stopped when there were no units.

        Raises:
            DeviceFailed, SynthgenError: all are left out; the ``last`` one because of this error.
        """
        for rank in range(self.num_workers):
            if self.failures[rank] <= self.retries:
                return rank
        if isinstance(last, DeviceFailed):
            raise last
        raise SynthgenError(
            f"every Ray worker ended while it loaded what {self.stage.name} needs, the last one {self.retries + 1} "
            f"times in a row: {last}; give them more memory, or a smaller model"
        )


def _check_port(address: str) -> None:
    """Check that something listens at an address of host and port; Ray itself would try for minutes.

    Raises:
        OSError: nothing does.
        ValueError: it is not an address.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _cluster_resources() -> dict[str, float]:
    """All CPUs and GPUs of the cluster, in use or not."""
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def _result(reference: Any) -> tuple[Report | None, SynthgenError | None]:
    """The result of a task: a report, or None from a worker that is ready; and why its worker was lost, if it was.

    A worker whose device failed counts as lost although its process lives.

    Raises:
        ConfigError: workers cannot be started.
        Exception: the stage cannot be opened.
    """
    try:
        return ray.get(reference), None
    except RayTaskError as error:  # errors of units are in their reports, so that this is one of opening the stage
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

    def __init__(self, stage: Stage, run: Run, folder: str, rank: int, size: int) -> None:
        if Path(folder).is_dir():  # relative paths mean what they mean where the command was given
            os.chdir(folder)
        device = "cuda:0" if ray.get_gpu_ids() else "cpu"  # Ray shows a worker its own GPUs alone
        self._stack = ExitStack()
        self._error: Exception | None = None
        try:
            self._work = self._stack.enter_context(open_stage(stage, run, Worker(rank, size, device)))
        except Exception as error:  # for ``ready``: Ray replaces what is raised here by an error of its own
            self._error = error

    def ready(self) -> None:
        """Return when the stage is open, or raise the error of opening it."""
        if self._error is not None:
            raise self._error

    def work(self, unit: int) -> Report:
        """Work on a unit."""
        self.ready()
        return self._work(unit)


_ACTOR: Any = ray.remote(_Actor)
