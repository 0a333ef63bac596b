"""What was learned in a run: its trainings, and what evaluations found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from synthgen.run import Run
from synthgen.status.artifacts import ArtifactStatus
from synthgen.status.reading import is_number, read_object

__all__ = ["Evaluation", "Score", "Training", "evaluations", "training_in"]

_NOT_SCORES = {"settings", "versions", "inputs", "seed", "seconds", "train", "test"}  # of a file without ``scores``


@dataclass(frozen=True, slots=True)
class Training:
    """One folder of ``pretrain``."""

    name: str
    done: bool
    last: dict[str, float] = field(default_factory=dict)  # the last record of its metrics
    curve: tuple[tuple[float, float], ...] = ()  # step and loss


@dataclass(frozen=True, slots=True)
class Score:
    """What one evaluator says of one thing."""

    of: str  # such as "mae", or "random encoder" beside it
    evaluator: str
    values: dict[str, float]  # the score comes first; ``low`` and ``high`` bound it, NaN where nothing does

    @property
    def main(self) -> tuple[str, float]:
        """The score itself, with its name."""
        return next((item for item in self.values.items() if item[0] not in ("low", "high")), ("", float("nan")))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One file of ``evaluate``."""

    name: str
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()  # what makes the scores doubtful
    seconds: float = 0.0


def training_in(folder: Path, artifact: ArtifactStatus | None) -> Training:
    """The training of a folder; ``artifact`` is what the manifest says of it, if anything."""
    rows: list[dict[str, float]] = []
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the line that is being written just now
            continue
        if isinstance(row, dict):
            rows.append({str(key): float(value) for key, value in row.items() if is_number(value)})
    curve = tuple((row["step"], row["loss"]) for row in rows if "step" in row and "loss" in row)
    done = bool(artifact.done) if artifact else (folder / "done.json").is_file()
    return Training(folder.name, done, rows[-1] if rows else {}, curve)


def evaluations(run: Run, problems: list[str]) -> tuple[Evaluation, ...]:
    """What each evaluation of a run found; files that cannot be read are named in ``problems``."""
    found = []
    for path in sorted(run.folder("evaluate").glob("*.json")):
        value = read_object(path, problems)
        scores = value.get("scores")
        if not isinstance(scores, dict):
            scores = {key: item for key, item in value.items() if key not in _NOT_SCORES}
        warnings = value.get("warnings")
        found.append(
            Evaluation(
                path.stem,
                tuple(_score_rows(scores)),
                tuple(str(warning) for warning in warnings) if isinstance(warnings, list) else (),
                float(value["seconds"]) if is_number(value.get("seconds")) else 0.0,
            )
        )
    return tuple(found)


def _score_rows(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Score]:
    """The innermost mappings that hold numbers; the keys on the way say of what and by whom."""
    numbers = {key: float(item) for key, item in value.items() if is_number(item)}
    if numbers:
        numbers |= {
            key: nan for key in ("low", "high") if value.get(key, 0) is None
        }  # an interval that there is none of
        yield Score(" ".join(path[:-1]), path[-1] if path else "", numbers)
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _score_rows(item, (*path, key))
