"""A run's status as plain text for the console."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from synthgen.run import Run
from synthgen.status import Evaluation, RunStatus, Tally, evaluations
from synthgen.tallies import CUT_OFF, kind_of
from synthgen.text import counted, duration, plain, size, table, wrap

__all__ = ["render", "scores"]

_MAX_ROWS = 12  # of classes and words each


def render(state: RunStatus, *, whole: bool = False) -> str:
    """A status as plain text of at most 100 columns, without a newline at its end.

    With ``whole`` rows of tables are as long as they must be, and nothing of them is cut: for files and pipes.
    """
    return "\n\n".join("\n".join(block) for block in _blocks(state, whole) if block)


def scores(run: Run, *, whole: bool = False) -> list[str]:
    """The scores of a run's evaluations as lines of a table, ``whole`` as for :func:`render`; none where none are."""
    return _score_block(evaluations(run, []), whole)


def _blocks(state: RunStatus, whole: bool) -> Iterator[list[str]]:
    versions = state.artifacts[-1].versions if state.artifacts else {}
    made = ", ".join(f"{name} {versions[name]}" for name in ("synthgen", "torch", "diffusers") if name in versions)
    yield wrap(f"{state.path}  seed {state.seed}{f'  ({made})' if made else ''}")
    if state.artifacts:
        yield table(
            ("artifact", "made by", "units", "samples", "time", "samples/s", "size", "notes"),
            [
                (
                    item.name,
                    item.stage,
                    f"{item.done}/{item.planned}" + (f", {len(item.failures)} failed" if item.failures else ""),
                    f"{item.samples:,}" if item.samples or not item.done else "",  # a training has none of its own
                    duration(item.seconds),
                    f"{item.rate:.3g}" if item.rate else "",
                    size(item.bytes) if item.bytes else "",
                    ", ".join(counted(count, remark) for remark, count in item.notes.items()),
                )
                for item in state.artifacts
            ],
            right=(2, 3, 4, 5, 6),
            whole=whole,
        )
    yield from _failure_block(state)
    yield list(_left_out(state))
    yield list(_mask_block(state))
    yield _tally_block("class", state.labels, whole)
    yield _tally_block("word", state.words, whole)
    if state.shards is not None:
        splits = ", ".join(f"{name} {count:,}" for name, count in state.shards.splits.items())
        made = f"{counted(state.shards.num_shards, 'tars')}, {size(state.shards.bytes)}"
        yield [plain(f"shards: {made}; samples: {splits or 'none'}")]
    if state.training:
        yield table(
            ("pretrain", "state", "step", "loss"),
            [
                (
                    item.name,
                    "done" if item.done else "not done",
                    f"{item.last['step']:,.0f}" if "step" in item.last else "",
                    f"{item.last['loss']:.4g}" if "loss" in item.last else "",
                )
                for item in state.training
            ],
            right=(2, 3),
            whole=whole,
        )
    yield _score_block(state.evaluations, whole)
    yield wrap(f"next: {state.advice}")


def _failure_block(state: RunStatus) -> Iterator[list[str]]:
    reasons: dict[tuple[str, str], set[int]] = {}
    for artifact in state.artifacts:
        for unit, reason in artifact.failures.items():
            reasons.setdefault((artifact.stage, reason), set()).add(unit)
    lines = []
    for (stage, reason), units in reasons.items():
        shown = ", ".join(f"{unit:06d}" for unit in sorted(units)[:8]) + (", ..." if len(units) > 8 else "")
        lines += wrap(f"failed: {stage} {shown}: {reason}")
    yield lines
    yield [line for problem in state.problems for line in wrap(f"problem: {problem}")]


def _left_out(state: RunStatus) -> Iterator[str]:
    """The first samples that a stage left out, and where all of them stand."""
    for artifact in state.artifacts:
        if artifact.left_out:
            for key, reason in artifact.left_out.items():
                yield from wrap(f"left out: {artifact.stage} {key}: {reason}")
            all_of = counted(artifact.notes.get("failed samples", len(artifact.left_out)), "samples")
            yield from wrap(
                f"left out in all: {all_of}; each is listed with its reason under failed in "
                f"{state.path}/{artifact.name}/NNNNNN.json, where NNNNNN is how its key begins"
            )


def _score_block(evaluations: Sequence[Evaluation], whole: bool) -> list[str]:
    rows = []
    for evaluation in evaluations:
        for score in evaluation.scores:
            name, value = score.main
            rest = [f"{key} {number:.4g}" for key, number in score.values.items() if key not in (name, "low", "high")]
            bounds = ""
            if score.values.keys() >= {"low", "high"}:
                low, high = score.values["low"], score.values["high"]
                bounds = "-" if math.isnan(low) or math.isnan(high) else f"{low:.3f} to {high:.3f}"
            rows.append((evaluation.name, score.of, score.evaluator, name, f"{value:.4g}", bounds, ", ".join(rest)))
    told: dict[str, list[str]] = {}  # by warning, the evaluations that have it
    for evaluation in evaluations:
        for warning in evaluation.warnings:
            told.setdefault(warning, []).append(evaluation.name)
    doubts = [line for warning, names in told.items() for line in wrap(f"note on {', '.join(names)}: {warning}")]
    head = ("evaluate", "of", "by", "score", "value", "95 %", "also")
    return table(head, rows, right=(4,), whole=whole) + doubts if rows else doubts


def _mask_block(state: RunStatus) -> Iterator[str]:
    if not state.words:
        return
    kept = f"masks: {sum(tally.masks for tally in state.words):,} kept, {sum(state.dropped.values()):,} dropped"
    yield from wrap(f"{kept} ({_reasons(state.dropped)})" if state.dropped else kept)
    for one in state.first_dropped:
        yield from wrap(f"dropped: {one.key} {one.word}: {one.reason}")
    if state.first_dropped:
        cut_off = f", words that were cut off under warnings in {state.path}/images" * (
            kind_of(CUT_OFF) in state.dropped
        )
        yield from wrap(
            f"dropped in all: {counted(sum(state.dropped.values()), 'masks')}; each stands with its reason under "
            f"dropped in the json of its sample, in {state.path}/masks/NNNNNN.tar{cut_off}"
        )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(dropped.items(), key=lambda item: -item[1]))


def _tally_block(kind: str, tallies: Sequence[Tally], whole: bool) -> list[str]:
    if not tallies:
        return []
    rows = [
        (
            tally.name,
            f"{tally.samples:,}",
            f"{tally.masks:,}",
            f"{sum(tally.dropped.values()):,}",
            _reasons(tally.dropped),
        )
        for tally in tallies[:_MAX_ROWS]
    ]
    more = len(tallies) - len(rows)
    rest = [f"... and {more:,} more; synthgen status --json has all"] if more > 0 else []
    return table((kind, "samples", "masks", "dropped", "why"), rows, right=(1, 2, 3), whole=whole) + rest
