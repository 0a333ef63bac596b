"""Checksums of files, since a damaged file may decode without an error."""

from __future__ import annotations

import hashlib
from pathlib import Path

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.stores import open_binary
from synthgen.stores._failures import is_system_error, unreadable

__all__ = ["sha256_of", "verify_sha256"]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        OSError, SynthgenError: there is no such file, or it cannot be read.
    """
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_sha256(path: Path, sha256: str, again: str) -> None:
    """Check that a file has the sha256 that was recorded when it was written; ``again`` is the command that makes it.

    Raises:
        MissingArtifact: there is no such file.
        CorruptFile: the sha256 differs, or the path is not a file.
        StorageError: the system cannot read the file, which does not mean that its content is damaged.
    """
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        raise MissingArtifact(f"there is no file {path}; run: {again}") from None
    except OSError as error:
        if is_system_error(error):
            raise unreadable(path, error) from None
        raise CorruptFile(f"{path} cannot be read: {error.strerror or error}; delete it and run: {again}") from None
    if found != sha256:
        raise CorruptFile(
            f"{path} is cut off, or a byte of it is wrong: it has another sha256 than when it was written",
            f"delete it and run: {again}",
            path=path,
        )
