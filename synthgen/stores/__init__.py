"""Files of a run, on a local file system or in a store that fsspec supports (``s3://bucket/run``).

A path is a :class:`pathlib.Path` or a :class:`~synthgen.stores.remote.RemotePath`, which has the same interface. The
functions here and in :mod:`synthgen.stores.tar` work on both; fsspec is imported only for the second.
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
    "is_in_memory",
    "listing",
    "open_binary",
    "parse_location",
    "read_many",
    "read_range",
    "remedy",
    "staging_folder",
    "stat_files",
    "temporaries",
    "uncached",
    "walk_files",
]

logger = logging.getLogger(__name__)

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # one letter would be a drive
_ATTEMPTS = 5  # to open a copy in the cache


def parse_location(place: str | Path) -> Path:
    """The path of a file or folder by its name or URL; ``file:///runs/demo`` is local.

    A URL that lost a slash because it was made into a :class:`~pathlib.Path` is accepted.

    Raises:
        ConfigError: there is no such kind of store, or the URL contains a password.
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
    """Whether no other process can see the files there."""
    return isinstance(path, RemotePath) and path.protocol == "memory"


def open_binary(path: Path) -> BufferedReader:
    """Open a file, or the cached copy of a remote one, for reading at any position.

    Raises:
        OSError, SynthgenError: there is no such file, or it cannot be read.
    """
    for _ in range(_ATTEMPTS):  # another process may delete the copy before it is open
        try:
            return open(path, "rb")
        except FileNotFoundError:
            if not (isinstance(path, RemotePath) and path.is_file()):
                raise
    raise StorageError(
        f"the copy of {path} is deleted from the cache before it can be read; raise SYNTHGEN_CACHE_BYTES"
    )


def listing(folder: Path) -> dict[str, int]:
    """The sizes in bytes of the files in a folder, by name; in a store one request per thousand files."""
    return {name: size for name, (size, *_) in stat_files(folder).items()}


def stat_files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """The files in a folder by name: size in bytes, time of the last change in ns, and inode.

    A file that is written anew has another inode, also within the resolution of the time.
    """
    if isinstance(folder, RemotePath):
        found = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    else:
        try:
            with os.scandir(folder) as entries:
                found = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
    return {name: (status.st_size, status.st_mtime_ns, status.st_ino) for name, status in found.items()}


def walk_files(folder: Path, *, hidden: bool = True) -> Iterator[Path]:
    """All files at any depth in a folder, also in linked folders; without ``hidden`` no names that begin with a dot.

    Real folders come first, then links in the order of their names. Each folder is walked once, so that no image counts
    twice and a link to a parent does not loop; a link to a folder that was already walked is skipped with a warning.

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
                        logger.warning("%s leads to a folder that was already read; its files count once", start)
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(current) as entries:  # there may be millions, which are not collected
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


def uncached(paths: Sequence[Path]) -> set[Path]:
    """The remote files that are not to be copied, because those before them fill half of the local cache."""
    found, total = set[Path](), 0
    for path in paths:
        if isinstance(path, RemotePath):
            total += path.stat().st_size
            if total > cache_bytes() // 2:
                found.add(path)
    return found


def remedy(path: Path) -> str:
    """What to do about a damaged file: one of a run can be made again, any other should not be deleted."""
    folders = [folder for folder in list(path.absolute().parents)[1:3] if getattr(folder, "bucket", True)]
    with suppress(OSError, SynthgenError):  # the damage matters more
        for folder in folders:
            if (folder / "run.yaml").is_file():
                return f"delete it; then this shows how to make it again: synthgen status {shlex.quote(str(folder))}"
    return "replace it, or leave it out"


def temporaries(folder: Path) -> Iterator[Path]:
    """The temporary files in a folder and its subfolders; stores have none."""
    if not isinstance(folder, RemotePath):
        yield from folder.glob("**/.*.tmp")


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A local folder to write to, which is uploaded to ``folder`` when the block ends without an error, if remote."""
    if not isinstance(folder, RemotePath):
        yield folder
        return
    with work_folder() as here:
        yield here
        for file in sorted(file for file in here.rglob("*") if file.is_file()):
            (folder / file.relative_to(here).as_posix()).upload(file)


class AppendFile:
    """A file to which lines are appended, each immediately, so that several processes may share it.

    A store cannot append to an object. There :meth:`flush` writes the whole file, so each process should have its own,
    and a killed one loses the lines since the last flush.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: bytes | None = None  # of the whole remote file, after the first line
        self._flushed = True

    def add(self, line: str) -> None:
        """Add a line.

        Raises:
            OSError, SynthgenError: the file cannot be written, or its present content cannot be read.
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
        """Upload the lines that were added.

        Raises:
            StorageError: the store cannot be reached.
        """
        if isinstance(self.path, RemotePath) and self._content is not None and not self._flushed:
            self.path.put(self._content)
            self._flushed = True


def read_range(path: Path, start: int, end: int) -> bytes:
    """The bytes of a file from ``start`` up to ``end``; of a remote file only these are requested.

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
    """The content of these files, by many requests at a time; missing and unreadable ones are left out.

    Of each at most ``most`` + 1 bytes are returned, so that a file that is too long can be told from a complete one.
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
