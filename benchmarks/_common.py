"""Shared by the benchmarks: timing in alternating rounds, drawn images, command lines, results with provenance."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from synthgen.devices import cpu_name
from synthgen.records import AFFINITY_OFFSETS, Generation, Maps, Request

__all__ = ["commit", "draw_generation", "iou", "machine", "make_parser", "rounds", "write_result"]

FOLDER = Path(__file__).resolve().parent


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes the running script by the first line of its docstring."""
    script = Path(sys.argv[0]).name
    return argparse.ArgumentParser(prog=f"python benchmarks/{script}", description=(doc or "").splitlines()[0])


def rounds(
    contenders: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds of each contender in each of ``repeats`` rounds, after one round that is not counted.

    Each contender runs once per round, and each round starts with the next one, so that a change in the speed of the
    machine affects all of them alike.
    """
    names = list(contenders)
    for name in names:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
    return seconds


def draw_generation(request: Request, size: int, grid: int) -> Generation:
    """Two ellipses on noise, with the cross-attention maps of a model that sees them well; the prompt has two words."""
    rng = np.random.default_rng(request.seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    image = rng.integers(60, 120, (size, size, 3)).astype(np.uint8)
    masks = np.zeros((2, size, size), bool)
    for k in range(2):
        row, column, height, width = rng.uniform((0.4, 0.2 + 0.5 * k, 0.12, 0.12), (0.6, 0.3 + 0.5 * k, 0.25, 0.2))
        masks[k] = ((y - row) / height) ** 2 + ((x - column) / width) ** 2 < 1
        image[masks[k]] = rng.integers(0, 256, 3)
    coarse = masks.reshape(2, grid, size // grid, grid, size // grid).mean((2, 4))
    weights = np.clip(0.4 * coarse + rng.normal(0, 0.02, coarse.shape), 0, 1).astype(np.float16)
    affinity = rng.uniform(0.5, 4, (len(AFFINITY_OFFSETS), grid, grid)).astype(np.float16)
    return Generation(request, image, Maps(request.prompt.words, weights, affinity))


def iou(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Intersection over union."""
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: the figures with date, machine and commit."""
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
    """The processor, the system, and the versions of Python and of the numeric libraries."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # includes other programs
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("numpy", "scipy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit, with ``+`` if the working tree differs from it; "unknown" without git."""
    try:
        short = git("rev-parse", "--short", "HEAD")
        return short + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """The output of a git command in this repository."""
    done = subprocess.run(["git", *arguments], cwd=FOLDER, check=True, capture_output=True, text=True)
    return done.stdout.strip()
