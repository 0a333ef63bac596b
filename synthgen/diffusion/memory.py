"""As many images at once as a device has memory for: found by halving, and remembered."""

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

_SAID = ("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells of too little memory on a device; what is not PyTorch's own allocator says so in words."""
    told = isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
    return told or isinstance(error, torch.OutOfMemoryError)


class AdaptiveBatches:
    """How many images a model's device has memory for at once, for each kind of work."""

    def __init__(self) -> None:
        self.fits: dict[str, int] = {}  # kinds of work that memory ran out in, and how many images were tried next
        self._warned = False

    def work(
        self, what: str, count: int, compute: Callable[[slice], T], put_back: Callable[[], None], most: int
    ) -> list[T]:
        """What ``compute`` makes of ``count`` images, a portion at a time, in their order.

        A portion is ``most`` images, or half as many again and again until memory suffices; later calls begin there.
        The first time the log has a warning.

        Args:
            what: the kind of work, as in "16 images of 64 x 64 pixels".
            count: images in all.
            compute: makes something of those with these numbers.
            put_back: makes the model whole again; called after every failure, of whatever kind.
            most: images at once, 1 or more.

        Raises:
            SynthgenError: there is too little memory for one image.
        """
        made, start, first = list[T](), 0, 0
        while start < count:
            few = min(most, self.fits.get(what, most), count - start)
            try:
                made.append(compute(slice(start, start + few)))
            except BaseException as error:
                if not is_out_of_memory(error):
                    with suppress(Exception):  # on a broken device that fails too, and says less
                        put_back()
                    raise
            else:
                start += few
                if first and not self._warned:
                    logger.warning("too little memory for %d %s at once; from now on %d at a time", first, what, few)
                    self._warned = True
                continue
            put_back()  # outside the handler, where nothing holds the tensors of the failed call any more
            if few == 1:
                raise SynthgenError(TOO_LITTLE)
            self.fits[what], first = few // 2, first or few
        return made
