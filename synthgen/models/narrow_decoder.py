"""A denoising decoder that is narrower than its encoder, used in pretraining only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.models.layers import EVERY, HEAD_DIM, Block, Modulation, check_decoder, initialize, sincos_positions
from synthgen.models.linear import Linear
from synthgen.models.vit import VisionTransformer

__all__ = ["NarrowDecoder"]


class NarrowDecoder(nn.Module):
    """A vector of a patch's length for every patch, from the features of visible ones (MaskDiT; its code).

    The features are modulated by the time and projected to the decoder's width (the bridge), a learned token replaces
    every hidden patch, and all patches get their positions. The class token is a key of all blocks and an output of
    none. The last layer has small initial weights, so that the first outputs are near 0: with zeros, as in the paper's
    code, the encoder would have no gradient at first.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, dim: int, depth: int) -> None:
        super().__init__()
        check_decoder(dim, depth)
        config = encoder.config
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        self.bridge = Linear(config.dim, dim)
        self.time = Linear(config.dim, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // HEAD_DIM) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.predict = Linear(dim, 3 * config.patch_size**2)
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
        """Vectors of the ``visible`` patches, then of the ``hidden`` ones; the first feature is the class token's."""
        positions = self.positions[0, 1:]
        shown: Tensor = self.bridge(_modulated(features, self.bridge_change(time)))
        masked = (self.mask_token + positions[hidden]).to(shown.dtype)
        x = torch.cat([shown[:, :1], shown[:, 1:] + positions[visible], masked], dim=1)
        narrow, last = self.time(time), self.blocks[-1]
        for block, change in zip(self.blocks, self.changes, strict=True):
            x = block(x, change(narrow), queries=slice(1, None) if block is last else EVERY)
        outputs: Tensor = self.predict(_modulated(self.norm(x), self.last_change(narrow)))
        return outputs


def _modulated(x: Float[Tensor, "b m d"], modulation: Float[Tensor, "b 2 d"]) -> Float[Tensor, "b m d"]:
    shift, scale = modulation[:, :, None].unbind(1)
    return x * (1 + scale) + shift
