"""What happened, as lines of JSON: one file for each worker of a stage."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from synthgen.redact import redact, redacted

__all__ = ["logged_to"]

_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonLines(logging.Handler):
    """Adds a line to a file for each record: time, level, message, host, process, and what was given as ``extra``.

    Each line is one append, so that several processes may share a file. A log that cannot be written is no reason to
    stop work: it is left unwritten.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path
        self._whose = {"host": socket.gethostname(), "pid": os.getpid()}

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write((text + "\n").encode(errors="backslashreplace"))
        except OSError:
            return


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
        logger.setLevel(level)
