"""A decoder for denoising that is narrower than its encoder: used in pretraining, thrown away after it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.models.layers import EVERY, Block, Modulation, initialize, sincos_positions
from synthgen.models.vit import VisionTransformer

__all__ = ["NarrowDecoder"]


class NarrowDecoder(nn.Module):
    """As many numbers as a patch has, for every patch, from the features of visible ones (MaskDiT; its code).

    The features are changed with the time and brought to the decoder's width (the bridge), a learned token stands in
    for every hidden patch, and all patches get their positions. What the class token says reaches the patches here; in
    the last block it no longer looks. The last layer begins small, so that the first answers are near 0: at 0 itself,
    where the paper's code begins, the encoder would have no gradient.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, dim: int, depth: int) -> None:
        super().__init__()
        if dim < 1 or dim % 32:
            raise ValueError(f"decoder_dim must be a multiple of 32 (the width of a head), not {dim}")
        if depth < 1:
            raise ValueError(f"decoder_depth must be 1 or more, not {depth}")
        config = encoder.config
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        self.bridge = nn.Linear(config.dim, dim)
        self.time = nn.Linear(config.dim, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 32) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.predict = nn.Linear(dim, 3 * config.patch_size**2)
        self.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.predict.weight, std=0.02)
        self.bridge_change = Modulation(config.dim, parts=2)
        self.changes = nn.ModuleList(Modulation(dim) for _ in range(depth))
        self.last_change = Modulation(dim, parts=2)

    def forward(
        self,
        features: Float[Tensor, "b t d"],
        visible: Int[Tensor, "b v"],
        hidden: Int[Tensor, "b h"],
        time: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b n p"]:
        """First of the visible patches, then of the hidden ones; the first feature is the class token's."""
        places = self.positions[0, 1:]
        seen: Tensor = self.bridge(_changed(features, self.bridge_change(time)))
        masked = (self.mask_token + places[hidden]).to(seen.dtype)
        x = torch.cat([seen[:, :1], seen[:, 1:] + places[visible], masked], dim=1)
        narrow, last = self.time(time), self.blocks[-1]
        for block, change in zip(self.blocks, self.changes, strict=True):
            x = block(x, change(narrow), only=slice(1, None) if block is last else EVERY)
        answers: Tensor = self.predict(_changed(self.norm(x), self.last_change(narrow)))
        return answers


def _changed(x: Float[Tensor, "b m d"], change: Float[Tensor, "b 2 d"]) -> Float[Tensor, "b m d"]:
    shift, scale = change[:, :, None].unbind(1)
    return x * (1 + scale) + shift
