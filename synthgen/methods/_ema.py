"""Exponential moving averages (EMA) of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["update_ema", "update_teacher"]


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, steps: Tensor, ema_decay: float) -> None:
    """One step of the EMA of a training: average <- d average + (1 - d) module, d = min(ema_decay, (1 + n) / (10 + n)).

    n is the number of steps with this one; ``steps`` holds it and is incremented in place.
    """
    steps += 1
    rate = 1 - ((1 + steps) / (10 + steps)).clamp(max=ema_decay)
    own = dict(module.named_parameters())
    for name, slow in average.named_parameters():
        slow.lerp_(own[name], rate)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, progress: float) -> None:
    """One step of a teacher: t <- m t + (1 - m) s, with m from ``momentum`` to 1 by half a cosine (MoCo v3)."""
    rate = (1 - momentum) * (1 + math.cos(math.pi * progress)) / 2
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, rate)
