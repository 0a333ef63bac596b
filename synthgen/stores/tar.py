"""Plain tars in the WebDataset convention: a sample is the run of members that share a key.

The same content gives the same bytes: fixed owner and mode, and an integer time of 0 (a float one would add a
PAX record of 1 KiB to every member). A tar appears whole or not at all: it is written under a temporary name,
flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from synthgen.errors import CorruptShard, MissingArtifact, StorageError

__all__ = ["Member", "TarWriter", "index_tar", "read_tar", "write_bytes", "write_json"]

_MODE = 0o444


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` at once: readers see the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full or the folder may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


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
        StorageError: the disk is full or the folder may not be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.size = 0
        self.sha256 = ""
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> TarWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.seek(0)
                self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
                self.size = self._file.tell()
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
                with contextlib.suppress(OSError):  # what went wrong before it says more
                    self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


def index_tar(path: Path) -> list[tuple[str, dict[str, Member]]]:
    """The samples of a tar in order: key, and where each member lies. Reads headers only.

    Raises:
        MissingArtifact: there is no such file.
        CorruptShard: it is no tar, or it is cut off; names the last key that is whole.
    """
    samples: list[tuple[str, dict[str, Member]]] = []
    try:
        size = path.stat().st_size
        end = 0
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, name = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if info.offset_data + info.size > size:
                    raise _corrupt(path, samples, "it is cut off")
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][name.lower()] = Member(info.offset_data, info.size)
    except FileNotFoundError:
        raise MissingArtifact(f"there is no file {path}") from None
    except tarfile.TarError as error:
        raise _corrupt(path, samples, str(error)) from None
    if size < end + tarfile.BLOCKSIZE or size % tarfile.BLOCKSIZE:  # a whole tar ends with a block of zeros
        raise _corrupt(path, samples, "it is cut off")
    return samples


def read_tar(
    path: Path, names: Collection[str] | None = None, keys: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in order: key, and each member's bytes.

    With ``names`` only those members, with ``keys`` only those samples; other bytes are not read.

    Raises:
        MissingArtifact, CorruptShard: as for :func:`index_tar`.
    """
    samples = index_tar(path)
    with open(path, "rb") as file:
        for key, members in samples:
            if keys is not None and key not in keys:
                continue
            values = {}
            for name, member in members.items():
                if names is None or name in names:
                    file.seek(member.offset)
                    values[name] = file.read(member.size)
            yield key, values


def _corrupt(path: Path, samples: list[tuple[str, dict[str, Member]]], why: str) -> CorruptShard:
    last = f"the last key read is {samples[-1][0]}" if samples else "no key could be read"
    return CorruptShard(f"{path} cannot be read: {why}; {last}; delete it and run the stage that made it again")
