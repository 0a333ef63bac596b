"""Random numbers as functions of a sample's seed.

A method's random numbers for a sample are the same on every device, for any number of processes and any accumulation
of a step in parts, which generators with state cannot guarantee.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["normal", "uniform"]

# SplitMix64 (Steele, Lea and Flood, 2014): a constant step, then a mix of all bits. Arithmetic wraps at 64 bits.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def uniform(seeds: Int[Tensor, " b"], *shape: int, stream: int = 0) -> Float[Tensor, "b *shape"]:
    """Uniform numbers in [0, 1), multiples of 2^-24; each ``stream`` gives others for the same seeds."""
    return _bits(seeds, shape, stream, 24).float() * 2.0**-24


def normal(seeds: Int[Tensor, " b"], *shape: int, stream: int = 0) -> Float[Tensor, "b *shape"]:
    """Standard normal numbers, by the inverse of their distribution function; the largest magnitude is 5.3."""
    odd = 2 * _bits(seeds, shape, stream, 23) + 1  # never 0 or 2^24, where the inverse is infinite
    return math.sqrt(2) * torch.erfinv(odd.float() * 2.0**-23 - 1)


def _bits(seeds: Tensor, shape: tuple[int, ...], stream: int, count: int) -> Tensor:
    """The upper ``count`` bits of a hash of (seed, stream, index)."""
    key = _mix(seeds + (stream + 1) * _STEP % 2**63)
    indices = torch.arange(1, math.prod(shape) + 1, device=seeds.device)
    mixed = _mix(key[:, None] + indices * _STEP)
    return _shift(mixed, 64 - count).view(len(seeds), *shape)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's fills with the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)
