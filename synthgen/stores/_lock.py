"""Locks between the processes and threads of one machine, which the kernel frees when a process is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

fcntl: Any = import_module("fcntl") if os.name == "posix" else None

__all__ = ["Lock", "locked", "note_of"]


class Lock:
    """A lock held by this thread; without a ``descriptor``, on a file system without locks, it excludes nobody."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def note(self, text: bytes) -> None:
        """Write ``text`` into its file, for :func:`note_of`."""
        if self._descriptor is not None:
            os.pwrite(self._descriptor, text, 0)


@contextlib.contextmanager
def locked(file: Path, *, keep: bool = False) -> Iterator[Lock]:
    """Hold the lock on ``file`` during the block; the file is removed afterwards unless ``keep``."""
    lock = _acquire(file)
    try:
        yield Lock(lock)
    finally:
        if lock is not None and fcntl is not None:
            if not keep:
                _remove_if_same(file, lock)
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not free it while a forked process has it open
            os.close(lock)


def note_of(file: Path) -> bytes | None:
    """The note of whoever holds the lock on ``file``; None if nobody does, and the file is removed."""
    if fcntl is None:
        return None
    with contextlib.suppress(OSError), open(file, "rb+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read()
        _remove_if_same(file, lock.fileno())
    return None


def _acquire(file: Path) -> int | None:
    while fcntl is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:  # it belongs to another user, or nothing can be written there
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_same(file, lock):
                os.ftruncate(lock, 0)  # the note of a killed process
                return lock
        except OSError:  # a file system without locks
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its last holder has removed the file
    return None


def _is_same(file: Path, lock: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _remove_if_same(file: Path, lock: int) -> None:
    """Remove the file while its lock is held; whoever waits for it sees that it is gone, and makes another."""
    with contextlib.suppress(OSError):
        if _is_same(file, lock):
            file.unlink()
