"""Errors of stores and disks: which are transient, which are permanent, and what to do about them."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.errors import StorageError, one_line

if TYPE_CHECKING:
    from synthgen.stores.remote import RemotePath

__all__ = [
    "describe_failure",
    "is_missing_bucket",
    "is_store_error",
    "is_system_error",
    "is_transient",
    "is_unreachable",
    "unreadable",
]

_PERMANENT = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_LOCAL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of this machine while it writes a copy
_WRONG_FILE = {errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR}  # not the system's fault
_CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "ftplib", "gcsfs", "google", "paramiko"}
_CLIENTS |= {"requests", "smbprotocol", "urllib3"}


def is_store_error(error: Exception) -> bool:
    """Whether an error comes from a store or the connection to it, rather than from a bug or this machine's disk."""
    if getattr(error, "errno", None) in _LOCAL_DISK:
        return False
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | EOFError) or bool(names & _CLIENTS)


def is_system_error(error: Exception) -> bool:
    """Whether reading failed for a reason other than the file's content: permissions, open files, a broken disk."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _WRONG_FILE


def unreadable(path: Path, error: OSError) -> StorageError:
    """The one-line error for a file that the system cannot read; its content may be sound."""
    if isinstance(error, PermissionError):
        remedy = "let this user read it (chmod, chown), then run the same command again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "too many files are open; raise the limit (ulimit -n), then run the same command again"
    else:
        remedy = "the disk or file system failed, but the content may be sound; run the same command again"
    return StorageError(f"{path} cannot be read: {error.strerror or one_line(error)}; {remedy}")


def is_missing_bucket(error: Exception) -> bool:
    """Whether the bucket is missing, and not only the object."""
    return bool(re.search(r"bucket does not exist|NoSuchBucket|container does not exist", str(error)))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    return not (
        isinstance(error, _PERMANENT) or is_missing_bucket(error) or _lacks_credentials(error) or _is_bad_request(error)
    )


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the connection was refused or the host is unknown, according to the error or its cause."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        if isinstance(error, socket.gaierror):
            return error.errno != socket.EAI_AGAIN  # which means that the name server failed, for now
        error = error.__cause__ or error.__context__
    return False


def describe_failure(error: Exception, place: RemotePath) -> StorageError:
    """The one-line error for a failed request: what is wrong, where, and what to do."""
    reason = one_line(error)
    if is_missing_bucket(error):
        return StorageError(f"there is no bucket {place.bucket!r} at {place.protocol}://; make it, or correct the name")
    if _lacks_credentials(error):
        return StorageError(
            f"there are no credentials for {place} ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or run: aws configure"
        )
    if isinstance(error, PermissionError):
        return StorageError(
            f"the store refuses {place} ({reason}); check that the credentials are right and allow reading and writing"
        )
    if _is_bad_request(error):
        return StorageError(
            f"the store rejects the request for {place} ({reason}); the credentials may have expired "
            "(AWS_SESSION_TOKEN), or the region (AWS_DEFAULT_REGION) or the clock of this machine may be wrong"
        )
    return StorageError(
        f"the store does not answer for {place} ({reason}); check that it can be reached (AWS_ENDPOINT_URL), "
        "then run the same command again: what is done stays done"
    )


def _is_bad_request(error: Exception) -> bool:
    """Whether the answer was 400 because of the credentials or the region; to a HEAD it has no body, so no reason.

    s3fs raises it as an OSError with EINVAL, like that of an incomplete body, which may be transient.
    """
    answer = getattr(error.__cause__, "response", None) or {}
    codes = {"AuthorizationHeaderMalformed", "InvalidToken", "TokenRefreshRequired"}
    permanent = answer.get("Error", {}).get("Code") in codes or "Bad Request" in str(error)
    return isinstance(error, OSError) and error.errno == errno.EINVAL and permanent


def _lacks_credentials(error: Exception) -> bool:
    return "Credential" in type(error).__name__ or type(error).__name__ == "DefaultCredentialsError"
