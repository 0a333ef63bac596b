"""Files that stay open between reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from synthgen.stores import open_here
from synthgen.stores.cache import touch_copy
from synthgen.stores.remote import RemotePath

__all__ = ["OpenFiles"]

_MOST = 64  # files that are open at once


class OpenFiles:
    """Files of this process by their paths, open for reading; where there are many the first is closed for the next.

    The copy of a file in a store is opened again without a request, for as long as it stays in the cache. A pickled or
    forked process opens its own files, because what shares a file shares the place in it; it finds the same copies.
    """

    def __init__(self, copies: Mapping[Path, Path] | None = None) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._copies = dict(copies or {})  # of files in a store, by their paths
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[dict[Path, Path]]]:
        return OpenFiles, (self._copies,)

    def __getitem__(self, path: Path) -> BinaryIO:
        if self._owner != os.getpid():
            self._files, self._owner = {}, os.getpid()
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _MOST:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[path] = self._open(path)
        return file

    def _open(self, path: Path) -> BinaryIO:
        copy = self._copies.get(path)
        if copy is not None and touch_copy(copy):
            with suppress(FileNotFoundError):  # dropped just now
                return open(copy, "rb")
        file = open_here(path)
        if isinstance(path, RemotePath):
            self._copies[path] = Path(file.name)
        return file
