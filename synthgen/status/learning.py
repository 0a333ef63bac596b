"""The trainings and evaluations of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

from synthgen.run import Run
from synthgen.status.artifacts import ArtifactStatus
from synthgen.status.reading import is_number, read_object

__all__ = ["Evaluation", "Score", "Training", "evaluations", "training_in"]


@dataclass(frozen=True, slots=True)
class Training:
    """One folder of ``pretrain``."""

    name: str
    done: bool
    last: dict[str, float] = field(default_factory=dict)  # the last record of its metrics
    curve: tuple[tuple[float, float], ...] = ()  # step and loss
    outdated: bool = False  # the run's shards have been packed anew since


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one model by one evaluator."""

    of: str  # the model, such as "mae" or its baseline "random encoder"
    evaluator: str
    values: dict[str, float]  # the main metric comes first; ``low`` and ``high`` are its interval, NaN without one
    test: str = ""  # the images or true masks of the test; empty if the file does not say

    @property
    def main(self) -> tuple[str, float]:
        """Name and value of the main metric."""
        return next((item for item in self.values.items() if item[0] not in ("low", "high")), ("", float("nan")))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One file of ``evaluate``."""

    name: str
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()  # why the scores are doubtful
    seconds: float = 0.0


def training_in(folder: Path, artifact: ArtifactStatus | None, *, outdated: bool = False) -> Training:
    """The training in a folder; ``artifact`` is its status, if it has settings. For ``outdated`` see Training."""
    rows: list[dict[str, float]] = []
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a line that is still being written
            continue
        if isinstance(row, dict):
            rows.append({str(key): float(value) for key, value in row.items() if is_number(value)})
    curve = tuple((row["step"], row["loss"]) for row in rows if "step" in row and "loss" in row)
    done = bool(artifact.done) if artifact else (folder / "done.json").is_file()
    return Training(folder.name, done, rows[-1] if rows else {}, curve, outdated)


def evaluations(run: Run, problems: list[str]) -> tuple[Evaluation, ...]:
    """The evaluations of a run; unreadable files are listed in ``problems``."""
    found = []
    for path in sorted(run.folder("evaluate").glob("*.json")):
        value = read_object(path, problems)
        scores, warnings, tests = value.get("scores"), value.get("warnings"), _test_sets(value)
        rows = _score_rows(scores) if isinstance(scores, dict) else ()
        found.append(
            Evaluation(
                path.stem,
                tuple(replace(row, test=tests[row.of == "masks"]) for row in rows),
                tuple(str(warning) for warning in warnings) if isinstance(warnings, list) else (),
                float(value["seconds"]) if is_number(value.get("seconds")) else 0.0,
            )
        )
    return tuple(found)


def _test_sets(value: Mapping[str, Any]) -> tuple[str, str]:
    """The test set of the scores of models, and that of the scores of masks, from the settings of an evaluation."""
    settings = value.get("settings")
    if not isinstance(settings, dict) or not {"test", "truth"} <= settings.keys():
        return "", ""
    return str(settings["test"] or "shards/val"), str(settings["truth"])


def _score_rows(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Score]:
    """The innermost mappings that hold numbers; the keys above them are the model and the evaluator."""
    numbers = {key: float(item) for key, item in value.items() if is_number(item)}
    if numbers:
        numbers |= {key: nan for key in ("low", "high") if value.get(key, 0) is None}  # no interval
        yield Score(" ".join(path[:-1]), path[-1] if path else "", numbers)
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _score_rows(item, (*path, key))
