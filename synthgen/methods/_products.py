"""Cosine similarities in full precision, also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["products", "unit"]


def unit(vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """The vectors scaled to length 1, in float32."""
    return F.normalize(vectors.float(), dim=-1)


def products(ours: Float[Tensor, "*b n d"], theirs: Float[Tensor, "*b m d"]) -> Float[Tensor, "*b n m"]:
    """The dot product of each of ``ours`` with each of ``theirs``, in float32.

    Autocast would cast float32 inputs down too. The error of a cosine in bfloat16 is up to 0.0026, which a temperature
    of 0.01 raises to 0.26.
    """
    with torch.autocast(ours.device.type, enabled=False):
        return ours.float() @ theirs.float().mT
