"""Local copies of remote files, within a size limit, shared by any number of processes.

``SYNTHGEN_CACHE`` is the folder (``~/.cache/synthgen``) and ``SYNTHGEN_CACHE_BYTES`` the maximum size (20 GB; in a form
such as ``500MB``). The name of a copy contains a hash of the URL and of the object's version, so that a changed object
gets a new copy. A copy gets its name when it is complete. The least recently used copies are deleted first; a process
that has one open can still read it.

If several processes of one machine need the same object, one downloads it and the others wait. It holds the lock of
that copy (see :mod:`synthgen.stores._lock`) and notes the size there, so that the limit includes downloads in progress.
On a file system without locks each process downloads for itself.
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

__all__ = ["cache_bytes", "cache_folder", "local_copy", "touch_copy", "work_folder"]

_DEFAULT_BYTES = "20GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ROOM = "room.lock"  # held while copies are counted and deleted
_POLL = 0.05  # seconds between two attempts to make room
_DIGITS = 40  # of the hash in the name of a copy
_ATTEMPTS = 3  # to copy an object that others are changing


def cache_folder() -> Path:
    """The folder of the copies."""
    given = os.environ.get("SYNTHGEN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "synthgen"


def cache_bytes() -> int:
    """The maximum size of all copies.

    Raises:
        ConfigError: the setting is not a size.
    """
    given = os.environ.get("SYNTHGEN_CACHE_BYTES") or _DEFAULT_BYTES
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", given.strip().upper())
    if not found:
        raise ConfigError(f"SYNTHGEN_CACHE_BYTES must be a size such as 500MB or 20GB, not {given!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def local_copy(path: RemotePath) -> Path:
    """The cached copy of the present content of a remote file, downloaded if necessary.

    It may be deleted at any time after this returns, so open it at once.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the object cannot be read, or the copy cannot be written.
    """
    for _ in range(_ATTEMPTS):
        version, size = path.version()
        name = hashlib.sha256(f"{path}\n{version}\n{size}".encode()).hexdigest()[:_DIGITS]
        copy = cache_folder() / "files" / f"{name}{path.suffix}"
        if version and touch_copy(copy, size):
            return copy
        with locked(_locks() / f"{copy.name}.lock") as lock:
            if (version and touch_copy(copy, size)) or _download(path, copy, version, size, lock):
                return copy
    raise StorageError(f"{path} changes while it is read; run the same command again")


def touch_copy(copy: Path, size: int | None = None) -> bool:
    """Whether there is such a copy, of ``size`` bytes if given; marks it as the most recently used."""
    try:
        if size is not None and copy.stat().st_size != size:
            return False
        os.utime(copy)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it belongs to another user of the cache
        return os.access(copy, os.R_OK)
    return True


def _download(path: RemotePath, copy: Path, version: str, size: int, lock: Lock) -> bool:
    """Download a copy; returns whether it is complete and still of this version."""
    temporary = temporary_beside(copy)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        _reserve(size, lock)
        path.download(temporary)
        if temporary.stat().st_size != size or path.version() != (version, size):
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


def _reserve(size: int, lock: Lock) -> None:
    """Make room for a download of ``size`` bytes and note the size in the lock of its copy.

    Waits while other downloads leave too little room. A single download may be larger than the maximum.
    """
    while True:
        with locked(_locks() / _ROOM, keep=True):
            if _make_room(size):
                lock.note(b"%d" % size)
                return
        time.sleep(_POLL)


def _make_room(size: int) -> bool:
    """Delete the least recently used copies until there is room for ``size`` bytes.

    Returns:
        False if downloads in progress leave too little room.
    """
    copies, downloads, unlocked = list[tuple[int, int, Path]](), _downloads(), 0
    for file in (cache_folder() / "files").iterdir():
        with contextlib.suppress(OSError):
            if not file.name.endswith(".tmp"):
                status = file.stat()
                copies.append((status.st_mtime_ns, status.st_size, file))
                downloads.pop(file.name[:_DIGITS], None)  # it is complete
            elif is_abandoned(file):
                file.unlink(missing_ok=True)
            elif not downloads.get(file.name[1 : 1 + _DIGITS]):
                unlocked += file.stat().st_size
    in_progress, most = sum(downloads.values()), cache_bytes() - size
    if in_progress and in_progress + unlocked > most:
        return False
    total = in_progress + unlocked + sum(length for _, length, _ in copies)
    for _, length, file in sorted(copies):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            total -= length
    return True


def _downloads() -> dict[str, int]:
    """The hash of each copy that is being downloaded, and its final size."""
    found = {}
    for file in _locks().glob("*.lock"):
        if file.name != _ROOM and (note := note_of(file)) is not None:
            found[file.name[:_DIGITS]] = int(note) if note.isdigit() else 0
    return found


def _locks() -> Path:
    return cache_folder() / "locks"


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """An empty local folder that is removed when the block ends."""
    folder = temporary_beside(cache_folder() / "work" / "folder")
    try:
        folder.mkdir(parents=True)
        for other in folder.parent.iterdir():
            if is_abandoned(other):  # left by a killed process
                shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder.parent}: {error.strerror or error}; set SYNTHGEN_CACHE") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
