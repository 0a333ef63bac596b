"""Shared by the benchmarks: timing contenders in turns, and writing results with their provenance."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["machine", "rounds", "write_result"]

FOLDER = Path(__file__).resolve().parent


def rounds(
    contenders: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each of ``repeats`` rounds, after one round that is not counted.

    In a round each runs once, every round beginning with the next one, so that a machine that slows down, or another
    program on it, meets all of them alike.
    """
    names = list(contenders)
    for name in names:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
    return seconds


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` beside this file: the figures with date, machine and commit."""
    path = FOLDER / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = {
        "figures": figures,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "commit": commit(),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    about: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # other work shares the cores
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("numpy", "scipy", "torch"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    return about


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit, with ``+`` where the working tree differs from it; "unknown" without git."""
    try:
        short = git("rev-parse", "--short", "HEAD")
        return short + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """What a git command prints about this repository."""
    done = subprocess.run(["git", *arguments], cwd=FOLDER, check=True, capture_output=True, text=True)
    return done.stdout.strip()
