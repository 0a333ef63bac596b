"""Turn samples into batches: a resumable order, random views, collation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from synthgen.datasets import ImageDataset, Sample
from synthgen.devices import num_cores
from synthgen.errors import SynthgenError

__all__ = ["Batch", "Order", "Reader", "collate", "loader", "prefetch", "workers_for"]

_SEEDS = 2  # the random stream of a sample's seed; streams 0 and 1 are for its views

View = Callable[[Sample, np.random.Generator], Sample]

Row = TypeVar("Row")
Rows = TypeVar("Rows")


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of samples."""

    images: Float[Tensor, "b 3 H W"]  # normalised with the encoder's mean and standard deviation
    masks: Bool[Tensor, "b k H W"]  # padded with empty masks to the largest number of words in the batch
    present: Bool[Tensor, "b k"]  # whether there is a k-th word with at least one pixel
    seeds: Int[Tensor, " b"]  # seed of all random draws for a sample: see synthgen.models.draws
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    labels: tuple[str | None, ...]
    second: Batch | None = None  # the same samples in another view, for methods that compare two

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        values: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)
            for name, value in self._tensors().items()
        }
        return replace(self, **values)

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, for asynchronous copies to a GPU; DataLoader calls it by this name."""
        values: dict[str, Any] = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **values)

    def _tensors(self) -> dict[str, Tensor | Batch]:
        """The tensors by field name; the second view as a batch."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | Batch)}


@dataclass(frozen=True, kw_only=True)
class Order:
    """The samples of each step: a new permutation every epoch, a function of seed and epoch alone.

    Iterating gives, for each step from ``start`` on, the (epoch, sample number) of this process's samples. The last
    samples of an epoch are dropped if they do not fill a batch. With ``limit`` the last epoch may end early.
    """

    length: int  # samples in the dataset
    batch_size: int  # samples per step, over all processes
    epochs: int
    seed: int
    start: int = 0  # steps already done
    rank: int = 0
    world_size: int = 1
    parts: int = 1  # batches per step and process (gradient accumulation)
    limit: int = 0  # most steps; 0: those of all epochs

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch."""
        return self.length // self.batch_size

    @property
    def steps(self) -> int:
        """Steps in all."""
        return min(self.steps_per_epoch * self.epochs, self.limit or sys.maxsize)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            first = step % self.steps_per_epoch * self.batch_size
            mine = order[first : first + self.batch_size][self.rank :: self.world_size]
            for part in np.split(mine, self.parts):
                yield [(epoch, int(index)) for index in part]


@dataclass(frozen=True, slots=True)
class _SeededViews:
    """One or two views of a sample, with its seed."""

    views: tuple[Sample, ...]
    seed: int


class _Views(Dataset[_SeededViews]):
    """Views of samples by (epoch, sample number); randomness depends on these and the seed only, not on workers."""

    def __init__(self, samples: ImageDataset, views: Sequence[View], seed: int) -> None:
        self.samples, self.views, self.seed = samples, views, seed

    def __getitem__(self, row: tuple[int, int]) -> _SeededViews:
        epoch, index = row
        sample, root = self.samples[index], [self.seed, epoch, index]
        views = [view(sample, np.random.default_rng([*root, number])) for number, view in enumerate(self.views)]
        own = np.random.SeedSequence([*root, _SEEDS]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        return _SeededViews(tuple(views), int(own))


def collate(
    samples: Sequence[Sample], mean: Sequence[float], std: Sequence[float], seeds: Sequence[int] | None = None
) -> Batch:
    """Stack samples of one size; pixels become (pixels / 255 - mean) / std, and seeds are 0, 1, ... by default."""
    pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).float()
    offset, scale = torch.tensor(mean) * 255, torch.tensor(std) * 255
    width = pixels.shape[2]
    pixels.view(-1, 3 * width).sub_(offset.repeat(width)).div_(scale.repeat(width))  # by rows: three numbers are slow
    images = pixels.permute(0, 3, 1, 2)  # channels last in memory, which suits patches
    with_masks = [len(sample.words) for sample in samples if sample.label_map is not None]
    masks = torch.zeros(len(samples), max(with_masks, default=0), *images.shape[2:], dtype=torch.bool)
    for row, sample in enumerate(samples):
        if sample.label_map is not None and sample.words:
            numbers = np.arange(1, len(sample.words) + 1)[:, None, None]  # numbers above 255 match no pixel
            masks[row, : len(sample.words)] = torch.from_numpy(sample.label_map[None] == numbers)
    return Batch(
        images,
        masks,
        masks.flatten(2).any(2),
        torch.tensor(range(len(samples)) if seeds is None else seeds, dtype=torch.long),
        tuple(sample.key for sample in samples),
        tuple(sample.text for sample in samples),
        tuple(sample.words for sample in samples),
        tuple(sample.label for sample in samples),
    )


@dataclass(frozen=True)
class _Collate:
    """:func:`collate` with fixed mean and std; a class so that it can be sent to workers."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, samples: list[_SeededViews]) -> Batch:
        seeds = [sample.seed for sample in samples]
        views = zip(*(sample.views for sample in samples), strict=True)
        first, *others = (collate(view, self.mean, self.std, seeds) for view in views)
        return replace(first, second=others[0]) if others else first


class Reader(DataLoader[Rows]):
    """A DataLoader that re-raises a :class:`SynthgenError` of its worker processes unchanged.

    Torch would raise an error whose message is the worker's traceback.
    """

    def __init__(
        self, rows: Dataset[Row], collate_fn: Callable[[list[Row]], Rows], *, num_workers: int = 0, **settings: Any
    ) -> None:
        super().__init__(
            _RowsOrErrors(rows),  # type: ignore[arg-type]
            collate_fn=_CollateOrError(collate_fn),
            num_workers=num_workers,
            **settings,
        )

    def __iter__(self) -> Iterator[Rows]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, SynthgenError):
                raise batch
            yield batch


class _RowsOrErrors(Dataset[Row | SynthgenError], Generic[Row]):
    """Rows, or the error of reading one."""

    def __init__(self, rows: Dataset[Row]) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Row | SynthgenError:
        try:
            return self.rows[index]
        except SynthgenError as error:
            return error

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _CollateOrError(Generic[Row, Rows]):
    """Collated rows, or the first error among them."""

    collate: Callable[[list[Row]], Rows]

    def __call__(self, rows: list[Row | SynthgenError]) -> Rows | SynthgenError:
        read: list[Row] = []
        for row in rows:
            if isinstance(row, SynthgenError):
                return row
            read.append(row)
        return self.collate(read)


def workers_for(setting: int) -> int:
    """The number of loader processes for ``num_workers``: -1 means none on two cores or fewer, else up to 8."""
    cores = num_cores()
    return setting if setting >= 0 else 0 if cores <= 2 else min(8, cores - 1)


def loader(
    samples: ImageDataset,
    order: Order | Sequence[list[tuple[int, int]]],
    view: View,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    second: View | None = None,
) -> Reader[Batch]:
    """Batches in ``order`` with one or two views of each sample; the same bytes for any ``num_workers``."""
    views = [view] if second is None else [view, second]
    return Reader(
        _Views(samples, views, seed),
        _Collate(mean, std),
        batch_sampler=order,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def prefetch(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, each prepared by a thread while the one before it is used.

    For a loader without worker processes; decoding, resizing and torch release the GIL.
    """
    iterator = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
        pending = thread.submit(next, iterator, None)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next, iterator, None)
            yield batch
