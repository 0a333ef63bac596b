"""A one-line error for loader processes that are killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from synthgen.errors import SynthgenError

__all__ = ["translate_loader_errors"]


@contextmanager
def translate_loader_errors() -> Iterator[None]:
    """Turn torch's errors about a killed loader process, with long tracebacks, into one line.

    Errors in reading samples are passed on by the process itself (see :class:`synthgen.loader.Reader`).

    Raises:
        SynthgenError: a loader process was killed.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if not isinstance(error, RuntimeError):  # a broken pipe: torch's signal handler raises its own error soon
            with suppress(RuntimeError):
                time.sleep(0.5)
        raise SynthgenError(
            f"a process that reads samples was lost ({' '.join(str(error).split()).rstrip('.')}), mostly for lack of "
            "memory; fewer num_workers need less; run the same command again: what is done stays done"
        ) from None
