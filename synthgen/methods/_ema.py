"""An exponential moving average (EMA) of the weights of a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["check_decay", "update_ema"]


def check_decay(ema_decay: float) -> float:
    """The decay, unchanged.

    Raises:
        ValueError: the decay does not lie between 0 and 1.
    """
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay must lie between 0 and 1, not {ema_decay}")
    return ema_decay


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, steps: Tensor, ema_decay: float) -> None:
    """One step of the EMA: average <- d average + (1 - d) module, with d = min(ema_decay, (1 + n) / (10 + n)).

    n is the number of steps with this one; ``steps`` holds it and is incremented in place.
    """
    steps += 1
    rate = 1 - ((1 + steps) / (10 + steps)).clamp(max=ema_decay)
    own = dict(module.named_parameters())
    for name, slow in average.named_parameters():
        slow.lerp_(own[name], rate)
