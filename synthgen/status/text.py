"""A run's status as plain text for the console."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from synthgen.rejected import FILTER, REJECTED
from synthgen.run import Run
from synthgen.status import Evaluation, RunStatus, Tally, evaluations
from synthgen.text import counted, duration, plain, size, table, wrap

__all__ = ["render", "scores", "short_names"]

_MAX_ROWS = 12  # of classes and words each


def render(state: RunStatus, *, whole: bool = False) -> str:
    """A status as plain text of at most 100 columns, without a newline at its end.

    With ``whole`` table rows are not truncated: for files and pipes.
    """
    return "\n\n".join("\n".join(block) for block in _blocks(state, whole) if block)


def scores(run: Run, name: str = "", *, whole: bool = False) -> list[str]:
    """The scores of a run's evaluations, or of the one called ``name``, as lines of a table; empty without scores.

    ``whole`` as for :func:`render`.
    """
    return _score_block([one for one in evaluations(run, []) if name in ("", one.name)], whole)


def _blocks(state: RunStatus, whole: bool) -> Iterator[list[str]]:
    versions = state.artifacts[-1].versions if state.artifacts else {}
    made = ", ".join(f"{name} {versions[name]}" for name in ("synthgen", "torch", "diffusers") if name in versions)
    yield wrap(f"{state.path}  seed {state.seed}{f'  ({made})' if made else ''}")
    if state.artifacts:
        yield table(
            ("artifact", "stage", "units", "samples", "time", "samples/s", "size", "notes"),
            [
                (
                    item.name,
                    item.stage,
                    f"{item.done}/{item.planned}" + (f", {len(item.failures)} failed" if item.failures else ""),
                    f"{item.samples:,}" if item.samples or not item.done else "",  # a training has no samples
                    "" if item.name == "maps" else duration(item.seconds),  # measured with images
                    f"{item.rate:.3g}" if item.rate and item.name != "maps" else "",
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
                    ("done" if item.done else "not done") + ", on earlier shards" * item.outdated,
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
    lines = []
    for (stage, reason), units in state.failures.items():
        shown = ", ".join(f"{unit:06d}" for unit in units[:8]) + (", ..." if len(units) > 8 else "")
        lines += wrap(f"failed: {stage} {shown}: {reason}")
    yield lines
    yield [line for problem in state.problems for line in wrap(f"problem: {problem}")]


def _left_out(state: RunStatus) -> Iterator[str]:
    """The first samples that a stage left out, and where all of them are listed."""
    for artifact in state.artifacts:
        if artifact.left_out:
            for key, reason in artifact.left_out.items():
                yield from wrap(f"left out: {artifact.stage} {key}: {reason}")
            if artifact.name == FILTER:
                total = sum(artifact.notes.values())
                listed = f"in {state.path}/{FILTER}/{REJECTED}"
            else:
                total = artifact.notes.get("failed samples", len(artifact.left_out))
                listed = (
                    f"under failed in {state.path}/{artifact.name}/NNNNNN.json, where NNNNNN are the first six digits "
                    "of the key"
                )
            yield from wrap(f"left out in total: {counted(total, 'samples')}; the reasons are {listed}")


def _score_block(evaluations: Sequence[Evaluation], whole: bool) -> list[str]:
    rows, tests = [], short_names([score.test for evaluation in evaluations for score in evaluation.scores])
    for evaluation in evaluations:
        for score in evaluation.scores:
            name, value = score.main
            rest = [f"{key} {number:.4g}" for key, number in score.values.items() if key not in (name, "low", "high")]
            bounds = ""
            if score.values.keys() >= {"low", "high"}:
                low, high = score.values["low"], score.values["high"]
                bounds = "-" if math.isnan(low) or math.isnan(high) else f"{low:.3f} to {high:.3f}"
            test = (tests[score.test],) if len(tests) > 1 else ()
            numbers = (name, f"{value:.4g}", bounds, ", ".join(rest))
            rows.append((evaluation.name, score.of, score.evaluator, *test, *numbers))
    by_warning: dict[str, list[str]] = {}  # warning → evaluations
    for evaluation in evaluations:
        for warning in evaluation.warnings:
            by_warning.setdefault(warning, []).append(evaluation.name)
    notes = [line for warning, names in by_warning.items() for line in wrap(f"note on {', '.join(names)}: {warning}")]
    test = ("test set",) if len(tests) > 1 else ()
    head = ("evaluation", "model", "evaluator", *test, "metric", "value", "95% CI", "other metrics")
    return table(head, rows, right=(head.index("value"),), whole=whole) + notes if rows else notes


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path by as few of its last parts as tell all of them apart."""
    parts = {path: path.split("/") for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0)):
        short = {path: "/".join(part[-count:]) for path, part in parts.items()}
        if len(set(short.values())) == len(parts):
            return short
    return {path: path for path in parts}


def _mask_block(state: RunStatus) -> Iterator[str]:
    if not state.words:
        return
    dropped, cut_off = sum(state.dropped.values()), counted(state.words_cut_off, "words")
    kept = f"masks: {sum(tally.masks for tally in state.words):,} kept, {dropped:,} dropped"
    kept += f" ({_reasons(state.dropped)})" if dropped else ""
    yield from wrap(f"{kept}, {cut_off} cut off" if state.words_cut_off else kept)
    for one in state.first_dropped:
        yield from wrap(f"{'cut off' if one.cut_off else 'dropped'}: {one.key} {one.word}: {one.reason}")
    if dropped:
        yield from wrap(
            f"dropped in total: {counted(dropped, 'masks')}; the reasons are under dropped in the json of each sample, "
            f"in {state.path}/masks/NNNNNN.tar"
        )
    if state.words_cut_off:
        yield from wrap(
            f"cut off in total: {cut_off}; they are under words_cut_off in the json of each sample, "
            f"in {state.path}/images/NNNNNN.tar"
        )


def _reasons(dropped: Mapping[str, int], cut_off: int = 0) -> str:
    counts = [*sorted(dropped.items(), key=lambda item: -item[1]), *([("cut off", cut_off)] if cut_off else [])]
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)


def _tally_block(kind: str, tallies: Sequence[Tally], whole: bool) -> list[str]:
    if not tallies:
        return []
    rows = [
        (
            tally.name,
            f"{tally.samples:,}",
            f"{tally.masks:,}",
            f"{sum(tally.dropped.values()):,}",
            _reasons(tally.dropped, tally.cut_off),
        )
        for tally in tallies[:_MAX_ROWS]
    ]
    more = len(tallies) - len(rows)
    rest = [f"... and {more:,} more; synthgen status --json has all"] if more > 0 else []
    return table((kind, "samples", "masks", "dropped", "reasons"), rows, right=(1, 2, 3), whole=whole) + rest
