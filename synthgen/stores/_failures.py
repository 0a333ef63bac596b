"""What the failures of a store mean: which may pass, which are final, and what to do about them."""

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
    "explained",
    "is_of_store",
    "is_of_system",
    "may_pass",
    "nobody_is_there",
    "says_no_bucket",
    "unreadable",
]

_FINAL = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # this machine's, while it writes a copy
_OF_THE_FILE = {errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR}  # no fault of a disk
_CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "ftplib", "gcsfs", "google", "paramiko"}
_CLIENTS |= {"requests", "smbprotocol", "urllib3"}


def is_of_store(error: Exception) -> bool:
    """Whether an error comes from a store or the way to it, and is no mistake of ours nor of this machine's disk."""
    if getattr(error, "errno", None) in _OF_THE_DISK:
        return False
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | EOFError) or bool(names & _CLIENTS)


def is_of_system(error: Exception) -> bool:
    """Whether reading failed for a reason that says nothing of the file's content: no permission, no handle, a disk."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE


def unreadable(path: Path, error: OSError) -> StorageError:
    """The one-line form of a read that the system refused; nothing is to be deleted for it."""
    if isinstance(error, PermissionError):
        remedy = "let this user read it (chmod, chown), then run the same command again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "too many files are open; raise the limit (ulimit -n), then run the same command again"
    else:
        remedy = "the disk or file system failed, which says nothing of the content; run the same command again"
    return StorageError(f"{path} cannot be read: {error.strerror or one_line(error)}; {remedy}")


def says_no_bucket(error: Exception) -> bool:
    """Whether the bucket is missing, and not only the object."""
    return bool(re.search(r"bucket does not exist|NoSuchBucket|container does not exist", str(error)))


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    return not (
        isinstance(error, _FINAL) or says_no_bucket(error) or _lacks_credentials(error) or _is_bad_request(error)
    )


def nobody_is_there(error: BaseException | None) -> bool:
    """Whether the connection was refused, or no host has that name: the client's error, or what it comes from."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        if isinstance(error, socket.gaierror):
            return error.errno != socket.EAI_AGAIN  # that one is of a name server that fails in passing
        error = error.__cause__ or error.__context__
    return False


def explained(error: Exception, place: RemotePath) -> StorageError:
    """What is wrong with a place, and what to do, in one line."""
    reason = one_line(error)
    if says_no_bucket(error):
        return StorageError(f"there is no bucket {place.bucket!r} at {place.protocol}://; make it, or correct the name")
    if _lacks_credentials(error):
        return StorageError(
            f"there are no credentials for {place} ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or write them down with: aws configure"
        )
    if isinstance(error, PermissionError):
        return StorageError(
            f"the store refuses {place} ({reason}); see that the credentials are right, and may read and write it"
        )
    if _is_bad_request(error):
        return StorageError(
            f"the store rejects the request for {place} ({reason}); the credentials may have expired "
            "(AWS_SESSION_TOKEN), or the region (AWS_DEFAULT_REGION) or the clock of this machine may be wrong"
        )
    return StorageError(
        f"the store does not answer for {place} ({reason}); see that it can be reached (AWS_ENDPOINT_URL), "
        "then run the same command again: what is done stays done"
    )


def _is_bad_request(error: Exception) -> bool:
    """Whether the answer was 400 for the credentials or the region; to a HEAD it has no body and so no reason.

    s3fs turns it into an OSError with EINVAL, as it does an incomplete body, which may be transient.
    """
    answer = getattr(error.__cause__, "response", None) or {}
    codes = {"AuthorizationHeaderMalformed", "InvalidToken", "TokenRefreshRequired"}
    final = answer.get("Error", {}).get("Code") in codes or "Bad Request" in str(error)
    return isinstance(error, OSError) and error.errno == errno.EINVAL and final


def _lacks_credentials(error: Exception) -> bool:
    return "Credential" in type(error).__name__ or type(error).__name__ == "DefaultCredentialsError"
