"""The devices, disk and memory of this machine."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from synthgen.devices import cpu_name, num_cores
from synthgen.errors import SynthgenError, one_line
from synthgen.redact import redact
from synthgen.stores import parse_location
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import create_bytes

__all__ = ["DefaultWorkers", "Device", "Disk", "Memory", "default_workers", "devices", "disk", "memory"]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that torch can use."""

    name: str  # torch's name
    model: str
    cores: int | None  # of a CPU
    memory_total: int | None  # bytes of its own; None: it shares main memory
    memory_free: int | None
    bfloat16: bool

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which a pipeline can be loaded."""
        return ("float32", "float16", *(["bfloat16"] if self.bfloat16 else []))


@dataclass(frozen=True, slots=True)
class DefaultWorkers:
    """The workers that ``synthgen generate`` starts by default."""

    devices: tuple[str, ...]
    workers: int


@dataclass(frozen=True, slots=True)
class Disk:
    """Where runs would be written."""

    path: str
    free: int | None  # bytes; None: not on a local disk
    writable: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory, in bytes; None if the system does not report it."""

    total: int | None
    available: int | None


def devices(problems: list[str]) -> tuple[Device, ...]:
    """The devices of this machine, the CPU first."""
    import torch

    found = [Device("cpu", cpu_name(), num_cores(), None, None, bfloat16=True)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{index}"
        try:
            with torch.cuda.device(index):
                free, total = torch.cuda.mem_get_info(index)
                bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            found.append(Device(name, torch.cuda.get_device_name(index), None, total, free, bfloat16))
        except RuntimeError as error:
            problems.append(f"{name} cannot be used ({one_line(error)}); leave it out with CUDA_VISIBLE_DEVICES")
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        newer = torch.backends.mps.is_macos_or_newer(14, 0)
        found.append(Device("mps", "Apple GPU", None, total, free, bfloat16=newer))
    return tuple(found)


def default_workers() -> DefaultWorkers:
    """The workers that ``synthgen generate`` starts by default."""
    from synthgen.devices import devices_for
    from synthgen.stages.generate import Generate

    found = devices_for(Generate(prompts=""))
    return DefaultWorkers(tuple(dict.fromkeys(found)), len(found))


def disk(run: Path, problems: list[str]) -> Disk:
    """The place where runs would be written, tested with a temporary file."""
    free: int | None = None
    writable = False
    try:
        place = parse_location(run)
        if isinstance(place, RemotePath):
            _try_store(place)
            return Disk(str(place), None, writable=True)
        folder, free = place.absolute(), 0
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        writable = True
    except OSError as error:
        problems.append(f"{run} cannot be written to ({error.strerror or error}); choose another --run folder")
    except SynthgenError as error:  # from a store: the message says what to do
        problems.append(str(error))
    return Disk(redact(str(run)), free, writable)


def _try_store(folder: RemotePath) -> None:
    """Write an object to a store and delete it again.

    Raises:
        SynthgenError: the store refuses it.
    """
    path = folder / f".synthgen-doctor-{uuid.uuid4().hex}"
    create_bytes(path, bytes(4096))
    path.unlink(missing_ok=True)


def memory() -> Memory:
    """Main memory."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        return Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None, None)
    kilobytes = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, available = (kilobytes.get(name) for name in ("MemTotal", "MemAvailable"))
    return Memory(total and total * 1024, available and available * 1024)
