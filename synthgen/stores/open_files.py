"""Files that stay open between two readings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from synthgen.stores import open_here

__all__ = ["OpenFiles"]

_MOST = 64  # files that are open at once


class OpenFiles:
    """Files of this process by their paths, open for reading; where there are many the first is closed for the next.

    A pickled or forked process opens its own, because what shares a file shares the place in it.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def __getitem__(self, path: Path) -> BinaryIO:
        if self._owner != os.getpid():
            self._files, self._owner = {}, os.getpid()
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _MOST:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[path] = open_here(path)
        return file
