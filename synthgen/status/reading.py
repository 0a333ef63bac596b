"""Tolerant reading of JSON: a damaged file must not prevent the status of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from synthgen.stores import read_many
from synthgen.untrusted import MAX_BYTES, MAX_JSON, read_file, read_json

__all__ = ["finite", "is_number", "read_object", "read_objects"]


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file. An unreadable one is listed in ``problems`` and counts as empty."""
    try:
        return _parse(read_file(path))
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error}); delete it and run its stage again")
        return {}


def read_objects(folder: Path, names: Sequence[str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for several files of a folder, read in batches; only one is in memory at a time."""
    unread = dict.fromkeys(names)
    for name, data in read_many(folder, names, MAX_JSON):
        try:
            value = _parse(data)
        except ValueError:
            continue
        del unread[name]
        yield name, value
    for name in unread:  # to report the error
        yield name, read_object(folder / name, problems)


def _parse(data: bytes) -> dict[str, Any]:
    value = read_json(data, MAX_BYTES, finite=False)
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value is a number that fits a float; NaN and infinity count."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def finite(value: Any) -> Any:
    """Plain data with None for NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
