"""Copies of remote files on this machine, within a bound; any number of processes may share them.

``SYNTHGEN_CACHE`` is the folder (``~/.cache/synthgen``) and ``SYNTHGEN_CACHE_BYTES`` how much may lie in it (20 GB;
``500MB`` and the like will do). A copy is named by the URL and by what its store says of the content, so that another
content never meets an old copy. What was used longest ago is dropped first. A copy gets its name when it is whole. One
that is dropped while a process has it open stays readable to that process.

Of the processes of one machine that want the same object, one downloads it and the others wait for its copy: it has the
lock of that copy (see :mod:`synthgen.stores._lock`), and notes there how many bytes will come, so that the bound holds
for what is on its way too. On a file system without locks each process downloads for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.errors import ConfigError, StorageError
from synthgen.stores._lock import Lock, locked, note_of
from synthgen.stores._temporary import is_abandoned, temporary_beside

if TYPE_CHECKING:
    from synthgen.stores.remote import RemotePath

__all__ = ["cache_bytes", "cache_folder", "local_copy", "work_folder"]

_BY_DEFAULT = "20GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ROOM = "room.lock"  # held by whoever counts and drops copies
_POLL = 0.05  # seconds between two looks whether there is room
_DIGITS = 40  # that a copy's name begins with
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
        name = hashlib.sha256(f"{path}\n{mark}\n{size}".encode()).hexdigest()[:_DIGITS]
        copy = cache_folder() / "files" / f"{name}{path.suffix}"
        if mark and touch_copy(copy, size):
            return copy
        with locked(_locks() / f"{copy.name}.lock") as lock:
            if (mark and touch_copy(copy, size)) or _fetch(path, copy, mark, size, lock):
                return copy
    raise StorageError(f"{path} changes while it is read; run the same command again")


def touch_copy(copy: Path, size: int | None = None) -> bool:
    """Whether a copy is there, of ``size`` bytes if given; it is then the one that was used last."""
    try:
        if size is not None and copy.stat().st_size != size:
            return False
        os.utime(copy)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # of another user, who shares the cache
        return os.access(copy, os.R_OK)
    return True


def _fetch(path: RemotePath, copy: Path, mark: str, size: int, lock: Lock) -> bool:
    """Make a copy; says whether it is whole, and of the content that was asked for."""
    temporary = temporary_beside(copy)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        _await_room(size, lock)
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


def _await_room(size: int, lock: Lock) -> None:
    """Make room for ``size`` bytes, and note in the lock of their copy that they are on their way.

    Where other downloads leave no room, wait until they have ended. One alone may be larger than the bound.
    """
    while True:
        with locked(_locks() / _ROOM, keep=True):
            if make_room(size):
                lock.note(b"%d" % size)
                return
        time.sleep(_POLL)


def make_room(size: int) -> bool:
    """Drop what was used longest ago, until there is room for ``size`` bytes.

    Returns:
        False where there is none, because too many bytes are on their way for others.
    """
    copies, arriving, unlocked = list[tuple[int, int, Path]](), _arriving(), 0
    for file in (cache_folder() / "files").iterdir():
        with contextlib.suppress(OSError):
            if not file.name.endswith(".tmp"):
                status = file.stat()
                copies.append((status.st_mtime_ns, status.st_size, file))
                arriving.pop(file.name[:_DIGITS], None)  # it has come
            elif is_abandoned(file):
                file.unlink(missing_ok=True)
            elif not arriving.get(file.name[1 : 1 + _DIGITS]):
                unlocked += file.stat().st_size
    coming, most = sum(arriving.values()), cache_bytes() - size
    if coming and coming + unlocked > most:
        return False
    total = coming + unlocked + sum(length for _, length, _ in copies)
    for _, length, file in sorted(copies):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            total -= length
    return True


def _arriving() -> dict[str, int]:
    """The digits of each copy that is being downloaded, with the bytes that it will have."""
    found = {}
    for file in _locks().glob("*.lock"):
        if file.name != _ROOM and (note := note_of(file)) is not None:
            found[file.name[:_DIGITS]] = int(note) if note.isdigit() else 0
    return found


def _locks() -> Path:
    return cache_folder() / "locks"


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
