"""AdamW with MAE's betas and weight decay groups, and its learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["OptimSettings", "build_optimizer", "learning_rate"]


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Settings of the optimizer and the learning rate."""

    base_learning_rate: float  # for 256 images per step; the peak is this times batch_size / 256
    batch_size: int
    warmup_ratio: float  # share of all steps during which the rate rises from 0
    weight_decay: float  # of matrices; biases, norms and tokens have none
    max_norm: float  # gradient clipping norm; 0: no clipping
    beta2: float = 0.95  # of AdamW, MAE's value; beta1 is 0.9

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.base_learning_rate * self.batch_size / 256


def build_optimizer(module: nn.Module, settings: OptimSettings, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; ``fused`` updates each tensor in one kernel instead of a dozen."""
    learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = {name for name, p in learning if p.ndim <= 1 or name.endswith("_token")}
    groups = [
        {"params": [p for name, p in learning if name not in plain], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in learning if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak, betas=(0.9, settings.beta2), fused=fused or None)


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, then half a cosine down to 0."""
    warmup = settings.warmup_ratio * steps
    if step < warmup:
        return settings.peak * (step + 1) / (warmup + 1)
    return settings.peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
