"""The ``settings.yaml`` of an artifact: read, validated and compared; and the files beside it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from synthgen.errors import ConfigError, StaleArtifact, StorageError
from synthgen.redact import HIDDEN
from synthgen.stores.tar import is_abandoned
from synthgen.untrusted import MAX_BYTES, MAX_SETTINGS, read_file, read_yaml

__all__ = [
    "FAILED",
    "SETTINGS",
    "changes",
    "describe_changes",
    "digest",
    "dump_yaml",
    "exists",
    "failure_files",
    "merge_settings",
    "output_files",
    "read_entry",
    "read_fingerprint",
    "stale_artifact",
    "validate_entry",
    "versions",
]

SETTINGS = "settings.yaml"  # in an artifact's folder: what it is made with
FAILED = ".failed.json"  # the end of the name of a file that says why a unit failed
_FINGERPRINT = re.compile(rb"^fingerprint: ([0-9a-f]{64})$", re.MULTILINE)  # as ``dump_yaml`` writes it
_LOG = "metrics.jsonl"  # of a training
_PACKAGES = ("synthgen", "torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "pillow", "webdataset")


def exists(path: Path) -> bool:
    """Whether there is a file or folder at ``path``.

    Raises:
        StorageError: that is unknown: permission is denied, or the name is too long.
    """
    try:
        return path.exists()
    except OSError as error:
        raise StorageError(
            f"{path} cannot be looked at ({error.strerror or error}); choose another --run folder"
        ) from None


def digest(value: Any) -> str:
    """The sha256 of plain data, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results may depend on. Recorded, never hashed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def dump_yaml(value: Mapping[str, Any]) -> bytes:
    """Plain data as the bytes of a YAML file."""
    plain = json.loads(json.dumps(value))  # no object occurs twice, so that YAML needs no anchors
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)).encode()


def read_entry(path: Path, key: str, kind: type) -> dict[str, Any] | None:
    """The mapping in a YAML file, or None if there is no such file.

    Raises:
        ConfigError: it is not YAML, or has no ``kind`` under ``key``.
    """
    try:
        value = read_yaml(read_file(path).decode(), most=MAX_BYTES, max_values=MAX_SETTINGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); restore it or start a new run") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML ({reason}); restore it or start a new run") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise ConfigError(f"{path} has no {key} of the right type; restore it or start a new run")
    return value


def read_fingerprint(path: Path) -> str | None:
    """The fingerprint in a ``settings.yaml``, or None if there is none. Long files are not parsed.

    Raises:
        ConfigError, StorageError: see :func:`read_entry`; or the store does not answer.
    """
    with suppress(OSError, ValueError):
        if found := _FINGERPRINT.search(read_file(path)):
            return found[1].decode()
    entry = read_entry(path, "fingerprint", str)
    return None if entry is None else str(entry["fingerprint"])


def validate_entry(entry: Any, path: Path) -> dict[str, Any]:
    """``entry``, if it has the form that :meth:`synthgen.run.Run.claim` writes.

    Raises:
        ConfigError: it has not.
    """
    kinds = {"stage": str, "fingerprint": str, "settings": dict, "inputs": dict, "versions": dict}
    given: dict[str, Any] = {"versions": {}} | entry if isinstance(entry, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(given.get(name), kind)]
    if wrong:
        raise ConfigError(f"{path} has no {wrong[0]} of the right type; restore it or start a new run")
    checked: dict[str, Any] = entry
    return checked


def changes(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Each setting that differs, with its new and old value; of a part only the options that differ, by dotted path."""
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            if was.get("name") == now.get("name"):
                yield from changes(was, now, f"{within}{key}.")
                continue
            was, now = was.get("name"), now.get("name")  # another part has other options
        yield f"{within}{key} is {_value_text(now)} and was {_value_text(was)}"


def _value_text(value: Any) -> str:
    return "not set" if value is None else f"not recorded ({HIDDEN})" if value == HIDDEN else repr(value)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two entries of an artifact, and the first part of the advice."""
    if before["stage"] != now["stage"]:
        return f"by {before['stage']}, not {now['stage']}; "
    found = [
        *changes({"seed": before.get("seed")}, {"seed": now["seed"]}),
        *changes(before["settings"], now["settings"]),
    ]
    inputs = [
        key for key in {**before["inputs"], **now["inputs"]} if before["inputs"].get(key) != now["inputs"].get(key)
    ]
    of_units = [key for key in inputs if key.startswith("units of ")]  # more were made, or some were made again
    found += [
        f"the {key} have changed since" if key in of_units else f"its input {key!r} has changed" for key in inputs
    ]
    if not found:
        return "by another version of synthgen; "
    return f"{'; '.join(found)}; {'' if len(found) == len(of_units) else 'use the same settings, '}"


def stale_artifact(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> StaleArtifact:
    """The error for an artifact that was made with other settings or inputs than those ``now``; names them."""
    hashed = {key: value for key, value in before["settings"].items() if key in now["settings"]}
    found = describe_changes({**before, "settings": hashed}, now)
    elsewhere = "another --label" if folder.parent.name == "pretrain" else "another --run folder"
    return StaleArtifact(
        f"{folder} was made differently: {found}choose {elsewhere}, or delete {folder} to make it anew"
    )


def merge_settings(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``before``, replaced by those ``given``; options of the same part are merged.

    Raises:
        ConfigError: an earlier setting is a secret, which is not recorded, and it is not given again.
    """
    settings = dict(before)
    for key, value in given.items():
        was, now = before.get(key), {"name": value} if isinstance(value, str) else value
        if isinstance(was, Mapping) and isinstance(now, Mapping) and now.get("name") in (None, was.get("name")):
            settings[key] = {**was, **now}
        else:
            settings[key] = value
    if secret := next(_hidden(settings), ""):
        raise ConfigError(f"{secret} was not recorded ({HIDDEN}); give it again: --set {secret}=VALUE")
    return settings


def _hidden(value: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of the settings that are secrets, or have a password in their URL: they are not recorded."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _hidden(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _hidden(item, path)
    elif value == HIDDEN or (isinstance(value, str) and f"/{HIDDEN}@" in value):
        yield path


def failure_files(folder: Path) -> list[Path]:
    """The files that say why units of an artifact failed."""
    return sorted(folder.glob(f"*{FAILED}"))


def output_files(folder: Path) -> Iterator[Path]:
    """The files of an artifact, and those that a command is writing, without settings, logs and failures."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from output_files(path)
        elif path.name.startswith("."):
            if path.name.endswith(".tmp") and f".{SETTINGS}." not in path.name and not is_abandoned(path):
                yield path
        elif path.name not in (SETTINGS, _LOG) and not path.name.endswith(FAILED):
            yield path
