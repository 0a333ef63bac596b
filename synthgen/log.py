"""Log as lines of JSON, in one file for each worker of a stage."""

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

_UPLOAD_SHARE = 0.05  # largest share of the time to spend on uploads to a store, which cannot append
_STANDARD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonLines(logging.Handler):
    """Appends a line for each record: time, level, message, host, process id, and the fields passed as ``extra``.

    Each line is one append, so several processes may share a file. In a store, which cannot append, each process has a
    file of its own, uploaded from time to time and at the end. Errors while writing are ignored, so that logging cannot
    stop the work.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._process = {"host": socket.gethostname(), "pid": os.getpid()}
        if isinstance(path, RemotePath):
            path = path.with_stem("-".join([path.stem, *map(str, self._process.values())]))
        self._file = AppendFile(path)
        self._next = 0.0  # time of the next upload
        self._writing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS},
            **self._process,
        }
        text = json.dumps(redacted(line), ensure_ascii=False, default=lambda value: redact(str(value)))
        if self._writing:  # the store's client logs the upload of this log
            return
        self._writing = True
        try:
            self._file.add(text)
            if time.monotonic() >= self._next:
                self.flush()
        except (OSError, SynthgenError):
            return
        finally:
            self._writing = False

    def flush(self) -> None:
        """Upload lines that are not in a store yet."""
        started = time.monotonic()
        with suppress(SynthgenError):
            self._file.flush()
        ended = time.monotonic()
        self._next = ended + (ended - started) / _UPLOAD_SHARE


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Inside the block also append synthgen's log records, from INFO up, to ``path``."""
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
