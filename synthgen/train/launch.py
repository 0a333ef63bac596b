"""Set up Accelerate for a training: processes, devices, precision and trackers."""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env

from synthgen.errors import ConfigError, MissingDependency, UnknownName

__all__ = ["accelerated", "check_compiler", "check_precision", "check_trackers", "num_processes"]


def num_processes() -> int:
    """The number of processes that a launcher started. Accelerate chooses between CPU and GPU at its first use, here.

    Raises:
        ConfigError: the environment gives several processes, but no MASTER_ADDR at which they meet.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        return int(PartialState(cpu=cpu).num_processes)
    except ValueError as error:
        if "MASTER_ADDR" not in str(error):
            raise
        raise ConfigError(
            "the environment says that this is one of several processes (RANK and WORLD_SIZE, or those of MPI), and "
            "not where they meet (MASTER_ADDR); start a training with accelerate launch, or unset RANK and WORLD_SIZE"
        ) from None


def accelerated(
    folder: Path, *, cpu: bool, precision: str, accumulate: int, trackers: Sequence[str], settings: Mapping[str, Any]
) -> Accelerator:
    """The ``Accelerator`` of a training; ``accelerate launch`` and its configuration files are respected.

    Trackers write to ``folder`` and get those ``settings`` that are plain values.

    Raises:
        ConfigError: Accelerate is configured for FSDP, DeepSpeed or Megatron-LM.
    """
    # Accelerate keeps the first call's precision and device for the whole process; another training may need others
    AcceleratorState._reset_state(reset_partial_state=num_processes() == 1)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulate, sync_with_dataloader=False),
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"a training holds the whole model in each process, and Accelerate is configured for "
            f"{accelerator.distributed_type.value}; choose plain data parallelism in `accelerate config`"
        )
    if accelerator.num_processes > 1:
        atexit.register(accelerator.state.destroy_process_group)
    plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("trackers", config=plain)
    return accelerator


def check_precision(precision: str, device: str) -> None:
    """Check that ``device`` supports this precision: on a CPU Accelerate silently uses float32 instead of fp16.

    Raises:
        ConfigError: fp16 is requested on a CPU.
    """
    if precision == "fp16" and (device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")):
        raise ConfigError("precision fp16 is for GPUs, and this training runs on a CPU; give precision bf16, or no")


def check_trackers(trackers: Sequence[str]) -> None:
    """Check that Accelerate knows the trackers and that their libraries are installed.

    Raises:
        UnknownName: Accelerate has no tracker of this name.
        MissingDependency: a tracker's library is not installed.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()} if trackers else ()
    for tracker in trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise UnknownName.among("tracker", tracker, LOGGER_TYPE_TO_CLASS)
        if tracker not in available:
            raise MissingDependency(f"the tracker {tracker!r} is not installed; try: pip install {tracker}")


def check_compiler() -> None:
    """Check that ``torch.compile`` will find a compiler, which without a GPU is a C++ compiler.

    Raises:
        MissingDependency: there is no C++ compiler.
    """
    if not torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        raise MissingDependency("compile=true needs a C++ compiler on this machine; install g++, or leave it out")
