"""The types of JSON values, as tables such as Arrow's need them: the same in every row."""

from __future__ import annotations

from typing import Any

__all__ = ["common_type", "has_null", "is_mixed", "type_of"]

_MIXED = "several types"


def type_of(value: Any) -> Any:
    """The type of a JSON value: a name, a list with the type of its items (None: unknown), or types by key."""
    if isinstance(value, dict):
        return {key: type_of(item) for key, item in value.items()}
    if isinstance(value, list):
        items = None
        numbers = {type(item) for item in value} == {int, float}
        for item in value:
            items, conflict = common_type(items, "float" if numbers else type_of(item))
            if conflict:
                return [_MIXED]
        return [items]
    return None if value is None else type(value).__name__


def common_type(one: Any, other: Any, path: str = "") -> tuple[Any, str]:
    """The common type of two values, and the path of the first conflict, if there is one."""
    if one is None or other is None:
        return (other if one is None else one), ""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return one, path + min(one.keys() ^ other.keys())
        merged = {}
        for key in one:
            merged[key], conflict = common_type(one[key], other[key], f"{path}{key}.")
            if conflict:
                return one, conflict
        return merged, ""
    if isinstance(one, list) and isinstance(other, list):
        items, conflict = common_type(one[0], other[0], path)
        return [items], conflict
    return one, "" if one == other else path.rstrip(".") or "an item"


def is_mixed(shape: Any) -> bool:
    """Whether a type holds a list with items of several types."""
    if isinstance(shape, dict):
        return any(map(is_mixed, shape.values()))
    return isinstance(shape, list) and (shape[0] == _MIXED or is_mixed(shape[0]))


def has_null(value: Any) -> bool:
    """Whether a value is null or holds one."""
    if isinstance(value, dict):
        return any(has_null(item) for item in value.values())
    return value is None or (isinstance(value, list) and any(has_null(item) for item in value))
