"""Copies of remote files on this machine, within a bound; any number of processes may share them.

``SYNTHGEN_CACHE`` is the folder (``~/.cache/synthgen``) and ``SYNTHGEN_CACHE_BYTES`` how much may lie in it (20 GB;
``500MB`` and the like will do). A copy is named by the URL and by what its store says of the content, so that another
content never meets an old copy. What was used longest ago is dropped first. Nothing is locked: a copy gets its name
when it is whole, and one that is dropped while a process has it open stays readable to that process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.errors import ConfigError, StorageError
from synthgen.stores._temporary import is_abandoned, temporary_beside

if TYPE_CHECKING:
    from synthgen.stores.remote import RemotePath

__all__ = ["cache_bytes", "cache_folder", "local_copy", "work_folder"]

_BY_DEFAULT = "20GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TRIES = 3  # copies of an object that is changed by others meanwhile


def cache_folder() -> Path:
    """Where copies lie."""
    given = os.environ.get("SYNTHGEN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "synthgen"


def cache_bytes() -> int:
    """How many bytes of them there may be.

    Raises:
        ConfigError: the setting is no size.
    """
    given = os.environ.get("SYNTHGEN_CACHE_BYTES") or _BY_DEFAULT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", given.strip().upper())
    if not found:
        raise ConfigError(f"SYNTHGEN_CACHE_BYTES must be a size such as 500MB or 20GB, not {given!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def local_copy(path: RemotePath) -> Path:
    """The copy of a remote file in the cache; made where there is none of its present content.

    It is there when this returns, and may be dropped at any time: open it at once.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it cannot be read, or the copy not be written.
    """
    for _ in range(_TRIES):
        mark, size = path.version()
        name = hashlib.sha256(f"{path}\n{mark}\n{size}".encode()).hexdigest()[:40]
        copy = cache_folder() / "files" / f"{name}{path.suffix}"
        try:
            if mark and copy.stat().st_size == size:
                os.utime(copy)  # used now
                return copy
        except (FileNotFoundError, NotADirectoryError):
            pass
        if _fetch(path, copy, mark, size):
            return copy
    raise StorageError(f"{path} changes while it is read; run the same command again")


def _fetch(path: RemotePath, copy: Path, mark: str, size: int) -> bool:
    """Make a copy; says whether it is whole, and of the content that was asked for."""
    temporary = temporary_beside(copy)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        make_room(size)
        path.download(temporary)
        if temporary.stat().st_size != size or path.version() != (mark, size):
            return False
        temporary.replace(copy)
        return True
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write the copy of {path} in {cache_folder()}: {error.strerror or error}; free some space, or set "
            "SYNTHGEN_CACHE and SYNTHGEN_CACHE_BYTES"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_room(size: int) -> None:
    """Drop what was used longest ago, until there is room for ``size`` bytes (or nothing is left to drop)."""
    files = []
    for file in (cache_folder() / "files").iterdir():
        with contextlib.suppress(OSError):
            if file.name.endswith(".tmp") and is_abandoned(file):
                file.unlink(missing_ok=True)
                continue
            status = file.stat()
            files.append((status.st_mtime_ns, status.st_size, file))
    total, most = sum(length for _, length, _ in files), cache_bytes() - size
    for _, length, file in sorted(files):
        if total <= most:
            return
        if not file.name.endswith(".tmp"):  # it is being made
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
                total -= length


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """An empty folder of this machine that is gone when the block ends."""
    folder = temporary_beside(cache_folder() / "work" / "folder")
    try:
        folder.mkdir(parents=True)
        for other in folder.parent.iterdir():
            if is_abandoned(other):  # of a process that was killed
                shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder.parent}: {error.strerror or error}; set SYNTHGEN_CACHE") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
