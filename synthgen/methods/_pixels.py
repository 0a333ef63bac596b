"""What methods that rebuild hidden pixels share: the decoder's size, and what it should say."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from synthgen.models.decoder import PixelDecoder
from synthgen.models.vit import VisionTransformer

__all__ = ["pixel_decoder", "pixel_target"]


def pixel_decoder(encoder: VisionTransformer, dim: int, depth: int) -> PixelDecoder:
    """MAE's decoder. A ``dim`` or ``depth`` of 0 is the paper's 512 or 8 for the sizes of the paper, and the encoder's
    width or half its depth for smaller ones.
    """
    config = encoder.config
    return PixelDecoder(
        encoder,
        dim=dim or max(32, min(512, config.dim) // 32 * 32),
        depth=depth or (8 if config.depth >= 12 else max(1, config.depth // 2)),
    )


def pixel_target(patches: Float[Tensor, "b h p"], *, norm: bool) -> Float[Tensor, "b h p"]:
    """The patches, with ``norm`` less their mean and over their deviation (MAE's code: unbiased variance plus 1e-6)."""
    if not norm:
        return patches
    size = patches.shape[2]
    unbiased = 1 - 1 / size  # a layer norm divides by the biased deviation
    return F.layer_norm(patches, (size,), patches.new_full((size,), unbiased**0.5), eps=1e-6 * unbiased)
