"""A run's own copy of its prompts: written line by line, read a block of lines at a time, so that any number will do.

``prompts.jsonl`` holds a prompt a line, templates applied. ``prompts.json`` beside it comes last and is its done mark:
count, bytes, sha256, and at which byte each block of ``every`` lines begins. A worker reads that, and then of the copy
no more than the blocks that its units show; of a copy in a store these bytes alone are asked for.
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
from synthgen.stores import open_here, read_range
from synthgen.stores.checksum import sha256_of
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import write_chunks, write_json
from synthgen.untrusted import MAX_BYTES, read_file, read_json

__all__ = ["Content", "PromptCopy", "check_copy", "content_of", "iter_lines", "keep_copy", "open_copy"]

_EVERY = 256  # lines of a block: what is read for one prompt
_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Content:
    """What a copy holds, without the prompts."""

    count: int  # prompts
    bytes: int
    sha256: str
    every: int  # prompts of a block; the last may have fewer
    blocks: tuple[int, ...]  # the byte at which each begins


def content_of(prompts: Iterable[Prompt]) -> Content:
    """What a copy of ``prompts`` would hold; none is written, and no more than a block of them held."""
    lines = _Lines(prompts)
    for _ in lines:
        pass
    return lines.content()


def keep_copy(folder: Path, prompts: Iterable[Prompt], content: Content) -> None:
    """Write the copy of ``prompts`` into a run's folder; nothing is done where it is there, and whole.

    Raises:
        PromptError: the prompts are not those of ``content``.
        StorageError: it cannot be written.
    """
    path, mark = _paths(folder)
    before = _marked(mark)
    if before == content and _is_whole(path, content):
        return
    if before is not None and before != content:  # it speaks of other prompts
        mark.unlink(missing_ok=True)
    write_chunks(path, _lines_of(prompts, content))
    write_json(mark, asdict(content))


def check_copy(folder: Path, sha256: str) -> None:
    """See that the copy in a run's folder is there, whole, and has this sha256.

    Raises:
        MissingArtifact, StaleArtifact: as for :func:`open_copy`.
        CorruptFile: it is cut off, or a byte of it is wrong.
    """
    copy = _found(folder, sha256)
    if not _is_whole(copy.path, copy.content):
        raise CorruptFile(f"{copy.path} is gone, cut off, or a byte of it is wrong; {_anew(folder)}")


@lru_cache(maxsize=4)
def open_copy(folder: Path, sha256: str) -> PromptCopy:
    """The copy in a run's folder that has this sha256; opened once in each process.

    Raises:
        MissingArtifact: there is none, or it is not finished.
        StaleArtifact: it is of other prompts.
    """
    return _found(folder, sha256)


def _found(folder: Path, sha256: str) -> PromptCopy:
    """As :func:`open_copy`, by what its mark says now."""
    path, mark = _paths(folder)
    content = _marked(mark)
    if content is None:
        raise MissingArtifact(f"{path} is not finished; {_anew(folder)}")
    if content.sha256 != sha256:
        raise StaleArtifact(f"{path} has been given other prompts; choose another --run folder")
    return PromptCopy(path, content)


class PromptCopy:
    """Prompts by their numbers. One block of lines is held at a time, so prompts in order cost one reading."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content
        self._ends = (*content.blocks[1:], content.bytes)
        self._number = -1  # of the block that is held
        self._lines: list[bytes] = []

    def __len__(self) -> int:
        return self.content.count

    def __getitem__(self, index: int, /) -> Prompt:
        """The prompt of one line.

        Raises:
            IndexError: there are not so many.
            CorruptFile: the copy is not as it was written.
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
            self._number = -1  # the copy may be mended
            raise self._corrupt(f"line {index + 1} cannot be read") from None

    def _block(self, number: int) -> list[bytes]:
        start, end = self.content.blocks[number], self._ends[number]
        try:
            return read_range(self.path, start, end).split(b"\n")
        except FileNotFoundError:
            raise self._corrupt("it is gone") from None
        except (OSError, EOFError) as error:
            raise self._corrupt(str(error)) from None

    def _corrupt(self, why: str) -> CorruptFile:
        return CorruptFile(f"{self.path}: {why}; {_anew(self.path.parent)}")


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a copy, one after another.

    Raises:
        OSError, SynthgenError: it cannot be read.
    """
    with open_here(path) as file:
        yield from (line for line in file if line.strip())


class _Lines:
    """The lines of a copy, a block at a time; knows what has passed."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = iter(prompts)
        self._hash = hashlib.sha256()
        self._count = self._bytes = 0
        self._blocks: list[int] = []

    def __iter__(self) -> Iterator[bytes]:
        while lines := [_line(prompt) for prompt in islice(self._prompts, _EVERY)]:
            block = b"".join(lines)
            self._blocks.append(self._bytes)
            self._count += len(lines)
            self._bytes += len(block)
            self._hash.update(block)
            yield block

    def content(self) -> Content:
        """What all of them were, once they have passed."""
        return Content(self._count, self._bytes, self._hash.hexdigest(), _EVERY, tuple(self._blocks))


def _lines_of(prompts: Iterable[Prompt], content: Content) -> Iterator[bytes]:
    """The lines of a copy, a block at a time.

    Raises:
        PromptError: at the end, if they were others than ``content`` says.
    """
    lines = _Lines(prompts)
    yield from lines
    if lines.content() != content:
        raise PromptError("the prompts were changed while they were read; run the same command again")


def _line(prompt: Prompt) -> bytes:
    return _ENCODER.encode(codecs.prompt_to_json(prompt)).encode() + b"\n"


def _anew(folder: Path) -> str:
    return f"to write it anew, run: synthgen generate --prompts FILE --run {shlex.quote(str(folder))}"


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "prompts.jsonl", folder / "prompts.json"


def _marked(mark: Path) -> Content | None:
    """What the mark says, or None where there is none, or none that can be."""
    try:
        return _checked(read_json(read_file(mark), most=MAX_BYTES))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _checked(value: Any) -> Content:
    """What a mark says, if it is one.

    Raises:
        ValueError, LookupError, TypeError: it is none of synthgen's.
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
        raise ValueError("it is no mark of prompts")
    return content


def _is_whole(path: Path, content: Content) -> bool:
    """Whether the copy has these bytes; that of a store, which has checksums of its own, is known by its length."""
    try:
        if path.stat().st_size != content.bytes:
            return False
        return isinstance(path, RemotePath) or sha256_of(path) == content.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False
