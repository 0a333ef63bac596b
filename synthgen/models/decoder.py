"""Decoders of masked methods: used in pretraining, thrown away after it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.models.layers import Block, initialize, sincos_positions
from synthgen.models.vit import VisionTransformer

__all__ = ["PixelDecoder"]


class PixelDecoder(nn.Module):
    """Pixels of hidden patches from the features of visible ones (MAE, section 3; 512 wide and 8 deep there).

    One learned token stands in for every hidden patch; positions tell them apart. As attention does not care for the
    order of tokens, hidden tokens are put behind the visible ones instead of between them, and only they reach the
    last layer: the same numbers as un-shuffling everything, for less work.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, dim: int, depth: int) -> None:
        super().__init__()
        if dim % 32:
            raise ValueError(f"decoder_dim must be a multiple of 32 (the width of a head), not {dim}")
        config = encoder.config
        self.embed = nn.Linear(config.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, dim // 32) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, 3 * config.patch_size**2)
        self.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, features: Float[Tensor, "b t d"], visible: Int[Tensor, "b v"], hidden: Int[Tensor, "b h"]
    ) -> Float[Tensor, "b h p"]:
        """What the hidden patches look like, in the order of ``hidden``; the first feature is the class token's."""
        places = self.positions[0, 1:]
        seen: Tensor = self.embed(features)
        cls, patches = seen[:, :1], seen[:, 1:] + places[visible]
        x = torch.cat([cls, patches, (self.mask_token + places[hidden]).to(patches.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        pixels: Tensor = self.predict(self.norm(x[:, -hidden.shape[1] :]))
        return pixels
