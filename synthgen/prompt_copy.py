"""A run's own copy of its prompts: written line by line and read in blocks of lines, so that it may have any size.

``prompts.jsonl`` has a prompt per line, templates applied. ``prompts.json`` beside it is written last, as its done
mark: count, bytes, sha256, and the byte at which each block of ``every`` lines begins. A worker reads the mark and then
only the blocks that its units need; from a store only these byte ranges are requested.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from synthgen import codecs
from synthgen.errors import CorruptFile, MissingArtifact, PromptError, StaleArtifact
from synthgen.records import Prompt
from synthgen.stores import open_binary, read_range
from synthgen.stores.checksum import sha256_of
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import write_chunks, write_json
from synthgen.untrusted import MAX_BYTES, read_file, read_json

__all__ = ["Content", "PromptCopy", "check_copy", "content_of", "ensure_copy", "iter_lines", "open_copy"]

_BLOCK_LINES = 256  # lines per block; a block is read at once
_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Content:
    """The contents of the done mark of a copy."""

    count: int  # prompts
    bytes: int
    sha256: str
    every: int  # prompts per block; the last may have fewer
    blocks: tuple[int, ...]  # the byte at which each block begins


def content_of(prompts: Iterable[Prompt]) -> Content:
    """The mark that a copy of ``prompts`` would have; writes nothing and keeps at most one block in memory."""
    lines = _Lines(prompts)
    for _ in lines:
        pass
    return lines.content()


def ensure_copy(folder: Path, prompts: Iterable[Prompt], content: Content) -> None:
    """Write the copy of ``prompts`` into a run's folder, unless it is there and complete.

    Raises:
        PromptError: the prompts do not match ``content``.
        StorageError: the copy cannot be written.
    """
    path, mark = _paths(folder)
    before = _read_mark(mark)
    if before == content and _is_complete(path, content):
        return
    if before is not None and before != content:  # a mark of other prompts
        mark.unlink(missing_ok=True)
    write_chunks(path, _lines_of(prompts, content))
    write_json(mark, asdict(content))


def check_copy(folder: Path, sha256: str) -> None:
    """Check that the copy in a run's folder exists, is complete, and has this sha256.

    Raises:
        MissingArtifact, StaleArtifact: as for :func:`open_copy`.
        CorruptFile: the copy is missing, truncated, or a byte of it is wrong.
    """
    copy = _open(folder, sha256)
    if not _is_complete(copy.path, copy.content):
        raise CorruptFile(f"{copy.path} is missing, cut off, or a byte of it is wrong; {_remedy(folder)}")


@lru_cache(maxsize=4)
def open_copy(folder: Path, sha256: str) -> PromptCopy:
    """Open the copy with this sha256 in a run's folder, once in each process.

    Raises:
        MissingArtifact: there is no copy, or it is not finished.
        StaleArtifact: the copy has other prompts.
    """
    return _open(folder, sha256)


def _open(folder: Path, sha256: str) -> PromptCopy:
    """As :func:`open_copy`, from the current mark."""
    path, mark = _paths(folder)
    content = _read_mark(mark)
    if content is None:
        raise MissingArtifact(f"{path} is not finished; {_remedy(folder)}")
    if content.sha256 != sha256:
        raise StaleArtifact(f"{path} has been given other prompts; choose another --run folder")
    return PromptCopy(path, content)


class PromptCopy:
    """Prompts by number; one block of lines is cached, so reading in order reads each block once."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content
        self._ends = (*content.blocks[1:], content.bytes)
        self._number = -1  # of the cached block
        self._lines: list[bytes] = []

    def __len__(self) -> int:
        return self.content.count

    def __getitem__(self, index: int, /) -> Prompt:
        """The prompt of one line.

        Raises:
            IndexError: there is no prompt with this number.
            CorruptFile: the copy is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no prompt {index}: there are {len(self)}")
        number, row = divmod(index, self.content.every)
        if number != self._number:
            self._lines = self._block(number)
            self._number = number
        try:
            return codecs.prompt_from_json(read_json(self._lines[row]))
        except (LookupError, ValueError, TypeError):
            self._number = -1  # read the block again next time: the copy may have been repaired
            raise self._corrupt(f"line {index + 1} cannot be read") from None

    def _block(self, number: int) -> list[bytes]:
        start, end = self.content.blocks[number], self._ends[number]
        try:
            return read_range(self.path, start, end).split(b"\n")
        except FileNotFoundError:
            raise self._corrupt("it is missing") from None
        except (OSError, EOFError) as error:
            raise self._corrupt(str(error)) from None

    def _corrupt(self, why: str) -> CorruptFile:
        return CorruptFile(f"{self.path}: {why}; {_remedy(self.path.parent)}")


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a copy, one after another.

    Raises:
        OSError, SynthgenError: the copy cannot be read.
    """
    with open_binary(path) as file:
        yield from (line for line in file if line.strip())


class _Lines:
    """Yields the lines of a copy, a block at a time, and collects the contents of its mark."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = iter(prompts)
        self._hash = hashlib.sha256()
        self._count = self._bytes = 0
        self._blocks: list[int] = []

    def __iter__(self) -> Iterator[bytes]:
        while lines := [_line(prompt) for prompt in islice(self._prompts, _BLOCK_LINES)]:
            block = b"".join(lines)
            self._blocks.append(self._bytes)
            self._count += len(lines)
            self._bytes += len(block)
            self._hash.update(block)
            yield block

    def content(self) -> Content:
        """The contents of the mark, once all lines have been yielded."""
        return Content(self._count, self._bytes, self._hash.hexdigest(), _BLOCK_LINES, tuple(self._blocks))


def _lines_of(prompts: Iterable[Prompt], content: Content) -> Iterator[bytes]:
    """The lines of a copy, a block at a time.

    Raises:
        PromptError: at the end, the lines did not match ``content``.
    """
    lines = _Lines(prompts)
    yield from lines
    if lines.content() != content:
        raise PromptError("the prompts were changed while they were read; run the same command again")


def _line(prompt: Prompt) -> bytes:
    return _ENCODER.encode(codecs.prompt_to_json(prompt)).encode() + b"\n"


def _remedy(folder: Path) -> str:
    return f"to write it anew, run: synthgen generate --prompts FILE --run {shlex.quote(str(folder))}"


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "prompts.jsonl", folder / "prompts.json"


def _read_mark(mark: Path) -> Content | None:
    """The contents of a mark, or None if it is missing or invalid."""
    try:
        return _validated(read_json(read_file(mark), most=MAX_BYTES))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _validated(value: Any) -> Content:
    """The contents of a mark, validated.

    Raises:
        ValueError, LookupError, TypeError: ``value`` is not a mark written by synthgen.
    """
    content = Content(value["count"], value["bytes"], value["sha256"], value["every"], tuple(value["blocks"]))
    numbers = (content.count, content.bytes, content.every, *content.blocks)
    edges = (*content.blocks, content.bytes)
    if (
        not all(type(number) is int for number in numbers)
        or not isinstance(content.sha256, str)
        or content.every < 1
        or len(content.blocks) != -(-content.count // content.every)
        or edges[0] != 0
        or not all(0 < end - start <= MAX_BYTES for start, end in pairwise(edges))
    ):
        raise ValueError("it is not a done mark of prompts")
    return content


def _is_complete(path: Path, content: Content) -> bool:
    """Whether the copy is complete, by length and sha256; in a store, which has its own checksums, by length only."""
    try:
        if path.stat().st_size != content.bytes:
            return False
        return isinstance(path, RemotePath) or sha256_of(path) == content.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False
