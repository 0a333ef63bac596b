"""The samples of a tar one after another, where an index of all of them would take too long, or too much memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tarfile import BLOCKSIZE

from synthgen.stores import open_here
from synthgen.stores.tar import Member, index_tar

__all__ = ["iter_samples"]

_MOST_SPOKEN = 2**16  # bytes of a PAX header that is looked into
_RENAMING = (b" path=", b" size=", b" GNU.sparse", b" hdrcharset=")  # PAX records that change what a header says


class _NotPlain(Exception):
    """A header that only :func:`index_tar` can judge."""


def iter_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """What :func:`~synthgen.stores.tar.index_tar` finds, sample by sample: headers are read, and none is held.

    Plain headers are read here, at a few microseconds each. From the first that is anything else on (long names,
    damage) the tar is left to ``index_tar``. That a key stands in it twice is not seen.

    Raises:
        MissingArtifact, CorruptShard: as there.
    """
    given = 0
    try:
        for sample in _plain(path):
            yield sample
            given += 1
    except (_NotPlain, OSError, ValueError):
        yield from islice(index_tar(path), given, None)


def _plain(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    with open_here(path) as file:
        number, size, place = file.fileno(), os.fstat(file.fileno()).st_size, 0
        if hasattr(os, "posix_fadvise"):  # what lies between the headers need not be read
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
        key, members = "", dict[str, Member]()
        while any(header := os.pread(number, BLOCKSIZE, place)):
            kind, start, length = header[156:157], place + BLOCKSIZE, _length(header)
            place = start + -(-length // BLOCKSIZE) * BLOCKSIZE
            if place > size:
                raise _NotPlain
            if kind in (b"x", b"g"):
                _see_that_it_renames_nothing(os.pread(number, _MOST_SPOKEN + 1, start)[:length])
            elif kind in (b"0", b"\0"):
                named = _key_and_name(header)
                if named is None:
                    continue
                own, name = named
                if own != key and members:
                    yield key, members
                    members = {}
                if name in members:
                    raise _NotPlain
                key, members[name] = own, Member(start, length)
            elif kind != b"5":
                raise _NotPlain
        if len(header) < BLOCKSIZE or size % BLOCKSIZE:
            raise _NotPlain
        if members:
            yield key, members


def _length(header: bytes) -> int:
    """The bytes of a member."""
    if len(header) < BLOCKSIZE or header[257:262] != b"ustar":
        raise _NotPlain
    return int(header[124:136].strip(b"\0 ") or b"0", 8)


def _see_that_it_renames_nothing(records: bytes) -> None:
    if len(records) > _MOST_SPOKEN or any(word in records for word in _RENAMING):
        raise _NotPlain


def _key_and_name(header: bytes) -> tuple[str, str] | None:
    """As in :mod:`synthgen.stores.tar`: None where the member belongs to no sample."""
    name = header[:100].partition(b"\0")[0].decode("ascii")
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{header[345:500].partition(bytes(1))[0].decode('ascii')}/{name}"
    if not name.isprintable() or name.startswith("/") or name.endswith("/") or ".." in name.split("/"):
        raise _NotPlain
    folder, _, base = name.rpartition("/")
    stem, dot, member = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem, member.lower()) if stem and dot else None
