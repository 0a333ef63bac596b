"""The loader processes of a stage: what is said when one of them is killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from synthgen.errors import SynthgenError

__all__ = ["explaining_lost_workers"]


@contextmanager
def explaining_lost_workers() -> Iterator[None]:
    """Say in one line that a loader process was killed; torch says it in a traceback, wherever the stage may be.

    What such a process could not read it hands over itself (see :class:`synthgen.loader.Reader`).

    Raises:
        SynthgenError: one was.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError):
            if "DataLoader worker" not in str(error):
                raise
        else:  # the pipe is broken; what torch raises from the signal is on its way
            with suppress(RuntimeError):
                time.sleep(0.5)
        raise SynthgenError(
            f"a process that reads samples was lost ({' '.join(str(error).split()).rstrip('.')}), for want of memory "
            "mostly; fewer num_workers need less; run the same command again: what is done stays done"
        ) from None
