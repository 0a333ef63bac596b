"""Tolerant reading of JSON: a damaged file must not prevent the status of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from synthgen.stores import read_many
from synthgen.untrusted import MAX_BYTES, MAX_JSON, read_file, read_json

__all__ = ["finite", "is_number", "read_object", "read_objects"]


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file. An unreadable one is listed in ``problems`` and counts as empty."""
    return _object(path, lambda: read_file(path), problems)


def read_objects(folder: Path, names: Sequence[str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for several files of a folder, read in batches and held one at a time; missing ones come last."""
    left = dict.fromkeys(names)
    for name, data in read_many(folder, names, MAX_JSON):
        del left[name]
        yield name, _object(folder / name, partial(bytes, data), problems)
    for name in left:
        yield name, _object(folder / name, _gone, problems)


def _gone() -> bytes:
    raise ValueError("it is missing or may not be read")


def _object(path: Path, content: Callable[[], bytes], problems: list[str]) -> dict[str, Any]:
    try:
        value = read_json(content(), MAX_BYTES, finite=False)
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error}); delete it and run its stage again")
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether it is a number that fits a float; NaN and infinity count."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def finite(value: Any) -> Any:
    """Plain data with None for NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
