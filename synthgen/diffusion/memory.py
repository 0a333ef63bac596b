"""Find the largest batch that fits into a device's memory by halving, and remember it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from synthgen.errors import SynthgenError

__all__ = ["TOO_LITTLE", "AdaptiveBatches", "is_out_of_memory"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

TOO_LITTLE = (
    "the device has too little memory for one image; try dtype float16 or bfloat16, offload: true, or a smaller size"
)

_OOM_MESSAGES = ("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory; outside PyTorch's allocator only the message shows it."""
    by_message = isinstance(error, RuntimeError) and any(message in str(error) for message in _OOM_MESSAGES)
    return by_message or isinstance(error, torch.OutOfMemoryError)


class AdaptiveBatches:
    """The batch size that fits into the memory of a model's device, for each kind of work."""

    def __init__(self) -> None:
        self.fits: dict[str, int] = {}  # batch size to try next, by the kinds of work that ran out of memory
        self._warned = False

    def work(
        self, kind: str, count: int, compute: Callable[[slice], T], restore: Callable[[], None], most: int
    ) -> list[T]:
        """Call ``compute`` on ``count`` images batch by batch, and return its results in order.

        A batch has ``most`` images and is halved until memory suffices; later calls start with the size that worked.
        The first halving logs a warning.

        Args:
            kind: the kind of work, as in "16 images of 64 x 64 pixels".
            count: number of images.
            compute: processes the images of a slice.
            restore: restores the model; called after every failure of any kind.
            most: largest batch, 1 or more.

        Raises:
            SynthgenError: the device has too little memory for one image.
        """
        made, start, first = list[T](), 0, 0
        while start < count:
            few = min(most, self.fits.get(kind, most), count - start)
            try:
                made.append(compute(slice(start, start + few)))
            except BaseException as error:
                if not is_out_of_memory(error):
                    with suppress(Exception):  # fails as well on a broken device, with a less useful message
                        restore()
                    raise
            else:
                start += few
                if first and not self._warned:
                    logger.warning("too little memory for %d %s at once; from now on %d at a time", first, kind, few)
                    self._warned = True
                continue
            restore()  # outside the handler, where nothing references the tensors of the failed call any more
            if few == 1:
                raise SynthgenError(TOO_LITTLE)
            self.fits[kind], first = few // 2, first or few
        return made
