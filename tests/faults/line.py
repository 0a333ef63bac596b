"""The lines that are disturbed: a few small images through every stage, and what their folders must hold in the end."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["LINES", "Line", "begun", "done_twice", "finished", "prepare", "sums"]

WORDS = ("dog", "pizza", "car", "flower")

_MADE = """
run: run
engine: {workers: 1}
stages:
  generate: {prompts: ../prompts.txt, images_per_prompt: 3, unit_size: 3, backbone: {name: tiny, num_steps: 2}}
  masks: {refine: attentioncut}
  filter: {filters: [blank, duplicate]}
  shards: {samples_per_shard: 3, val_ratio: 0.3}
  pretrain:
    {method: mae, encoder: {name: micro, dim: 32, depth: 2}, epochs: 8, batch_size: 4, save_every: 2, log_every: 1,
     num_workers: 0}
  evaluate: {num_workers: 0}
"""
_GIVEN = """
run: run
engine: {workers: 1}
stages:
  attend: {images: ../pictures, timesteps: [100], unit_size: 3}
  masks: {}
  shards: {samples_per_shard: 3, val_ratio: 0}
"""


@dataclass(frozen=True)
class Line:
    """A pipeline file, and the artifacts that each of its stages makes."""

    name: str
    file: str
    stages: dict[str, tuple[str, ...]]


LINES = {
    "made": Line(
        "made",
        _MADE,
        {
            "generate": ("images", "maps"),
            "masks": ("masks",),
            "filter": ("filter",),
            "shards": ("shards",),
            "pretrain": ("pretrain/mae",),
            "evaluate": (),
        },
    ),
    "given": Line("given", _GIVEN, {"attend": ("images", "maps"), "masks": ("masks",), "shards": ("shards",)}),
}


def prepare(box: Path) -> None:
    """Put down what the lines read: prompts, and pictures with captions."""
    (box / "prompts.txt").write_text("".join(f"a photo of a [{word}]\n" for word in WORDS))
    folder = box / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        pixels = rng.integers(60, 120, (64, 64, 3)).astype(np.uint8)
        pixels[20:44, 16:48] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of a [{WORDS[number % len(WORDS)]}]")


# -- what a run holds


def begun(run: Path, line: Line, stage: str) -> bool:
    """Whether a stage has put down its first file."""
    notes = (run / name / "settings.yaml" for name in line.stages[stage])
    return any(path.exists() for path in notes) or any(run.glob(f"logs/{stage}-*.jsonl"))


def sums(run: Path) -> dict[str, str]:
    """What does not depend on when and by whom it was made: the sha256 of each file, and the scores."""
    kept = (
        "**/*.tar",
        "**/*.parquet",
        "filter/rejected.json",
        "shards/*.json",
        "shards/README.md",
        "shards/*/sizes.json",
        "pretrain/*/encoder.*",
    )
    files = {path for pattern in kept for path in run.glob(pattern)}
    found = {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for path in run.glob("evaluate/*.json"):
        scores = json.dumps(json.loads(path.read_text())["scores"], sort_keys=True)
        found[path.relative_to(run).as_posix()] = hashlib.sha256(scores.encode()).hexdigest()
    return found


def finished(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file that belongs to finished work: another one was made again."""
    files: set[Path] = {*run.glob("pretrain/*/checkpoints/step-*.safetensors"), *run.glob("evaluate/*.json")}
    for mark in (*run.glob("*/[0-9]*.json"), *run.glob("shards/*/*_stats.json")):
        tar = mark.with_name(mark.name.removesuffix(".json").removesuffix("_stats") + ".tar")
        told = json.loads(mark.read_text())
        if tar.is_file() and told.get("bytes") == tar.stat().st_size:
            files |= {mark, tar}
    for mark in run.glob("pretrain/*/done.json"):
        files |= {mark, mark.with_name("encoder.safetensors")}
    return {path.relative_to(run).as_posix(): _identity(path) for path in files}


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_ino, about.st_mtime_ns


def done_twice(run: Path) -> list[tuple[str, int]]:
    """Stage and number of the units that the logs say were made more than once."""
    made: Counter[tuple[str, int]] = Counter()
    for path in run.glob("logs/*.jsonl"):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if re.fullmatch(r"unit \d+ done", line["message"]) and line["samples"]:
                made[line["stage"], line["unit"]] += 1
    return sorted(unit for unit, times in made.items() if times > 1)
