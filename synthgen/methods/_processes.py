"""One step on several processes: each compares its own images with the images of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "longest", "own_rows", "share_of_mean", "world_size"]


def world_size() -> int:
    """The number of processes that share a step."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rows(count: int) -> slice:
    """The indices of this process's ``count`` rows in the result of :func:`gather`."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return slice(rank, rank + count * world_size(), world_size())


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of a single process; gradients flow back to each.

    :class:`~synthgen.loader.Order` assigns rows round-robin. Every process must have the same number of rows.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)  # type: ignore[no-untyped-call]


def longest(length: int, device: torch.device) -> int:
    """The maximum ``length`` of all processes."""
    if world_size() == 1:
        return length
    found = torch.tensor(length, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def share_of_mean(losses: Tensor, counts: Tensor) -> Tensor:
    """This process's term of the mean over the losses of all processes where ``counts``.

    The average of the processes' terms is that mean. Gradients are averaged over processes, so a plain mean would
    weight losses unequally where processes have different numbers of them.
    """
    total = gather(counts.sum()[None]).sum().clamp(min=1)
    return torch.where(counts, losses, 0.0).sum() * world_size() / total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        plain = rows.to(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
        parts = [torch.empty_like(plain) for _ in range(world_size())]
        dist.all_gather(parts, plain)
        return torch.stack(parts, dim=1).flatten(0, 1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[own_rows(len(gradient) // world_size())]
