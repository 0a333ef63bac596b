"""Places in an object store, by whatever protocol fsspec knows, in the shape of :class:`pathlib.Path`.

An object appears whole or not at all, so nothing needs a temporary name here: what is written is one PUT, or a
multipart upload that the store puts together at its end. What is read as a file (a tar, weights, a table) is copied
into a local cache of bounded size first, and read from there; what is read once (marks, settings) is not kept.

Requests that fail in passing are repeated: by the client (s3fs repeats each of them itself) and, with waits that grow,
here. An address at which nobody ever answered is taken for a wrong one, and is not asked again here. fsspec is imported
by the first request.
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
from collections.abc import Callable, Collection, Generator, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from synthgen.errors import ConfigError, MissingDependency, StorageError, one_line
from synthgen.stores._failures import explained, is_of_store, may_pass, nobody_is_there, says_no_bucket

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # Python 3.11 has no other way to inherit from a path

__all__ = ["RemotePath", "forget_connections"]

logger = logging.getLogger(__name__)

PART = 2**24  # bytes of each part of a multipart upload; up to two of them go as one PUT
ATTEMPTS = 4  # of a request, beside those that the client makes itself
PATIENCE = 120.0  # seconds after which a request is not retried
_FIRST_WAIT = 0.25  # seconds; each wait is up to twice as long as the one before it
_AT_ONCE = 256  # small objects that are asked for together

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_PACKAGES |= {"abfs": "adlfs", "abfss": "adlfs"}
_IN_PARTS = {"s3", "s3a", "gs", "gcs"}  # whose clients take the size of the parts
_WITH_FOLDERS = {"ftp", "sftp", "smb", "ssh"}  # the client of ftp says of a missing one only that it refuses
_folders: set[Path] = set()  # that were made there
_file_systems: dict[tuple[int, str, str], Any] = {}  # process, protocol, bucket → file system
_answered: set[tuple[int, str, str]] = set()  # those that have shown themselves once, be it by an error


class RemotePath(_Path):
    """A place in a store: ``RemotePath("s3://bucket/run") / "images"``.

    It joins, splits and compares as a path does, and asks the store where a path asks the disk. There are no folders to
    make or remove: a folder is there while something is in it. It can be read by whatever opens a path, because its
    file name is that of its copy in the local cache. For writing there is :func:`synthgen.stores.tar.write_bytes`.
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
        """The first name behind the protocol; other stores call it a container or a host."""
        return self.parts[1] if len(self.parts) > 1 else ""

    def check(self) -> None:
        """Check that there is a client for this kind of store.

        Raises:
            ConfigError: fsspec has no client for it, or the URL contains a password.
            MissingDependency: the client's library is not installed.
        """
        if re.match(r"[^@]*:[^@]*@", self.bucket):
            raise ConfigError(
                f"a password stands in {self}, and would stand in logs; give it by the environment "
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
                f"there is no kind of store called {self.protocol}://; there are s3, gs, az, memory and what else "
                "fsspec knows"
            ) from None

    # -- requests

    def ask(self, call: Callable[[Any, str], Any]) -> Any:
        """Call ``call`` with the file system and the object's name in it; retry transient failures.

        Raises:
            FileNotFoundError, FileExistsError: there is nothing, or something, at this place.
            StorageError: the store cannot be reached, refuses, or has no such bucket; in one line.
        """
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                system = self._system()
                value = call(system, self.key(system))
                _answered.add(self._name())
                return value
            except Exception as error:
                if not is_of_store(error):
                    raise
                wrong = nobody_is_there(error) and self._name() not in _answered
                if not wrong:
                    _answered.add(self._name())
                if isinstance(error, FileNotFoundError | FileExistsError) and not says_no_bucket(error):
                    raise
                late = attempt == ATTEMPTS or time.monotonic() - started > PATIENCE
                if late or wrong or not may_pass(error):
                    raise explained(error, self) from None
                wait = _FIRST_WAIT * 2**attempt * random.uniform(0.5, 1)
                logger.info("%s: %s; again in %.1f s", self, one_line(error), wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def key(self, system: Any) -> str:
        """The name by which the file system knows this place."""
        return str(system._strip_protocol(str(self)))

    def _system(self) -> Any:
        """The file system, made once in each process. It keeps no listings: other processes write here too."""
        name = self._name()
        if name not in _file_systems:
            from fsspec.core import url_to_fs

            self.check()
            _file_systems[name], _ = url_to_fs(str(self), use_listings_cache=False)
        return _file_systems[name]

    def _name(self) -> tuple[int, str, str]:
        return os.getpid(), self.protocol, self.bucket

    # -- metadata

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind, size and date. Of a folder there is only the kind."""
        return self._listed or status_of(self.ask(lambda system, key: system.info(key)))

    def version(self) -> tuple[str, int]:
        """What changes with the content, and the size in bytes.

        Raises:
            FileNotFoundError: there is no object here.
        """
        info = self.ask(lambda system, key: system.info(key))
        if info.get("type") == "directory":
            raise FileNotFoundError(f"there is no file {self}")
        mark = next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), "") or _changed(info)
        return str(mark), int(info["size"])

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether an object is here, or something lies below."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether an object is here."""
        try:
            return stat.S_ISREG(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether something lies below."""
        try:
            return stat.S_ISDIR(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def iterdir(self) -> Generator[RemotePath]:
        """The direct children, with kind and size already known."""
        try:
            entries = self.ask(lambda system, key: system.ls(key, detail=True))
        except FileNotFoundError:
            return
        own = self.key(self._system()).strip("/")
        for entry in entries:
            name = str(entry["name"]).strip("/")
            if name in (own, own.rpartition("/")[2]) or not name.rpartition("/")[2]:  # the mark of an empty folder
                continue
            path = self / name.rpartition("/")[2]
            path._listed = status_of(entry)
            yield path

    def glob(self, pattern: str, **options: Any) -> Generator[RemotePath]:
        """What matches below, folder by folder; ``**`` stands for any number of folders."""
        first, _, rest = pattern.partition("/")
        only_folders = pattern.endswith("/")
        if first == "**":
            yield from self.glob(rest)
            for child in self.iterdir():
                if child.is_dir():
                    yield from child.glob(pattern)
        elif not rest:
            for child in self._matching(first):
                if child.is_dir() or not only_folders:
                    yield child
        else:
            for child in self._matching(first):
                if child._listed is None or child.is_dir():
                    yield from child.glob(rest)

    def _matching(self, name: str) -> Iterator[RemotePath]:
        if any(char in name for char in "*?["):
            yield from (child for child in self.iterdir() if fnmatchcase(child.name, name))
        elif (self / name).exists():
            yield self / name

    def rglob(self, pattern: str, **options: Any) -> Generator[RemotePath]:
        """What matches at any depth below."""
        return self.glob(f"**/{pattern}")

    def resolve(self, strict: bool = False) -> RemotePath:
        """The same: a URL is always whole."""
        return self

    absolute = resolve

    # -- content

    def open(self, mode: str = "r", *args: Any, **options: Any) -> IO[Any]:  # type: ignore[override]
        """Its copy in the cache, for reading."""
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"{self} is opened for reading only; what is written there is written whole")
        return open(os.fspath(self), mode, *args, **options)

    def read_bytes(self) -> bytes:
        """The whole object; no copy is kept."""
        data: bytes = self.ask(lambda system, key: system.cat_file(key, **_in_one_request(system)))
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
        """The first ``most`` bytes of objects right below, many at a time; those that are not there are left out."""
        ordered = list(names)
        for begin in range(0, len(ordered), _AT_ONCE):
            few = ordered[begin : begin + _AT_ONCE]
            system = self._system()
            keys = {name: (self / name).key(system) for name in few}
            found = self._cat(system, list(keys.values()))
            for name in few:
                data = found.get(keys[name])
                if not isinstance(data, bytes):  # retry it alone
                    try:
                        data = (self / name).read_bytes()
                    except FileNotFoundError:
                        continue
                yield name, data[:most]

    def _cat(self, system: Any, keys: list[str]) -> dict[str, Any]:
        try:
            found = system.cat(keys, on_error="return", **_in_one_request(system))
        except Exception as error:
            if not is_of_store(error):
                raise
            return {}
        return found if isinstance(found, dict) else {}

    def put(self, data: bytes) -> None:
        """Put ``data`` here at once, in place of what was here."""
        self._write(lambda system, key: system.pipe_file(key, data, **self._in_parts()))

    def create(self, data: bytes) -> bool:
        """Put ``data`` here unless something is; says whether it was put. Stores that cannot tell may let two succeed.

        An answer that is lost on the way may say no of what was put all the same.
        """
        try:
            self._write(lambda system, key: system.pipe_file(key, data, mode="create"))
        except FileExistsError:
            return False
        return True

    def upload(self, file: Path) -> None:
        """Put the content of a local file here, in parts where it is large.

        Raises:
            StorageError: the store reports other content than was sent.
        """
        self._write(lambda system, key: system.put_file(str(file), key, **self._in_parts()))
        if self.version()[1] != file.stat().st_size:
            raise StorageError(f"{self} is not as long as what was sent; run the same command again")

    def _write(self, call: Callable[[Any, str], Any]) -> None:
        """:meth:`ask`; where the store has real folders, make that of the file first."""
        if self.protocol in _WITH_FOLDERS and self.parent not in _folders:
            self._make_parent()
        try:
            self.ask(call)
        except FileNotFoundError:
            if self.protocol in _PACKAGES:  # they have no folders: making one would make a bucket
                raise
            self._make_parent()
            self.ask(call)

    def _make_parent(self) -> None:
        self.parent.ask(lambda system, key: system.makedirs(key, exist_ok=True))
        _folders.add(self.parent)

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
        """Nothing to do: a folder is there while something is in it."""

    def rmdir(self) -> None:
        """Nothing to do."""

    def _in_parts(self) -> dict[str, int]:
        return {"chunksize": PART} if self.protocol in _IN_PARTS else {}

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise io.UnsupportedOperation(f"{self} lies in a store, where files can only be put, read and taken away")

    chmod = hardlink_to = rename = replace = symlink_to = touch = _refuse


def _in_one_request(system: Any) -> dict[str, int]:
    """Options without which newer versions of s3fs ask for the size of an object before they read it."""
    method = getattr(system, "_cat_file", None)
    return {"max_concurrency": 1} if method and "max_concurrency" in inspect.signature(method).parameters else {}


def forget_connections() -> None:
    """Make the file systems anew when they are next needed, from the environment as it is then."""
    _folders.clear()
    _file_systems.clear()
    _answered.clear()


def status_of(info: dict[str, Any]) -> os.stat_result:
    """What fsspec says of an object, as the system says it of a file."""
    kind = stat.S_IFDIR if info.get("type") == "directory" else stat.S_IFREG
    size, changed = int(info.get("size") or 0), _changed(info)
    seconds = changed.timestamp() if isinstance(changed, datetime) else float(changed or 0)
    times = {"st_mtime": seconds, "st_mtime_ns": int(seconds * 1e9)}
    return os.stat_result((kind | 0o644, 0, 0, 1, 0, 0, size, int(seconds), int(seconds), int(seconds)), times)


def _changed(info: dict[str, Any]) -> Any:
    names = ("LastModified", "last_modified", "mtime", "updated", "created")
    found = next((info[name] for name in names if info.get(name)), 0)
    try:
        return datetime.fromisoformat(found) if isinstance(found, str) else found
    except ValueError:
        return 0
