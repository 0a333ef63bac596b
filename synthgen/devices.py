"""The processor and the devices of this machine, and the rank of this process among those of a launcher."""

from __future__ import annotations

import math
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.errors import ConfigError

if TYPE_CHECKING:
    from synthgen.stages import Stage

__all__ = ["Place", "cpu_name", "devices_for", "has_intel_cpu", "num_cores", "place"]

#: Environment variables that launchers set: accelerate and torchrun, then the common MPIs.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Place:
    """The rank of a process among those that a launcher started."""

    rank: int
    size: int  # number of processes on all machines
    local_rank: int  # rank among the processes of this machine


def place() -> Place:
    """The rank of this process, from the environment variables of its launcher; 0 of 1 without a launcher.

    Raises:
        ConfigError: a variable is not a whole number, or the rank is not from 0 to size - 1.
    """
    rank, size, local_rank = (_number(names, default) for names, default in ((_RANK, 0), (_SIZE, 1), (_LOCAL_RANK, 0)))
    if not 0 <= rank < size:
        raise ConfigError(
            f"this process is number {rank} (RANK) of {size} (WORLD_SIZE), and numbers go from 0 to {size - 1}; "
            "start it with accelerate launch, or set both (a Slurm array should begin at 0)"
        )
    return Place(rank, size, local_rank)


def _number(names: tuple[str, ...], default: int) -> int:
    name = next((name for name in names if os.environ.get(name)), "")
    try:
        return int(os.environ[name]) if name else default
    except ValueError:
        raise ConfigError(f"{name} must be a whole number, not {os.environ[name]!r}") from None


def devices_for(stage: Stage) -> list[str]:
    """The device of each worker: one worker per GPU or, without GPUs or for stages that use none, per core."""
    cores = ["cpu"] * num_cores()
    if not stage.accelerated:
        return cores
    import torch

    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else cores


def num_cores() -> int:
    """The cores that this process may use: those it is bound to, or fewer by the quota of its container."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, _cgroup_quota() or bound))


def _cgroup_quota() -> int:
    """The cores that the control group of this process may keep busy, rounded up (Linux); 0: no quota."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        with suppress(OSError, ValueError):  # "max" and -1 mean that there is none
            text = " ".join((_CGROUP / file).read_text(encoding="ascii") for file in files)
            quota, period = (int(number) for number in text.split())
            return math.ceil(quota / period) if min(quota, period) > 0 else 0
    return 0


def cpu_name() -> str:
    """The model of this machine's processor, as far as the system tells it."""
    model = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def has_intel_cpu() -> bool:
    """Whether the processor says that Intel made it."""
    return "GenuineIntel" in (_cpuinfo() or platform.processor())


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
