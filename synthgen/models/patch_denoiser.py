"""A decoder that denoises each patch by itself, used in pretraining only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synthgen.models.layers import Block, TimeEmbedding, initialize
from synthgen.models.linear import Linear
from synthgen.models.vit import VisionTransformer

__all__ = ["PatchDenoiser"]

MAX_SEQUENCES = 2**15  # in one call: CUDA's attention kernels take fewer than 2^16


class PatchDenoiser(nn.Module):
    """Clean patches, each from its noised copy and its context vector (DARL: one transformer block).

    A noised patch and its context are a sequence of two tokens, so that no patch attends to another's noised copy. Only
    the patch's token is an output. With ``condition_on_gamma`` its gamma is an input too, in steps of 1/1000.
    """

    def __init__(self, encoder: VisionTransformer, *, condition_on_gamma: bool) -> None:
        super().__init__()
        dim, size = encoder.config.dim, 3 * encoder.config.patch_size**2
        self.context = Linear(dim, dim)
        self.embed = Linear(size, dim)
        self.block = Block(dim, encoder.config.num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = Linear(dim, size)
        self.apply(initialize)
        self.level = TimeEmbedding(dim) if condition_on_gamma else None

    def forward(
        self, noised: Float[Tensor, "b n p"], context: Float[Tensor, "b n d"], gamma: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b n p"]:
        """The clean patches; ``gamma`` is the signal's share of each noised patch's power, in [0, 1]."""
        own = self.embed(noised)
        if self.level is not None:
            own = own + self.level((1000 * gamma).round().long().flatten()).view_as(own)
        pairs = torch.stack([self.context(context), own], dim=2).flatten(0, 1)  # (b n) 2 d
        denoised = [self.block(part, queries=slice(1, None)) for part in torch.split(pairs, MAX_SEQUENCES)]
        pixels: Tensor = self.predict(self.norm(torch.cat(denoised)))
        return pixels.view_as(noised)
