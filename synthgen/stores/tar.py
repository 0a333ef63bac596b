"""Plain tars in the WebDataset convention: a sample is the run of members that share a key.

The same content gives the same bytes: fixed owner and mode, and an integer time of 0 (a float one would add a
PAX record of 1 KiB to every member). A tar appears whole or not at all: it is written under a temporary name,
flushed to the disk and renamed; one that goes to a store is written here and sent when it is whole.
"""

from __future__ import annotations

import contextlib
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
from synthgen.stores import open_here, remedy
from synthgen.stores._failures import is_of_system, unreadable
from synthgen.stores._temporary import is_abandoned, temporary_beside
from synthgen.stores.cache import work_folder
from synthgen.stores.headers import iter_files
from synthgen.stores.index import Indexing, Member, TarIndex
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
    """Put ``data`` at ``path`` at once: readers see the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full or the folder may not be written to; or the store does not answer.
    """
    if isinstance(path, RemotePath):
        path.put(data)
    else:
        write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Put ``chunks``, one after another, at ``path`` at once: all of them need not fit into memory.

    Raises:
        StorageError: as for :func:`write_bytes`; or whatever ``chunks`` raises, and ``path`` stays as it is.
    """
    with contextlib.ExitStack() as stack:
        remote = isinstance(path, RemotePath)
        temporary = stack.enter_context(work_folder()) / path.name if remote else temporary_beside(path)
        try:
            _write(temporary, chunks)
            if isinstance(path, RemotePath):
                path.upload(temporary)
            else:
                temporary.replace(path)
        except OSError as error:
            raise storage_error(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def create_bytes(path: Path, data: bytes) -> bool:
    """Put ``data`` at ``path`` at once, unless something is there. Of many that try, on any machine, one succeeds.

    Returns:
        Whether it was put.

    Raises:
        StorageError: the disk is full or the folder may not be written to; or the store does not answer.
    """
    if isinstance(path, RemotePath):
        return path.create(data)
    temporary = temporary_beside(path)
    try:
        _write(temporary, [data])
        try:
            os.link(temporary, path)  # fails where there is something, on network file systems as well
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(temporary: Path, chunks: Iterable[bytes]) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Put ``value`` at ``path`` as indented JSON, at once (see :func:`write_bytes`)."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one-line form of a failed write."""
    return StorageError(
        f"cannot write {path}: {error.strerror or error}; free some space or choose another --run folder, "
        "then run the same command again: what is done stays done"
    )


class TarWriter:
    """Write one tar; it takes its name only when the ``with`` block ends well.

    >>> with TarWriter(path) as tar:
    ...     tar.add("0000000000", {"png": data, "json": meta})

    Raises:
        StorageError: the disk is full or the folder may not be written to; or the store does not answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.size = 0
        self.sha256 = ""
        self._wanted = True
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TarWriter:
        try:
            if isinstance(self.path, RemotePath):
                self._temporary = self._stack.enter_context(work_folder()) / self.path.name
            else:
                self._temporary = temporary_beside(self.path)
                self._temporary.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "w+b")
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample; its members are stored in the order of their names."""
        try:
            for name in sorted(members):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size, info.mode, info.mtime = len(members[name]), _MODE, 0
                self._tar.addfile(info, io.BytesIO(members[name]))
        except OSError as error:
            raise storage_error(self.path, error) from error
        self.count += 1

    def seal(self) -> None:
        """Put the end down: from now on ``sha256`` and ``size`` are known, and nothing can be added."""
        if self.sha256:
            return
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._file.seek(0)
        self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self.size = self._file.tell()

    def discard(self) -> None:
        """Leave what is at ``path`` as it is when the block ends."""
        self._wanted = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._wanted:
                self.seal()
                if isinstance(self.path, RemotePath):
                    self.path.upload(self._temporary)
                else:
                    self._temporary.replace(self.path)
        except OSError as failed:
            raise storage_error(self.path, failed) from failed
        finally:
            try:
                self._file.close()
            except OSError as failed:  # a full disk shows again when the buffer is flushed
                if kind is None:
                    raise storage_error(self.path, failed) from failed
            finally:
                with contextlib.suppress(OSError), self._stack:  # the earlier error is more informative
                    self._temporary.unlink(missing_ok=True)


def index_tar(path: Path) -> TarIndex:
    """The samples of a tar in order: key, and where each member lies. Reads headers only.

    Raises:
        MissingArtifact, CorruptFile: as for :func:`iter_samples`; or a key stands in it twice.
    """
    found, last = Indexing(), ""
    for key, members in iter_samples(path):
        try:
            found.add(key, members)
        except ValueError as error:
            raise _corrupt(path, last, str(error)) from None
        last = key
    return found.done()


def iter_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """What :func:`index_tar` finds, sample by sample; none is held, so that a key stands in it twice is not seen.

    Links, folders and devices are passed over: nothing is ever unpacked. So are files that belong to no sample: those
    whose names begin with a dot (``._0.jpg``, which macOS puts beside ``0.jpg``) or have none (``LICENSE``). That is
    webdataset's rule, but that a dot file in a folder is a sample there. Names are kept within bounds all the same,
    because a key may come to name a file: no way up, no control characters.

    Raises:
        MissingArtifact: there is no such file.
        CorruptFile: it is no tar, it is cut off, or a name in it is refused; names the last key that was read.
        StorageError: the system does not let it be read, which says nothing of its content.
    """
    last, members = "", dict[str, Member]()
    try:
        with open_here(path) as file:
            for file_name, start, length in iter_files(file):
                key, name = _key_and_name(file_name)
                if not name:
                    continue
                if key != last:
                    if members:
                        yield last, members
                    last, members = key, {}
                if name in members:
                    raise ValueError(f"sample {key} has two members {name!r}")
                members[name] = Member(start, length)
    except FileNotFoundError:
        raise MissingArtifact(f"there is no file {path}") from None
    except OSError as error:
        raise (unreadable(path, error) if is_of_system(error) else _corrupt(path, last, one_line(error))) from None
    except (tarfile.TarError, ValueError, OverflowError, LookupError, EOFError, RecursionError) as error:
        raise _corrupt(path, last, one_line(error)) from None
    if members:
        yield last, members


def _key_and_name(path: str) -> tuple[str, str]:
    """The key of a file's sample, and what the file is called in it: "" where it belongs to no sample."""
    folder, _, base = path.rpartition("/")
    stem, dot, name = base.partition(".")
    path.encode()  # bytes that are no UTF-8 cannot be written again
    if path.startswith("/") or _CONTROL.search(path) or (".." in path and ".." in path.split("/")):
        raise ValueError(f"{path[:200]!r} cannot be the name of a file: it leads out, or has control characters")
    return f"{folder}/{stem}" if folder else stem, name.lower() if stem and dot else ""


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes of one member of an open tar.

    Raises:
        ValueError: the member is larger than anything that synthgen reads whole.
    """
    if member.size > MAX_BYTES:
        raise ValueError(f"a member has {member.size:,} bytes; {MAX_BYTES:,} are the most")
    file.seek(member.offset)
    return file.read(member.size)


def read_tar(
    path: Path, names: Collection[str] | None = None, keys: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in order: key, and each member's bytes.

    With ``names`` only those members, with ``keys`` only those samples; other bytes are not read.

    Raises:
        MissingArtifact, CorruptFile: as for :func:`index_tar`; or a member is too large.
    """
    samples = index_tar(path)
    with open_here(path) as file:
        for number in range(len(samples)):
            if keys is not None and samples.key(number) not in keys:
                continue
            key, members = samples[number]
            try:
                wanted = {name: member for name, member in members.items() if names is None or name in names}
                values = {name: read_member(file, member) for name, member in wanted.items()}
            except OSError as error:
                raise unreadable(path, error) from None
            except ValueError as error:
                raise _corrupt(path, samples.key(number - 1) if number else "", str(error)) from None
            yield key, values


def _corrupt(path: Path, last: str, why: str) -> CorruptFile:
    so_far = f"the last key read is {last}" if last else "no key could be read"
    return CorruptFile(f"{path} cannot be read: {why}; {so_far}; {remedy(path)}")
