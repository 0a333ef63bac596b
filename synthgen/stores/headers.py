"""The headers of a tar, one after another: names of the files in it, and where their bytes are.

A plain header, as the writers of training sets write them, is parsed here, in a fraction of the time that ``tarfile``
takes; ``tarfile`` continues at the first one that is anything else (a long name, a link, damage). Owners, modes and
times are ignored.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Generator, Iterator
from io import BufferedReader
from tarfile import BLOCKSIZE
from typing import Any

__all__ = ["iter_files"]

_RENAMING = (b" path=", b" size=", b" GNU.sparse", b" hdrcharset=")  # PAX records that change what a header says
_MAX_EXTENSION = 2**16  # bytes of a header that only extends the next one
_GZIP = b"\x1f\x8b"  # how a gzip file begins
_LONG_NUMBER = re.compile(rb"\d{256}")
#: Headers that only extend the next one: long names, and PAX records.
_EXTENSIONS = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}


def iter_files(file: BufferedReader) -> Iterator[tuple[str, int, int]]:
    """The files in an open tar in order: name, offset of the content, and size. Reads headers only.

    Links, folders and devices are skipped.

    Raises:
        ValueError, OverflowError, RecursionError, LookupError, OSError, tarfile.TarError: it is no tar, or damaged.
    """
    if file.read(len(_GZIP)) == _GZIP:
        raise ValueError("it is compressed, and must be decompressed first, as by gunzip")
    size, place = os.fstat(file.fileno()).st_size, 0
    if hasattr(os, "posix_fadvise"):  # what lies between the headers need not be read ahead
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    first_header = 0  # where the headers of the next file begin; all but the last of them only extend it
    while (header := _parse_plain(file, place)) is not None:
        name, start, length = header
        place = _next_header(start, length)
        if name is None:
            continue
        if start + length > size:
            raise ValueError("it is cut off")
        if name:
            yield name, start, length
        first_header = place
    file.seek(first_header)
    end = first_header
    if first_header == 0 or any(file.read(BLOCKSIZE)):
        end = yield from _iter_with_tarfile(file, first_header, size)
    file.seek(end)  # a complete tar ends with blocks of zeros; tarfile also stops at a damaged header
    if size % BLOCKSIZE or any(block := file.read(BLOCKSIZE)) or not block:
        raise ValueError("it is cut off, or a header in it is damaged")


def _next_header(start: int, length: int) -> int:
    return start + -(-length // BLOCKSIZE) * BLOCKSIZE


def _parse_plain(file: BufferedReader, place: int) -> tuple[str | None, int, int] | None:
    """A file's name, offset and size from a plain header; None if the header is not plain.

    The name is "" for a folder, and None if the header extends the next one without changing its name or size.
    """
    file.seek(place)
    header = file.read(BLOCKSIZE)
    if header[257:262] != b"ustar" or len(header) < BLOCKSIZE:
        return None
    name: str | None
    try:
        length, kind = _octal(header[124:136]), header[156:157]
        if length < 0 or _octal(header[148:156]) != 256 + sum(header) - sum(header[148:156]):
            return None
        name = header[:100].partition(b"\0")[0].decode()
        if header[345]:
            name = f"{header[345:500].partition(bytes(1))[0].decode()}/{name}"
    except ValueError:
        return None
    start = place + BLOCKSIZE
    if kind in b"0\0":
        # the older GNU format has other fields where the beginning of a long name would be
        plain = bool(name) and not name.endswith("/") and (header[262] == 0 or not header[345])
    elif kind in b"xg":
        name, records = None, file.read(min(length, _MAX_EXTENSION + 1))
        plain = len(records) == length and not _is_hostile(records)
        plain = plain and not any(word in records for word in _RENAMING)
    else:
        name, plain = "", kind == b"5" and length == 0
    return (name, start, length) if plain else None


def _octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _iter_with_tarfile(file: BufferedReader, place: int, size: int) -> Generator[tuple[str, int, int], None, int]:
    """The files from ``place`` on; returns where they end."""
    file.seek(place)
    end = place
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
            if info.offset_data <= end:  # a header that points back would be read for ever
                raise ValueError("its members overlap")
            end = _next_header(info.offset_data, info.size)
            if info.isfile():
                if info.offset_data + info.size > size:
                    raise ValueError("it is cut off")
                yield info.name, info.offset_data, info.size
    return end


class _Header(tarfile.TarInfo):
    """A header whose sizes may be wrong on purpose."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        """Called by tarfile for each header, before anything of the member is read."""
        if self.size < 0:
            raise tarfile.ReadError("a member has a negative size")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("it holds a sparse file; write it without --sparse")
        if self.type in _EXTENSIONS:
            file: Any = archive.fileobj
            place = file.tell()
            data = file.read(min(self.size, _MAX_EXTENSION + 1))
            file.seek(place)
            if _is_hostile(data):
                raise tarfile.ReadError("a header in it is larger than any name")
        return super()._proc_member(archive)  # type: ignore[misc]


def _is_hostile(extension: bytes) -> bool:
    """Whether it is too long, or a regular expression of tarfile would take quadratic time on it."""
    return len(extension) > _MAX_EXTENSION or bool(_LONG_NUMBER.search(extension))
