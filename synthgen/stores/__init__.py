"""Where artifacts lie: tars on a local file system, or in a store that fsspec reaches (``s3://bucket/run``).

A place is a :class:`pathlib.Path`, or a :class:`~synthgen.stores.remote.RemotePath`, which has the shape of one. What
can be done at both is here and in :mod:`synthgen.stores.tar`; fsspec is imported only for the second kind.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from synthgen.errors import StorageError, SynthgenError
from synthgen.stores._failures import unreadable
from synthgen.stores.cache import cache_bytes, work_folder
from synthgen.stores.remote import RemotePath

__all__ = [
    "AppendFile",
    "filled",
    "is_in_memory",
    "listing",
    "open_here",
    "parse_location",
    "read_many",
    "read_range",
    "remedy",
    "stamps",
    "stays_remote",
    "temporaries",
    "walk_files",
]

logger = logging.getLogger(__name__)

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # two letters and more: one is a drive
_TRIES = 5


def parse_location(place: str | Path) -> Path:
    """The path of a folder or file by its name or URL; that of ``file:///runs/demo`` is local.

    A URL may have passed for a path before, and lost a slash.

    Raises:
        ConfigError: there is no such kind of store, or a password stands in the URL.
        MissingDependency: its library is not installed.
    """
    if isinstance(place, RemotePath):
        return place
    found = _URL.match(str(place))
    if not found:
        return Path(place)
    if found[1].lower() in ("file", "local"):
        return Path("/", str(place)[found.end() :])
    path = RemotePath(f"{found[1].lower()}://{str(place)[found.end() :]}")
    path.check()
    return path


def is_in_memory(path: Path) -> bool:
    """Whether other processes, even of this machine, see nothing of what lies there."""
    return isinstance(path, RemotePath) and path.protocol == "memory"


def open_here(path: Path) -> BufferedReader:
    """A file, open for reading from any place in it. Of a remote one that is the copy in the local cache.

    Raises:
        OSError, SynthgenError: there is none, or it cannot be read.
    """
    for _ in range(_TRIES):  # another process may drop the copy before it is open; after that it stays readable
        try:
            return open(path, "rb")
        except FileNotFoundError:
            if not (isinstance(path, RemotePath) and path.is_file()):
                raise
    raise StorageError(
        f"the copy of {path} is dropped from the cache as soon as it is made; raise SYNTHGEN_CACHE_BYTES"
    )


def listing(folder: Path) -> dict[str, int]:
    """The names of the files in a folder, each with its size in bytes; of a store one request for a thousand."""
    return {name: size for name, (size, _) in stamps(folder).items()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """The names of the files in a folder, each with its size in bytes and the time of its last change in ns."""
    if isinstance(folder, RemotePath):
        found = {path.name: path.stat() for path in folder.glob("*") if path.is_file()}
    else:
        try:
            with os.scandir(folder) as entries:
                found = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def walk_files(folder: Path, *, hidden: bool = True) -> Iterator[Path]:
    """All files below a folder, those in linked folders too; without ``hidden``, nothing whose name begins with a dot.

    Real folders come first, then links in the order of their names. A folder is walked once: what a link leads to a
    second time is left out with a warning, so that no image counts twice and a link to a parent ends.

    Raises:
        StorageError: a folder cannot be listed.
    """
    if isinstance(folder, RemotePath):
        for path in folder.rglob("*"):
            names = path.relative_to(folder).parts
            if path.is_file() and (hidden or not any(name.startswith(".") for name in names)):
                yield path
        return
    if not folder.is_dir():
        return
    visited, links = set[tuple[int, int]](), [folder]
    while links:
        start = links.pop(0)
        folders, linked = [start], list[Path]()
        while folders:
            current = folders.pop()
            try:
                status = current.stat()
                if (status.st_dev, status.st_ino) in visited:
                    if current == start:
                        logger.warning("%s leads to a folder that was read already; its files count once", start)
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(current) as entries:  # which may be millions: none is held
                    for entry in entries:
                        if entry.name.startswith(".") and not hidden:
                            continue
                        if not _is_folder(entry):
                            yield current / entry.name
                        else:
                            (linked if entry.is_symlink() else folders).append(current / entry.name)
            except OSError as error:
                raise unreadable(current, error) from None
        links.extend(sorted(linked))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def stays_remote(paths: Sequence[Path]) -> dict[Path, RemotePath]:
    """Those of the files that are not to be copied, because half of the local cache is filled by those before them."""
    found: dict[Path, RemotePath] = {}
    total = 0
    for path in paths:
        if isinstance(path, RemotePath):
            total += path.stat().st_size
            if total > cache_bytes() // 2:
                found[path] = path
    return found


def remedy(path: Path) -> str:
    """What to do about a damaged file: a run's own can be made again, and nobody else's is to be deleted."""
    folders = [folder for folder in list(path.absolute().parents)[1:3] if getattr(folder, "bucket", True)]
    with suppress(OSError, SynthgenError):  # the damage says more
        for folder in folders:
            if (folder / "run.yaml").is_file():
                return f"delete it; what makes it again is then told by: synthgen status {shlex.quote(str(folder))}"
    return "get it anew, or leave it out"


def temporaries(folder: Path) -> Iterator[Path]:
    """What is half written in a folder and in those below; stores have nothing of the kind."""
    if not isinstance(folder, RemotePath):
        yield from folder.glob("**/.*.tmp")


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder of this machine; what is in it when the block ends well is in ``folder``, which may be that very one."""
    if not isinstance(folder, RemotePath):
        yield folder
        return
    with work_folder() as here:
        yield here
        for file in sorted(file for file in here.rglob("*") if file.is_file()):
            (folder / file.relative_to(here).as_posix()).upload(file)


class AppendFile:
    """A file that lines are added to, each at once: several processes may share one.

    Stores cannot add to an object. There the file is written anew by :meth:`flush`, and a killed process loses what it
    added since the last one; it should have a file of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: bytes | None = None  # the whole remote file, once something was added to it
        self._flushed = True

    def add(self, line: str) -> None:
        """Add a line.

        Raises:
            OSError, SynthgenError: it cannot be written, or what is there not be read.
        """
        data = f"{line}\n".encode(errors="backslashreplace")
        if not isinstance(self.path, RemotePath):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write(data)
            return
        if self._content is None:
            self._content = self.path.read_bytes() if self.path.is_file() else b""
        self._content += data
        self._flushed = False

    def flush(self) -> None:
        """Send what was added.

        Raises:
            StorageError: the store cannot be reached.
        """
        if isinstance(self.path, RemotePath) and self._content is not None and not self._flushed:
            self.path.put(self._content)
            self._flushed = True


def read_range(path: Path, start: int, end: int) -> bytes:
    """The bytes of a file from ``start`` up to ``end``; of one in a store no others are asked for.

    Raises:
        OSError, SynthgenError: there is no such file, or it cannot be read.
        EOFError: it is shorter.
    """
    if isinstance(path, RemotePath):
        return path.read_range(start, end)
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) < end - start:
        raise EOFError("it is shorter than it was")
    return data


def read_many(folder: Path, names: Collection[str], most: int) -> Iterator[tuple[str, bytes]]:
    """The files of these names, many requests at a time. Those that are gone, or cannot be read, are left out.

    No more than ``most`` bytes of each are read, and one more, so that what is too long does not pass for whole.
    """
    if isinstance(folder, RemotePath):
        yield from folder.read_many(names, most + 1)
        return
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                yield name, file.read(most + 1)
        except (OSError, SynthgenError):
            continue
