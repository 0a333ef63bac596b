"""Random access to the samples of tars, on this machine or in a store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from synthgen.datasets.samples import locate
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.stores import read_range, uncached
from synthgen.stores.index import Member, TarIndex
from synthgen.stores.open_files import OpenFiles
from synthgen.stores.tar import index_tar, read_member
from synthgen.untrusted import MAX_BYTES

__all__ = ["Row", "Rows"]


class Row(NamedTuple):
    """A sample as described by the headers of its tar."""

    path: Path  # of the tar
    key: str
    members: dict[str, Member]


class Rows:
    """The samples of tars by number. The tars are indexed once; each process opens a file when it first needs it.

    Remote tars are copied into the local cache. If it cannot hold all of them, it holds the first ones, and samples of
    the others are requested one by one, so that reading in random order does not download tars again and again.

    Raises:
        MissingArtifact, CorruptFile: a tar is missing or cannot be read.
        ConfigError: a file is not a tar.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._uncached = uncached(paths)
        # indexing copies a tar: those to be kept in the cache come last
        indexes = {path: _index(path) for path in sorted(paths, key=lambda path: path not in self._uncached)}
        self._indexes = [indexes[path] for path in paths]
        self._ends = list(accumulate(map(len, self._indexes)))
        self._files = OpenFiles()
        self._last: tuple[Path, int, bytes] | None = None  # the last uncached sample: its tar, offset and bytes

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __getitem__(self, index: int) -> Row:
        tar, number = locate(self._ends, index)
        return Row(self._paths[tar], *self._indexes[tar][number])

    def key(self, index: int) -> str:
        """The key of a sample."""
        tar, number = locate(self._ends, index)
        return self._indexes[tar].key(number)

    def read(self, row: Row, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            OSError, ValueError: they cannot be read, or are too many.
            StorageError: the store does not answer.
        """
        member = row.members[name]
        if row.path not in self._uncached:
            return read_member(self._files[row.path], member)
        start, data = self._read_sample(row)
        return data[member.offset - start : member.offset - start + member.size]

    def _read_sample(self, row: Row) -> tuple[int, bytes]:
        """The offset and bytes of a whole sample by one request, since its other members are mostly read next."""
        start = min(member.offset for member in row.members.values())
        if self._last is None or self._last[:2] != (row.path, start):
            end = max(member.offset + member.size for member in row.members.values())
            if end - start > MAX_BYTES:
                raise ValueError(f"it has {end - start:,} bytes; {MAX_BYTES:,} are the most")
            self._last = row.path, start, read_range(row.path, start, end)
        return start, self._last[2]


#: The tars that this process has indexed: size and modification time, and the index.
_known: dict[Path, tuple[tuple[int, int], TarIndex]] = {}


def _index(path: Path) -> TarIndex:
    if path.suffix != ".tar":
        raise ConfigError(f"{path} is not a tar; give a tar, a pattern such as 'shards/*.tar', or a folder of images")
    if not path.is_file():
        raise MissingArtifact(f"there is no file {path}")
    status = path.stat()
    state = status.st_size, status.st_mtime_ns
    known = _known.get(path)
    if known is None or known[0] != state:
        known = _known[path] = state, index_tar(path)
    return known[1]
