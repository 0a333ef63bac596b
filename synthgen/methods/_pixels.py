"""What methods that say or draw pixels share: a decoder's size, what it should say, and the way back to images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from synthgen.models.decoder import PixelDecoder
from synthgen.models.vit import EncoderConfig, VisionTransformer

__all__ = ["pixel_decoder", "pixel_range", "pixel_target", "to_pixels"]


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


def pixel_range(config: EncoderConfig, device: torch.device) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """The least and the most that each number of a normalised patch can be."""
    mean, std = (torch.tensor(value, device=device) for value in (config.mean, config.std))
    low, high = (((bound - mean) / std).repeat(config.patch_size**2) for bound in (0.0, 1.0))  # channels come last
    return low, high


def to_pixels(images: Float[Tensor, "b 3 H W"], config: EncoderConfig) -> Float[Tensor, "b 3 H W"]:
    """Normalised images as pixels in [0, 1]; what lies outside is cut off."""
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (config.mean, config.std))
    return (images * std + mean).clamp(0, 1)
