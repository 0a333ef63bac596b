"""The samples of tars by number, and the bytes of their members; the tars lie on this machine, or in a store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from synthgen.datasets.samples import place_in
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.stores import stays_remote
from synthgen.stores.index import Member, TarIndex
from synthgen.stores.open_files import OpenFiles
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import index_tar, read_member
from synthgen.untrusted import MAX_BYTES

__all__ = ["Row", "Rows"]


class Row(NamedTuple):
    """A sample as described by the headers of its tar."""

    path: Path  # of the tar
    key: str
    members: dict[str, Member]


class Rows:
    """The samples of tars by number. They are indexed once; each process opens a file when it first needs it.

    Tars in a store come into the local cache. Where it cannot hold all of them, it holds the first ones; samples of
    the others are asked for one by one, a request each, so that their order costs nothing.

    Raises:
        MissingArtifact, CorruptFile: a tar is not there, or cannot be read.
        ConfigError: a file is none.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._remote = stays_remote(paths)
        indexed = {path: _index(path) for path in sorted(paths, key=lambda path: path not in self._remote)}
        self._tars = [indexed[path] for path in paths]
        self._ends = list(accumulate(map(len, self._tars)))
        self._files = OpenFiles()
        self._cached: tuple[Path, int, bytes] | None = None  # a remote sample: its tar, where it begins, and its bytes

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __getitem__(self, index: int) -> Row:
        tar, number = place_in(self._ends, index)
        return Row(self._paths[tar], *self._tars[tar][number])

    def key(self, index: int) -> str:
        """The key of a sample."""
        tar, number = place_in(self._ends, index)
        return self._tars[tar].key(number)

    def read(self, row: Row, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            OSError, ValueError: they cannot be read, or are too many.
            StorageError: the store does not answer.
        """
        if row.path in self._remote:
            return self._read_remote(self._remote[row.path], row.members, name)
        return read_member(self._files[row.path], row.members[name])

    def _read_remote(self, path: RemotePath, members: dict[str, Member], name: str) -> bytes:
        """A member of a sample; all of the sample comes with it, because the others are mostly asked for next."""
        start = min(member.offset for member in members.values())
        if self._cached is None or self._cached[:2] != (path, start):
            end = max(member.offset + member.size for member in members.values())
            if end - start > MAX_BYTES:
                raise ValueError(f"it has {end - start:,} bytes; {MAX_BYTES:,} are the most")
            self._cached = path, start, path.read_range(start, end)
        offset = members[name].offset - start
        return self._cached[2][offset : offset + members[name].size]


#: The tars that this process has indexed, each as it was last: its size and time, and what stands in it.
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
