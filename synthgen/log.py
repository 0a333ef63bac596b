"""What happened, as lines of JSON: one file for each worker of a stage."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from synthgen.errors import SynthgenError
from synthgen.redact import redact, redacted
from synthgen.stores import AppendFile
from synthgen.stores.remote import RemotePath

__all__ = ["logged_to"]

_SHARE = 0.05  # of the time, at most, that goes into sending what a store cannot append
_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonLines(logging.Handler):
    """Adds a line to a file for each record: time, level, message, host, process, and what was given as ``extra``.

    Each line is one append, so that several processes may share a file. In a store, where nothing can be appended, each
    process has a file of its own, which is sent now and then, and at the end. A log that cannot be written is no reason
    to stop work: it is left unwritten.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._whose = {"host": socket.gethostname(), "pid": os.getpid()}
        if isinstance(path, RemotePath):
            path = path.with_stem("-".join([path.stem, *map(str, self._whose.values())]))
        self._file = AppendFile(path)
        self._next = 0.0  # when lines may be sent again
        self._busy = False

    def emit(self, record: logging.LogRecord) -> None:
        """Add one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD},
            **self._whose,
        }
        text = json.dumps(redacted(line), ensure_ascii=False, default=lambda value: redact(str(value)))
        if self._busy:  # what the store's client logs of the request that is made for a log
            return
        self._busy = True
        try:
            self._file.add(text)
            if time.monotonic() >= self._next:
                self.flush()
        except (OSError, SynthgenError):
            return
        finally:
            self._busy = False

    def flush(self) -> None:
        """Send what a store has not got yet."""
        started = time.monotonic()
        with suppress(SynthgenError):
            self._file.flush()
        ended = time.monotonic()
        self._next = ended + (ended - started) / _SHARE


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """While the block lasts, what synthgen logs from INFO up goes to the end of ``path`` too."""
    logger = logging.getLogger("synthgen")
    handler, level = JsonLines(path), logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.flush()
        logger.setLevel(level)
