"""Paths in an object store, for any protocol that fsspec knows, with the interface of :class:`pathlib.Path`.

An object appears whole or not at all, so nothing needs a temporary name here: what is written is one PUT, or a
multipart upload that the store joins at its end. What is read as a file (a tar, weights, a table) is first copied into
a local cache of bounded size and read from there; what is read once (done marks, settings) is not kept.

Transient failures are retried: by the client (s3fs retries each request itself), and around that here, with growing
waits. An address that refuses the very first connection is taken for a wrong one and is not retried here. fsspec is
imported by the first request, and keeps one client per process and store.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import random
import re
import stat
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from synthgen.errors import ConfigError, MissingDependency, StorageError, one_line
from synthgen.stores._failures import describe_failure, is_missing_bucket, is_store_error, is_transient, is_unreachable

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # Python 3.11 has no other way to inherit from a path

__all__ = ["RemotePath"]

logger = logging.getLogger(__name__)

PART = 2**24  # bytes of each part of a multipart upload; a file of less than two parts is one PUT
ATTEMPTS = 4  # of a request, each of which the client may retry itself
PATIENCE = 120.0  # seconds after which a request is not retried
_FIRST_WAIT = 0.25  # seconds; each wait is up to twice as long as the one before it
_BATCH = 256  # small objects that are requested together

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_OBJECT_STORES = {*_PACKAGES, "memory"}  # which have no folders to make; in others a file needs one
_IN_PARTS = {"s3", "s3a", "gs", "gcs"}  # whose clients take the size of the parts
_folders: set[Path] = set()  # made by this process in stores that have real folders
_answered: set[str] = set()  # stores that have answered this process, if only with an error


class RemotePath(_Path):
    """A path in a store: ``RemotePath("s3://bucket/run") / "images"``.

    It joins, splits and compares like any path, and asks the store where a path would ask the disk. There are no
    folders to make or remove: a folder exists while it contains something. Whatever opens a path can read it, because
    its file name is that of its copy in the local cache. To write, use :func:`synthgen.stores.tar.write_bytes`.
    """

    _listed: os.stat_result | None = None  # its status in the listing that it comes from

    def __str__(self) -> str:
        protocol, *rest = self.parts or ("",)
        return f"{protocol}//{'/'.join(rest)}" if protocol.endswith(":") else "/".join(self.parts) or "."

    def __fspath__(self) -> str:
        from synthgen.stores.cache import local_copy

        return str(local_copy(self))

    @property
    def protocol(self) -> str:
        """What stands before the colon: ``s3``."""
        return self.parts[0].removesuffix(":").lower()

    @property
    def bucket(self) -> str:
        """The first name after the protocol; other stores call it a container or a host."""
        return self.parts[1] if len(self.parts) > 1 else ""

    @property
    def _store(self) -> str:
        return f"{self.protocol}://{self.bucket}"

    def check(self) -> None:
        """Check that there is a client for this kind of store.

        Raises:
            ConfigError: fsspec has no client for it, or the URL contains a password.
            MissingDependency: the client's library is not installed.
        """
        if re.match(r"[^@]*:[^@]*@", self.bucket):
            raise ConfigError(
                f"there is a password in {self}, which would be written to logs; give it in the environment "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in the configuration of the client"
            )
        if not self.bucket:
            raise ConfigError(f"{self.protocol}:// names no bucket; write it as {self.protocol}://bucket/run")
        import fsspec

        try:
            fsspec.get_filesystem_class(self.protocol)
        except ImportError as error:
            package = _PACKAGES.get(self.protocol, "")
            hint = f"try: pip install {package}" if package else one_line(error)
            raise MissingDependency(f"{self.protocol}:// needs a library that is not installed; {hint}") from None
        except ValueError:
            raise ConfigError(
                f"there is no kind of store called {self.protocol}://; use s3, gs, az, memory or another protocol of "
                "fsspec"
            ) from None

    # -- requests

    def ask(self, call: Callable[[Any, str], Any]) -> Any:
        """Call ``call`` with the file system and the object's name in it; retry transient failures.

        Raises:
            FileNotFoundError, FileExistsError: there is nothing, or something, at this path.
            StorageError: the store cannot be reached, refuses, or has no such bucket; in one line.
        """
        started = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                system = self._system()
                value = call(system, self.key(system))
            except Exception as error:
                if not is_store_error(error):
                    raise
                wrong_address = is_unreachable(error) and self._store not in _answered
                if not wrong_address:
                    _answered.add(self._store)
                if isinstance(error, FileNotFoundError | FileExistsError) and not is_missing_bucket(error):
                    raise
                last = attempt == ATTEMPTS or time.monotonic() - started > PATIENCE
                if last or wrong_address or not is_transient(error):
                    raise describe_failure(error, self) from None
                wait = _FIRST_WAIT * 2**attempt * random.uniform(0.5, 1)
                logger.info("%s: %s; retrying in %.1f s", self, one_line(error), wait)
                time.sleep(wait)
            else:
                _answered.add(self._store)
                return value

    def key(self, system: Any) -> str:
        """The name by which the file system knows this path."""
        return str(system._strip_protocol(str(self)))

    def _system(self) -> Any:
        """The file system, as fsspec keeps it for this process; without listings, since other processes write too."""
        from fsspec.core import url_to_fs

        self.check()
        system, _ = url_to_fs(self._store, use_listings_cache=False)
        return system

    # -- metadata

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind, size and time of the last change; of a folder only the kind."""
        return self._listed or _status(self.ask(lambda system, key: system.info(key)))

    def version(self) -> tuple[str, int]:
        """A text that changes with the content ("" if the store has none), and the size in bytes.

        Raises:
            FileNotFoundError: there is no object here.
        """
        info = self.ask(lambda system, key: system.info(key))
        if info.get("type") == "directory":
            raise FileNotFoundError(f"there is no file {self}")
        return _etag(info) or str(_modified(info) or ""), int(info["size"])

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object here, or a folder that contains one."""
        return self._mode() != 0

    def is_file(self) -> bool:
        """Whether there is an object here."""
        return stat.S_ISREG(self._mode())

    def is_dir(self) -> bool:
        """Whether this is a folder."""
        return stat.S_ISDIR(self._mode())

    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def iterdir(self) -> Generator[RemotePath]:
        """The files and folders in this folder, whose kind and size are then known."""
        try:
            entries = self.ask(lambda system, key: system.ls(key, detail=True))
        except FileNotFoundError:
            return
        own = self.key(self._system()).strip("/")
        for entry in entries:
            name = str(entry["name"]).strip("/")
            if name != own:  # that of a file, or the object that marks an empty folder
                path = self / name.rpartition("/")[2]
                path._listed = _status(entry)
                yield path

    def glob(self, pattern: str, **options: Any) -> Generator[RemotePath]:
        """What matches in this folder; ``**`` stands for any number of folders.

        fsspec's own ``glob`` lists whole trees, here ``*/settings.yaml`` would list every tar of a run.
        """
        first, _, rest = pattern.partition("/")
        if first == "**":
            yield from self.glob(rest)
            for child in self.iterdir():
                if child.is_dir():
                    yield from child.glob(pattern)
            return
        if any(char in first for char in "*?["):
            found = [child for child in self.iterdir() if fnmatchcase(child.name, first)]
        else:
            found = [self / first]
        for child in found:
            if not rest:
                if child.is_dir() if pattern.endswith("/") else child.exists():
                    yield child
            elif child._listed is None or child.is_dir():
                yield from child.glob(rest)

    def rglob(self, pattern: str, **options: Any) -> Generator[RemotePath]:
        """What matches at any depth."""
        return self.glob(f"**/{pattern}")

    def resolve(self, strict: bool = False) -> RemotePath:
        """The same: a URL is always absolute."""
        return self

    absolute = resolve

    # -- content

    def open(self, mode: str = "r", *args: Any, **options: Any) -> IO[Any]:  # type: ignore[override]
        """Open its copy in the cache for reading."""
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"{self} can only be opened for reading; objects are written as a whole")
        return open(os.fspath(self), mode, *args, **options)

    def read_bytes(self) -> bytes:
        """The whole object; no copy is kept."""
        data: bytes = self.ask(lambda system, key: system.cat_file(key, **_one_request(system)))
        return data

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``."""
        data: bytes = self.ask(lambda system, key: system.cat_file(key, start=start, end=end))
        if len(data) != end - start:
            raise StorageError(f"{self} is shorter than it was; run the same command again")
        return data

    def read_many(self, names: Collection[str], most: int) -> Iterator[tuple[str, bytes]]:
        """The first ``most`` bytes of objects in this folder, many at a time; missing objects are left out."""
        ordered = list(names)
        for start in range(0, len(ordered), _BATCH):
            batch = [self / name for name in ordered[start : start + _BATCH]]
            system = self._system()
            keys = [path.key(system) for path in batch]
            try:
                found = system.cat(keys, on_error="return", **_one_request(system))
            except Exception as error:
                if not is_store_error(error):
                    raise
                found = {}
            for path, key in zip(batch, keys, strict=True):
                data = found.get(key)
                if not isinstance(data, bytes):  # an error: retry this one alone
                    try:
                        data = path.read_bytes()
                    except FileNotFoundError:
                        continue
                yield path.name, data[:most]

    def put(self, data: bytes) -> None:
        """Write ``data`` here at once, replacing what was here."""
        self._write(lambda system, key: system.pipe_file(key, data, **self._in_parts()))

    def create(self, data: bytes) -> bool:
        """Write ``data`` here unless something is here; returns whether it was written.

        In stores without conditional writes two of these may succeed. If an answer is lost on the way, this may return
        False although the data was written.
        """
        try:
            self._write(lambda system, key: system.pipe_file(key, data, mode="create"))
        except FileExistsError:
            return False
        return True

    def upload(self, file: Path) -> None:
        """Write the content of a local file here, in parts if it is large.

        Raises:
            StorageError: the object has another size than the file.
        """
        self._write(lambda system, key: system.put_file(str(file), key, **self._in_parts()))
        if self.version()[1] != file.stat().st_size:
            raise StorageError(f"{self} has another size than the file that was uploaded; run the same command again")

    def _write(self, call: Callable[[Any, str], Any]) -> None:
        """:meth:`ask`, after making the folder of the file if the store has real folders."""
        folder = self.parent
        if self.protocol not in _OBJECT_STORES and folder not in _folders:  # elsewhere this might make a bucket
            folder.ask(lambda system, key: system.makedirs(key, exist_ok=True))
            _folders.add(folder)
        self.ask(call)

    def download(self, file: Path) -> None:
        """Write the object to a local file.

        Raises:
            FileNotFoundError: there is no object here.
        """
        self.ask(lambda system, key: system.get_file(key, str(file)))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            self.ask(lambda system, key: system.rm_file(key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists while it contains something."""

    def rmdir(self) -> None:
        """Do nothing, for the same reason."""

    def _in_parts(self) -> dict[str, int]:
        return {"chunksize": PART} if self.protocol in _IN_PARTS else {}

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise io.UnsupportedOperation(f"{self} is in a store, where files can only be written, read and deleted")

    chmod = hardlink_to = rename = replace = symlink_to = touch = _refuse


def _one_request(system: Any) -> dict[str, int]:
    """Options without which newer versions of s3fs request the size of an object before they read it."""
    method = getattr(system, "_cat_file", None)
    return {"max_concurrency": 1} if method and "max_concurrency" in inspect.signature(method).parameters else {}


def _status(info: dict[str, Any]) -> os.stat_result:
    """fsspec's description of an object as the result of ``stat``; the inode is a hash of the ETag."""
    kind = stat.S_IFDIR if info.get("type") == "directory" else stat.S_IFREG
    seconds, inode = _modified(info), zlib.crc32(_etag(info).encode())
    times = {"st_mtime": seconds, "st_mtime_ns": int(seconds * 1e9)}
    return os.stat_result((kind | 0o644, inode, 0, 1, 0, 0, int(info.get("size") or 0), *3 * (int(seconds),)), times)


def _etag(info: dict[str, Any]) -> str:
    """A text that changes with the content; "" if the store has none."""
    return str(next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), ""))


def _modified(info: dict[str, Any]) -> float:
    """When an object was last changed, in seconds since 1970; 0 if its store does not say."""
    names = ("LastModified", "last_modified", "mtime", "updated", "created")
    value = next((info[name] for name in names if info.get(name)), 0)
    try:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        return value.timestamp() if isinstance(value, datetime) else float(value)
    except ValueError:
        return 0.0
