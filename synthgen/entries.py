"""The ``settings.yaml`` of an artifact: read, validated, written and compared; and the files beside it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from synthgen.errors import ConfigError, StaleArtifact, StorageError
from synthgen.redact import HIDDEN, redacted
from synthgen.stores.tar import is_abandoned
from synthgen.untrusted import MAX_BYTES, read_file, read_yaml

__all__ = [
    "FAILED",
    "SETTINGS",
    "as_yaml",
    "changes",
    "describe_changes",
    "digest",
    "exists",
    "failure_notes",
    "made_differently",
    "made_in",
    "merge_settings",
    "read_entry",
    "read_fingerprint",
    "validate_entry",
    "versions",
]

SETTINGS = "settings.yaml"  # in an artifact's folder: what it is made with
FAILED = ".failed.json"  # the end of the name of a file that says why a unit failed
_FINGERPRINT = re.compile(rb"^fingerprint: ([0-9a-f]{64})$", re.MULTILINE)  # as ``as_yaml`` writes it
_LOG = "metrics.jsonl"  # of a training
_PACKAGES = ("synthgen", "torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "pillow", "webdataset")


def exists(path: Path) -> bool:
    """Whether something is at a place.

    Raises:
        StorageError: nobody can tell, because it may not be looked at or cannot have this name.
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
        value = read_yaml(read_file(path).decode(), most=MAX_BYTES)  # names of a million files may stand in it
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); restore it or start a new run") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML ({reason}); restore it or start a new run") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise ConfigError(f"{path} is no run's: it has no {key} of the right kind; restore it or start a new run")
    return value


def read_fingerprint(path: Path) -> str | None:
    """The fingerprint in a ``settings.yaml``, or None where there is none; of a long file nothing else is parsed.

    Raises:
        ConfigError, StorageError: see :func:`read_entry`; or the store does not answer.
    """
    with suppress(OSError, ValueError):
        if found := _FINGERPRINT.search(read_file(path)):
            return found[1].decode()
    entry = read_entry(path, "fingerprint", str)
    return None if entry is None else str(entry["fingerprint"])


def validate_entry(entry: Any, path: Path) -> dict[str, Any]:
    """The entry of an artifact, if it is what :meth:`synthgen.run.Run.record_settings` writes.

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
    return "not set" if value is None else f"not written down ({HIDDEN})" if value == HIDDEN else repr(value)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How an artifact was made differently: by its ``settings`` and ``inputs`` before and now; and what first to do.

    Before synthgen told a tokenizer from a token, both were hidden: whether it is the same nobody can tell any more.
    """
    told = [*changes(before["settings"], now["settings"])]
    same = "" if not told and _others_only(before["inputs"], now["inputs"]) else "use the same settings, "
    unknown = [path for path, is_secret in _hidden(before["settings"]) if not is_secret]
    for key in {**before["inputs"], **now["inputs"]}:
        was = before["inputs"].get(key)
        if was == HIDDEN and key not in unknown:
            unknown.append(key)
            told.append(f"its input {key!r} was not written down ({HIDDEN})")
        elif was not in (HIDDEN, now["inputs"].get(key)):
            is_of_units = key.startswith("units of ")
            told.append(f"the {key} have changed since" if is_of_units else f"its input {key!r} has changed")
    return f"{'; '.join(told) or 'by another stage'}; {'' if unknown else same}"


def _others_only(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether inputs differ, and all that do are units of the run: more were made, or some were made again."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return bool(changed) and all(key.startswith("units of ") for key in changed)


def _hidden(value: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    """The settings that were not written down, by their dotted paths; and whether they are secrets still."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _hidden(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _hidden(item, path)
    elif value == HIDDEN:
        name = path.rpartition(".")[2]
        yield path, redacted({name: "x"}) == {name: HIDDEN}
    elif isinstance(value, str) and f"/{HIDDEN}@" in value:
        yield path, True


def made_differently(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], hashed: Collection[str] = ()
) -> StaleArtifact:
    """The error that an artifact's folder has other settings or inputs than those ``now``; names them.

    Settings ``before`` are compared where they are among those now, or among the ``hashed`` ones, some of which may be
    left out now.
    """
    kept = {key: value for key, value in before["settings"].items() if key in now["settings"] or key in hashed}
    told = describe_changes({**before, "settings": kept}, now)
    elsewhere = "another --label" if folder.parent.name == "pretrain" else "another --run folder"
    return StaleArtifact(f"{folder} was made differently: {told}choose {elsewhere}, or delete {folder} to make it anew")


def merge_settings(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``before`` with those that are ``given`` in their place; of the same part, option by option.

    Raises:
        ConfigError: one of those before was not written down, and is not given.
    """
    settings = dict(before)
    for key, value in given.items():
        was, now = before.get(key), {"name": value} if isinstance(value, str) else value
        if isinstance(was, Mapping) and isinstance(now, Mapping) and now.get("name") in (None, was.get("name")):
            settings[key] = {**was, **now}
        else:
            settings[key] = value
    for path, is_secret in _hidden(settings):
        again = f"give it again: --set {path}=VALUE"
        elsewhere = "an older synthgen took it for a secret; choose another --label or --run folder, or begin anew"
        raise ConfigError(f"{path} was not written down ({HIDDEN}); {again if is_secret else elsewhere}")
    return settings


def failure_notes(folder: Path) -> list[Path]:
    """The files that say why units of an artifact failed."""
    return sorted(folder.glob(f"*{FAILED}"))


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
