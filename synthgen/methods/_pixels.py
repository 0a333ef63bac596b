"""Common parts of methods that predict pixels: the decoder's size, its target, and the way back to images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from synthgen.models.decoder import PixelDecoder
from synthgen.models.vit import EncoderConfig, VisionTransformer

__all__ = ["decoder_size", "pixel_decoder", "pixel_range", "pixel_target", "to_pixels"]


def decoder_size(config: EncoderConfig, dim: int, depth: int) -> dict[str, int]:
    """The width and depth of a decoder, where 0 stands for MAE's, adapted to smaller encoders.

    The width is 512 but at most the encoder's, rounded down to a multiple of 32. The depth is 8 for encoders of 12
    blocks or more, and half the encoder's otherwise.
    """
    return {
        "dim": dim or max(32, min(512, config.dim) // 32 * 32),
        "depth": depth or (8 if config.depth >= 12 else max(1, config.depth // 2)),
    }


def pixel_decoder(encoder: VisionTransformer, dim: int, depth: int) -> PixelDecoder:
    """MAE's decoder; see :func:`decoder_size`."""
    return PixelDecoder(encoder, **decoder_size(encoder.config, dim, depth))


def pixel_target(patches: Float[Tensor, "b h p"], *, norm: bool) -> Float[Tensor, "b h p"]:
    """The patches; with ``norm`` each is standardised (MAE's code: unbiased variance plus 1e-6)."""
    if not norm:
        return patches
    size = patches.shape[2]
    unbiased = 1 - 1 / size  # layer_norm uses the biased variance
    return F.layer_norm(patches, (size,), patches.new_full((size,), unbiased**0.5), eps=1e-6 * unbiased)


def pixel_range(config: EncoderConfig, device: torch.device) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """The range of each value of a normalised patch: what pixels of 0 and of 1 become."""
    mean, std = (torch.tensor(value, device=device) for value in (config.mean, config.std))
    low, high = (((bound - mean) / std).repeat(config.patch_size**2) for bound in (0.0, 1.0))  # channels come last
    return low, high


def to_pixels(images: Float[Tensor, "b 3 H W"], config: EncoderConfig) -> Float[Tensor, "b 3 H W"]:
    """Normalised images as pixels, clamped to [0, 1]."""
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (config.mean, config.std))
    return (images * std + mean).clamp(0, 1)
