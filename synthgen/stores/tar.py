"""Tars in the WebDataset convention, in which a sample is a run of members that share a key; and atomic writes.

The same content gives the same bytes: fixed owner and mode, and an integer time of 0 (a float would add a PAX record
of 1 KiB to every member). A file appears whole or not at all: it is written under a temporary name, flushed to the
disk and renamed; one for a store is written on this machine and uploaded when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from synthgen.errors import CorruptFile, MissingArtifact, StorageError, one_line
from synthgen.stores import open_binary, remedy
from synthgen.stores._failures import is_system_error, unreadable
from synthgen.stores._temporary import is_abandoned, temporary_beside
from synthgen.stores.cache import work_folder
from synthgen.stores.headers import iter_files
from synthgen.stores.index import Member, TarIndex
from synthgen.stores.remote import RemotePath
from synthgen.untrusted import MAX_BYTES

__all__ = [
    "Member",
    "TarWriter",
    "create_bytes",
    "index_tar",
    "is_abandoned",
    "iter_samples",
    "read_member",
    "read_tar",
    "temporary_beside",
    "write_bytes",
    "write_chunks",
    "write_json",
]

_MODE = 0o444
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically: readers see the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full, the folder is not writable, or the store does not answer.
    """
    if isinstance(path, RemotePath):
        path.put(data)
    else:
        write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write ``chunks``, one after another, to ``path`` atomically; they need not fit into memory together.

    Raises:
        StorageError: as for :func:`write_bytes`. Whatever ``chunks`` raises is raised too, and ``path`` is not changed.
    """
    with _write_errors(path), _temporary_for(path) as temporary:
        _write(temporary, chunks)
        _publish(temporary, path)


def create_bytes(path: Path, data: bytes) -> bool:
    """Write ``data`` to ``path`` atomically unless it exists. Of several callers, on any machine, one succeeds.

    Returns:
        Whether the file was written.

    Raises:
        StorageError: as for :func:`write_bytes`.
    """
    if isinstance(path, RemotePath):
        return path.create(data)
    with _write_errors(path), _temporary_for(path) as temporary:
        _write(temporary, [data])
        try:
            _link(temporary, path)
        except FileExistsError:
            return False
        return True


def _link(temporary: Path, path: Path) -> None:
    """Give a file a second name; fails if that exists, on network file systems as well."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, on which the file is empty for a moment
        path.touch(exist_ok=False)
        temporary.replace(path)


@contextlib.contextmanager
def _temporary_for(path: Path) -> Iterator[Path]:
    """Where to write a file before :func:`_publish`; removed when the block ends."""
    if isinstance(path, RemotePath):
        with work_folder() as folder:
            yield folder / path.name
        return
    temporary = temporary_beside(path)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(temporary: Path, chunks: Iterable[bytes]) -> None:
    with open(temporary, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path) -> None:
    """Move a complete file to its place, or upload it."""
    if isinstance(path, RemotePath):
        path.upload(temporary)
    else:
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically (see :func:`write_bytes`)."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one-line error for a failed write."""
    blocked = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) or error.errno == errno.EROFS
    space = "" if blocked else "free some space or "
    return StorageError(
        f"cannot write {path}: {error.strerror or error}; {space}choose another --run folder, "
        "then run the same command again: what is done stays done"
    )


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


class TarWriter:
    """Write one tar; the file appears only when the ``with`` block ends without an error.

    >>> with TarWriter(path) as tar:
    ...     tar.add("0000000000", {"png": data, "json": meta})

    Raises:
        StorageError: as for :func:`write_bytes`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.size = 0
        self.sha256 = ""
        self._discarded = False

    def __enter__(self) -> TarWriter:
        with _write_errors(self.path), contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(_temporary_for(self.path))
            self._file = open(self._temporary, "w+b")
            stack.callback(self._close)
            self._stack = stack.pop_all()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample; its members are stored in the order of their names."""
        with _write_errors(self.path):
            for name in sorted(members):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size, info.mode, info.mtime = len(members[name]), _MODE, 0
                self._tar.addfile(info, io.BytesIO(members[name]))
        self.count += 1

    def seal(self) -> None:
        """Finish the tar, after which ``sha256`` and ``size`` are known and nothing can be added."""
        if self.sha256:
            return
        with _write_errors(self.path):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.seek(0)
        self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self.size = self._file.tell()
        self._file.close()  # Windows renames no open file

    def discard(self) -> None:
        """Leave what is at ``path`` as it is when the block ends."""
        self._discarded = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _write_errors(self.path), self._stack:
            if kind is None and not self._discarded:
                self.seal()
                _publish(self._temporary, self.path)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # a sealed file has nothing left to write; otherwise there is another error
            self._file.close()


def index_tar(path: Path) -> TarIndex:
    """The samples of a tar in order: keys, and where the bytes of each member are. Reads headers only.

    Raises:
        MissingArtifact, CorruptFile: as for :func:`iter_samples`; or a key occurs twice.
    """
    try:
        return TarIndex.build(iter_samples(path))
    except ValueError as error:
        raise CorruptFile(f"{path} cannot be read: {error}", remedy(path)) from None


def iter_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of :func:`index_tar`, one at a time; keys that occur twice are not detected.

    Links, folders and devices are skipped: nothing is ever unpacked. So are files that belong to no sample: those whose
    names begin with a dot (``._0.jpg``, which macOS puts beside ``0.jpg``) or have none (``LICENSE``). webdataset does
    the same, except for dot files in folders. Since a key may become a file name, names that lead out of their folder
    or contain control characters are refused.

    Raises:
        MissingArtifact: there is no such file.
        CorruptFile: it is no tar, is cut off, or contains a refused name; the message has the last key.
        StorageError: the system cannot read the file, which does not mean that its content is damaged.
    """
    last, members = "", dict[str, Member]()
    try:
        with open_binary(path) as file:
            for file_name, offset, size in iter_files(file):
                key, name = _key_and_name(file_name)
                if not name:
                    continue
                if key != last:
                    if members:
                        yield last, members
                    last, members = key, {}
                if name in members:
                    raise ValueError(f"sample {key} has two members {name!r}")
                members[name] = Member(offset, size)
    except FileNotFoundError:
        raise MissingArtifact(f"there is no file {path}") from None
    except OSError as error:
        raise (unreadable(path, error) if is_system_error(error) else _corrupt(path, last, one_line(error))) from None
    except (tarfile.TarError, ValueError, OverflowError, LookupError, EOFError, RecursionError) as error:
        raise _corrupt(path, last, one_line(error)) from None
    if members:
        yield last, members


def _key_and_name(path: str) -> tuple[str, str]:
    """The key of a file's sample and the file's name in that sample, which is "" if it belongs to none."""
    folder, _, base = path.rpartition("/")
    stem, dot, name = base.partition(".")
    path.encode()  # fails on bytes that are not UTF-8, which cannot be written again
    if path.startswith("/") or _CONTROL.search(path) or (".." in path and ".." in path.split("/")):
        raise ValueError(f"the file name {path[:200]!r} leads out of its folder or has control characters")
    return f"{folder}/{stem}" if folder else stem, name.lower() if stem and dot else ""


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes of one member of an open tar.

    Raises:
        ValueError: the member is larger than ``MAX_BYTES``.
    """
    if member.size > MAX_BYTES:
        raise ValueError(f"a member has {member.size:,} bytes; {MAX_BYTES:,} are the most")
    file.seek(member.offset)
    return file.read(member.size)


def read_tar(
    path: Path, names: Collection[str] | None = None, keys: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in order: the key, and the bytes of each member.

    ``names`` selects members and ``keys`` samples; the others are not read.

    Raises:
        MissingArtifact, CorruptFile: as for :func:`index_tar`; or a member is too large.
    """
    samples, last = index_tar(path), ""
    with open_binary(path) as file:
        for key, members in samples:
            if keys is None or key in keys:
                wanted = {name: member for name, member in members.items() if names is None or name in names}
                try:
                    values = {name: read_member(file, member) for name, member in wanted.items()}
                except OSError as error:
                    raise unreadable(path, error) from None
                except ValueError as error:
                    raise _corrupt(path, last, str(error)) from None
                yield key, values
            last = key


def _corrupt(path: Path, last: str, why: str) -> CorruptFile:
    so_far = f"the last key read is {last}" if last else "no key could be read"
    return CorruptFile(f"{path} cannot be read: {why}; {so_far}", remedy(path))
