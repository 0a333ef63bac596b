"""Names of temporary files, and which of these files are left over from killed processes."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

__all__ = ["is_abandoned", "temporary_beside"]

_DAY = 86400.0  # seconds


def temporary_beside(path: Path) -> Path:
    """``.<name>.<host>.<pid>.<random>.tmp`` beside ``path``: a name that no other process on any machine uses."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def is_abandoned(temporary: Path) -> bool:
    """Whether no process writes a temporary file any more: its own has ended, or it has not changed for a day."""
    try:
        prefix, pid, _, _ = temporary.name.rsplit(".", 3)
        process = int(pid)
    except ValueError:  # not one of ours
        return True
    if os.name == "posix" and prefix.endswith(f".{_host()}"):
        try:
            os.kill(process, 0)  # sends nothing
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's, and alive
            return False
    try:
        return time.time() - temporary.stat().st_mtime > _DAY
    except FileNotFoundError:
        return False


def _host() -> str:
    """Where process numbers mean the same: this machine, or a container on it, which may share the machine's name."""
    try:
        return f"{socket.gethostname()}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()
