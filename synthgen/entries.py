"""What is noted of an artifact in its ``settings.yaml``: read, checked, written, compared; and what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from synthgen.errors import ConfigError
from synthgen.stores.tar import is_abandoned
from synthgen.untrusted import MOST_BYTES, read_file, read_yaml

__all__ = ["FAILED", "SETTINGS", "as_yaml", "changes", "checked_entry", "laid_over", "made_in", "read_entry"]

SETTINGS = "settings.yaml"  # in an artifact's folder: what it is made with
FAILED = ".failed.json"  # ends the name of what is noted of a unit that failed
_LOG = "metrics.jsonl"  # of a training


def as_yaml(value: Mapping[str, Any]) -> bytes:
    """Plain data as the bytes of a YAML file."""
    plain = json.loads(json.dumps(value))  # no object twice, so that YAML needs no anchors
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)).encode()


def read_entry(path: Path, key: str, kind: type) -> dict[str, Any] | None:
    """The mapping of a YAML file, or None where there is no such file.

    Raises:
        ConfigError: it is not YAML, or does not hold a ``kind`` under ``key``.
    """
    try:
        value = read_yaml(read_file(path).decode(), most=MOST_BYTES)  # names of a million files may stand in it
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (yaml.YAMLError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML ({reason}); restore it or start a new run") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise ConfigError(f"{path} is no run's: it has no {key} of the right kind; restore it or start a new run")
    return value


def checked_entry(entry: Any, path: Path) -> dict[str, Any]:
    """What is noted of an artifact, if it is what :meth:`synthgen.run.Run.note` writes.

    Raises:
        ConfigError: it is not.
    """
    kinds = {"stage": str, "fingerprint": str, "settings": dict, "inputs": dict, "versions": dict}
    given: dict[str, Any] = {"versions": {}} | entry if isinstance(entry, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(given.get(name), kind)]
    if wrong:
        raise ConfigError(f"{path} is no run's: it has no {wrong[0]} of the right kind; restore it or start a new run")
    checked: dict[str, Any] = entry
    return checked


def changes(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Each setting that differs, with what it is and was; of a part only the options that do, by their dotted paths."""
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            if was.get("name") == now.get("name"):
                yield from changes(was, now, f"{within}{key}.")
                continue
            was, now = was.get("name"), now.get("name")  # another part has other options
        yield f"{within}{key} is {_told(now)} and was {_told(was)}"


def _told(value: Any) -> str:
    return "not set" if value is None else repr(value)


def laid_over(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``before`` with those that are ``given`` in their place; of the same part, option by option."""
    settings = dict(before)
    for key, value in given.items():
        was, now = before.get(key), {"name": value} if isinstance(value, str) else value
        if isinstance(was, Mapping) and isinstance(now, Mapping) and now.get("name") in (None, was.get("name")):
            settings[key] = {**was, **now}
        else:
            settings[key] = value
    return settings


def made_in(folder: Path) -> Iterator[Path]:
    """The files in an artifact's folder that are of the artifact, or that somebody is writing: no settings, no logs."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from made_in(path)
        elif path.name.startswith("."):
            if path.name.endswith(".tmp") and f".{SETTINGS}." not in path.name and not is_abandoned(path):
                yield path
        elif path.name not in (SETTINGS, _LOG) and not path.name.endswith(FAILED):
            yield path
