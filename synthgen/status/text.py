"""A run's status as plain text for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from synthgen.run import Run
from synthgen.status import Evaluation, RunStatus, Tally, evaluations
from synthgen.text import duration, plain, size, table, wrap

__all__ = ["render", "scores"]

_MOST_ROWS = 12  # of classes and words each


def render(state: RunStatus) -> str:
    """A status as plain text of at most 100 columns, without a newline at its end."""
    return "\n\n".join("\n".join(block) for block in _blocks(state) if block)


def scores(run: Run) -> list[str]:
    """The scores of a run's evaluations as lines of a table; none where there are none."""
    return _score_block(evaluations(run, []))


def _blocks(state: RunStatus) -> Iterator[list[str]]:
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
                    ", ".join(f"{count:,} {remark}" for remark, count in item.notes.items()),
                )
                for item in state.artifacts
            ],
            right=(2, 3, 4, 5, 6),
        )
    yield from _failure_block(state)
    yield _mask_block(state)
    yield _tally_block("class", state.labels)
    yield _tally_block("word", state.words)
    if state.shards is not None:
        splits = ", ".join(f"{name} {count:,}" for name, count in state.shards.splits.items())
        yield [
            plain(f"shards: {state.shards.num_shards} tars, {size(state.shards.bytes)}; samples: {splits or 'none'}")
        ]
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
        )
    yield _score_block(state.evaluations)
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


def _score_block(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = []
    for evaluation in evaluations:
        for score in evaluation.scores:
            name, value = score.main
            rest = [f"{key} {number:.4g}" for key, number in score.values.items() if key not in (name, "low", "high")]
            bounds = (
                f"{score.values['low']:.3f} to {score.values['high']:.3f}"
                if score.values.keys() >= {"low", "high"}
                else ""
            )
            rows.append((evaluation.name, score.of, score.evaluator, name, f"{value:.4g}", bounds, ", ".join(rest)))
    told: dict[str, list[str]] = {}  # by warning, the evaluations that have it
    for evaluation in evaluations:
        for warning in evaluation.warnings:
            told.setdefault(warning, []).append(evaluation.name)
    doubts = [line for warning, names in told.items() for line in wrap(f"note on {', '.join(names)}: {warning}")]
    return (
        table(("evaluate", "of", "by", "score", "value", "95 %", "also"), rows, right=(4,)) + doubts if rows else doubts
    )


def _mask_block(state: RunStatus) -> list[str]:
    if not state.words:
        return []
    kept = f"masks: {sum(tally.masks for tally in state.words):,} kept, {sum(state.dropped.values()):,} dropped"
    return wrap(f"{kept} ({_reasons(state.dropped)})" if state.dropped else kept)


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(dropped.items(), key=lambda item: -item[1]))


def _tally_block(kind: str, tallies: Sequence[Tally]) -> list[str]:
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
        for tally in tallies[:_MOST_ROWS]
    ]
    more = len(tallies) - len(rows)
    rest = [f"... and {more:,} more; synthgen status --json has all"] if more > 0 else []
    return table((kind, "samples", "masks", "dropped", "why"), rows, right=(1, 2, 3)) + rest
