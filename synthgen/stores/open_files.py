"""Files that stay open between reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from synthgen.stores import open_binary
from synthgen.stores.cache import touch_copy
from synthgen.stores.remote import RemotePath

__all__ = ["OpenFiles"]

_MAX_OPEN = 64


class OpenFiles:
    """Files by path, open for reading; when there are too many, the one that was opened first is closed.

    The cached copy of a remote file is reopened without a request. After pickling or forking, a process opens the files
    again, because processes that share an open file share its position.
    """

    def __init__(self, copies: Mapping[Path, Path] | None = None) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._copies = dict(copies or {})  # of remote files
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[dict[Path, Path]]]:
        return OpenFiles, (self._copies,)

    def __getitem__(self, path: Path) -> BinaryIO:
        if self._owner != os.getpid():
            self._files, self._owner = {}, os.getpid()
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[path] = self._open(path)
        return file

    def _open(self, path: Path) -> BinaryIO:
        copy = self._copies.get(path)
        if copy is not None and touch_copy(copy):
            with suppress(FileNotFoundError):  # just deleted
                return open(copy, "rb")
        file = open_binary(path)
        if isinstance(path, RemotePath):
            self._copies[path] = Path(file.name)
        return file
