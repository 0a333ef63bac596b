"""The interface of all datasets: samples by number, and their metadata without decoding an image."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch.utils.data import Dataset

from synthgen.errors import CorruptFile, one_line
from synthgen.image import UNDECODABLE
from synthgen.stores import remedy
from synthgen.stores._failures import is_system_error, unreadable

__all__ = ["IMAGES", "ImageDataset", "JoinedDataset", "NamedBox", "Sample", "locate", "sample_errors"]

IMAGES = ("jpg", "jpeg", "webp", "png")  # the first of these is a sample's image
NamedBox = tuple[str, float, float, float, float]  # name, left, top, width, height, in pixels of the stored image


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded row of a shard or folder."""

    key: str
    image: UInt8[np.ndarray, "H W 3"]
    label: str | None = None  # class name, or class number if there is no name
    text: str = ""
    words: tuple[str, ...] = ()
    label_map: UInt8[np.ndarray, "H W"] | None = None  # 0 background, k the k-th word; None without masks


class ImageDataset(Dataset[Sample], ABC):
    """Samples by number, and their metadata without decoding an image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of a sample; reads no file."""

    @abstractmethod
    def label(self, index: int) -> str | None:
        """The class of a sample; reads no pixels."""

    @abstractmethod
    def has_masks(self) -> bool:
        """Whether the first sample comes with masks."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample: none, one or several; reads no pixels."""
        return ()

    def words(self, index: int) -> tuple[str, ...]:
        """The words to mask, if they are listed with the caption; reads no pixels."""
        return ()

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """Boxes that are stored with a sample; reads no pixels."""
        return ()


class JoinedDataset(ImageDataset):
    """Several datasets one after another."""

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        part, row = self._locate(index)
        return part[row]

    def key(self, index: int) -> str:
        """The name of a sample in its part; two parts may contain the same name."""
        part, row = self._locate(index)
        return part.key(row)

    def label(self, index: int) -> str | None:
        """The class of a sample."""
        part, row = self._locate(index)
        return part.label(row)

    def has_masks(self) -> bool:
        """Whether every part has masks."""
        return all(part.has_masks() for part in self.parts)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample."""
        part, row = self._locate(index)
        return part.captions(row)

    def words(self, index: int) -> tuple[str, ...]:
        """The words to mask, if they are listed."""
        part, row = self._locate(index)
        return part.words(row)

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """Boxes that are stored with a sample."""
        part, row = self._locate(index)
        return part.boxes(row)

    def _locate(self, index: int) -> tuple[ImageDataset, int]:
        number, row = locate(self._ends, index)
        return self.parts[number], row


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part that holds a sample, and its number in that part; ``ends`` are the cumulative lengths of the parts.

    Raises:
        IndexError: there is no such sample. A number below 0 counts from the end, as in a list.
    """
    total = ends[-1] if ends else 0
    row = index + total if index < 0 else index
    if not 0 <= row < total:
        raise IndexError(f"there is no sample {index} among {total}")
    part = bisect.bisect_right(ends, row)
    return part, row - (ends[part - 1] if part else 0)


@contextmanager
def sample_errors(path: Path, key: str, *also: type[Exception]) -> Iterator[None]:
    """Raise errors of the block with the name of the sample.

    Raises:
        CorruptFile: the sample cannot be decoded, or decoding raised one of ``also``.
        StorageError: the system cannot read the file, which does not mean that its content is damaged.
    """
    kinds: tuple[type[Exception], ...] = (*UNDECODABLE, *also)
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and is_system_error(error):
            raise unreadable(path, error) from None
        raise CorruptFile(f"sample {key} of {path} cannot be read: {one_line(error)}", remedy(path)) from None
