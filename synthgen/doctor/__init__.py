"""Check this machine, without downloading anything or leaving files behind."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthgen.doctor import machine
from synthgen.doctor.libraries import Extra, check_libraries, extras
from synthgen.doctor.machine import DefaultWorkers, Device, Disk, Memory
from synthgen.doctor.models import HostedModel, ShippedModel, hosted_model, shipped_model
from synthgen.doctor.recording import Attention, attention_on
from synthgen.entries import versions

__all__ = [
    "Attention",
    "DefaultWorkers",
    "Device",
    "Disk",
    "Examination",
    "Extra",
    "HostedModel",
    "Memory",
    "ShippedModel",
    "examine",
]


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that ``synthgen doctor`` reports."""

    versions: dict[str, str]
    platform: str
    devices: tuple[Device, ...]
    generate: DefaultWorkers | None
    attention: tuple[Attention, ...]
    disk: Disk
    memory: Memory
    shipped: ShippedModel | None
    model: HostedModel | None
    extras: tuple[Extra, ...]
    notes: tuple[str, ...]  # possible improvements
    problems: tuple[str, ...]  # what must be fixed, one line each

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"ok": not self.problems, **asdict(self)}


def examine(run: Path, model: str = "", describe: Callable[[str], None] = lambda text: None) -> Examination:
    """Check this machine; what does not work is listed in ``problems`` instead of raised.

    Args:
        run: where runs would be written; it need not exist yet.
        model: a short name, folder or hub id to check as well.
        describe: called before each check with its description.
    """
    problems: list[str] = []
    notes: list[str] = []
    devices: tuple[Device, ...] = ()
    workers, shipped, hosted = None, None, None
    attention: list[Attention] = []
    describe("checking libraries and devices")
    if check_libraries(problems):
        devices, workers = machine.devices(problems), machine.default_workers()
        if len(devices) == 1 and Path("/dev/nvidiactl").exists():
            notes.append(
                "there is an NVIDIA driver, but this torch build finds no GPU; see pytorch.org for one that does"
            )
        for device in devices:
            describe(f"recording attention on {device.name}")
            attention += attention_on(device, problems)
        describe("loading the shipped model")
        shipped = shipped_model(problems)
        if model:
            describe(f"looking for the model {model}")
            hosted = hosted_model(model, problems, notes)
    return Examination(
        versions(),
        platform.platform(),
        devices,
        workers,
        tuple(attention),
        machine.disk(run, problems),
        machine.memory(),
        shipped,
        hosted,
        extras(),
        tuple(notes),
        tuple(problems),
    )
