"""A plan as plain text for the console."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from synthgen.plan import Estimate, Plan, StagePlan
from synthgen.text import counted, duration, size, table, wrap

__all__ = ["render"]


def render(found: Plan, *, whole: bool = False) -> str:
    """A plan as plain text of at most 100 columns; with ``whole``, for files and pipes, rows are not truncated."""
    return "\n\n".join("\n".join(block) for block in _blocks(found, whole) if block)


def _blocks(found: Plan, whole: bool) -> Iterator[list[str]]:
    prompts = f"{counted(found.prompts, 'prompts')}, " if found.prompts else ""
    yield wrap(f"{found.file}: {prompts}{counted(found.images, 'images')} for {found.run} (seed {found.seed})")
    yield table(
        ("stage", "units", "units left", "images", "images left", ""),
        [(stage.stage, *_numbers(stage), stage.unknown or stage.basis) for stage in found.stages],
        right=(1, 2, 3, 4),
        whole=whole,
    )
    measured = [stage for stage in found.stages if stage.seconds]
    if measured:
        rows = [_row(stage) for stage in measured]
        rows.append(("total", *_range(found.seconds, duration), "", _value(found.at_best_seconds, duration), "", ""))
        head = ("remaining", "1 worker", "range", "N", "N workers (lower bound)", "memory", "sample")
        yield table(head, rows, right=(1, 2, 3, 4, 5), whole=whole)
        disk = [(name, made) for stage in measured for name, made in stage.bytes.items()]
        rows = [(name, *_range(made, _size), made.basis) for name, made in disk]
        rows.append(
            ("total", *_range(found.bytes, _size), "" if found.disk_free is None else f"{size(found.disk_free)} free")
        )
        yield table(("finished run", "bytes", "range", ""), rows, right=(1, 2), whole=whole)
        yield list(_remarks(found, measured))
    yield [line for note in found.notes for line in wrap(f"note: {note}")]


def _numbers(stage: StagePlan) -> tuple[str, ...]:
    numbers = (stage.units, stage.units_left, stage.images, stage.images_left)
    return tuple(f"{number:,}" if stage.units else "" for number in numbers)


def _row(stage: StagePlan) -> tuple[str, ...]:
    return (
        stage.stage,
        *_range(stage.seconds, duration),
        f"{stage.workers:,}" if stage.workers else "",
        _value(stage.at_best_seconds, duration),
        _value(stage.memory, _size),
        re.sub(" images?", "", stage.sample),
    )


def _remarks(found: Plan, measured: Sequence[StagePlan]) -> Iterator[str]:
    """The basis of the figures, and their limits."""
    yield from wrap(
        f"Extrapolated from a sample that was generated on {found.device} and deleted. Ranges span its fastest and "
        "slowest rounds; variation later in the run or on other machines is not included."
    )
    starts = ", ".join(f"{stage.stage} {duration(stage.start_seconds)}" for stage in measured if stage.start_seconds)
    yield from wrap(
        f"The lower bound is for N workers of the engine {found.engine} that do not slow each other down. All times "
        f"include the start of a worker ({starts})."
    )
    stages_of: dict[str, list[str]] = {}
    for stage in measured:
        if stage.seconds and ";" in stage.seconds.basis:
            yield from wrap(f"{stage.stage}: {stage.seconds.basis}.")
        if stage.memory:
            stages_of.setdefault(stage.memory.basis, []).append(stage.stage)
    for basis, stages in stages_of.items():
        yield from wrap(f"Memory per worker of {', '.join(stages)}: {basis}.")


def _range(estimate: Estimate | None, shown: Callable[[float], str]) -> tuple[str, str]:
    if estimate is None or estimate.low is None or estimate.high is None:
        return _value(estimate, shown), ""
    return shown(estimate.value), f"{shown(estimate.low)} to {shown(estimate.high)}"


def _value(estimate: Estimate | None, shown: Callable[[float], str]) -> str:
    return "" if estimate is None else shown(estimate.value)


def _size(count: float) -> str:
    return size(round(count))
