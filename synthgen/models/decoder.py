"""Decoders of masked methods, used in pretraining only."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.config import check_range
from synthgen.models.layers import EVERY, HEAD_DIM, Block, Modulation, check_decoder, initialize, sincos_positions
from synthgen.models.linear import Linear
from synthgen.models.vit import VisionTransformer

__all__ = ["NoiseDecoder", "PixelDecoder"]


class PixelDecoder(nn.Module):
    """Pixels of hidden patches from the features of visible ones (MAE, section 3; 512 wide and 8 deep there).

    One learned token replaces every hidden patch; positions tell them apart. Attention is equivariant to the order of
    tokens, so hidden tokens follow the visible ones instead of being un-shuffled, with equal results and less work: in
    the first block queries, keys and values of mask tokens are computed once for all images, and the last block and
    layer compute hidden tokens alone.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, dim: int, depth: int) -> None:
        super().__init__()
        check_decoder(dim, depth)
        config = encoder.config
        self.embed = Linear(config.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, dim // HEAD_DIM) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = Linear(dim, 3 * config.patch_size**2)
        self.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, features: Float[Tensor, "b t d"], visible: Int[Tensor, "b v"], hidden: Int[Tensor, "b h"]
    ) -> Float[Tensor, "b h p"]:
        """Pixels of the hidden patches, in the order of ``hidden``; the first feature is the class token's."""
        positions = self.positions[0, 1:]
        shown: Tensor = self.embed(features)
        shown = torch.cat([shown[:, :1], shown[:, 1:] + positions[visible]], dim=1)
        masked = (self.mask_token[0] + positions).to(shown.dtype)  # n d
        first, last = cast(Block, self.blocks[0]), self.blocks[-1]

        def joined(of_shown: Tensor, of_masked: Tensor) -> Tensor:
            return torch.cat([of_shown, F.embedding(hidden, of_masked)], dim=1)

        x = joined(shown, masked)
        for block in self.blocks:
            qkv = joined(first.project_qkv(shown), first.project_qkv(masked)) if block is first else None
            x = block(x, qkv=qkv, queries=slice(shown.shape[1], None) if block is last else EVERY)
        pixels: Tensor = self.predict(self.norm(x))
        return pixels


class NoiseDecoder(nn.Module):
    """Clean pixels and noise of every patch from the features of visible ones (UMD; as wide as the encoder there).

    The class token's features reach the patches here and nowhere else. A time modulates every block (adaLN).
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, depth: int) -> None:
        super().__init__()
        check_range(ge=1, decoder_depth=depth)
        config = encoder.config
        dim = config.dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = Linear(dim, 2 * 3 * config.patch_size**2)
        self.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)
        self.changes = nn.ModuleList(Modulation(dim) for _ in range(depth))
        self.last_change = Modulation(dim, parts=2)

    def forward(
        self,
        features: Float[Tensor, "b t d"],
        visible: Int[Tensor, "b v"],
        hidden: Int[Tensor, "b h"],
        time: Float[Tensor, "b d"] | None = None,
    ) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n p"]]:
        """Pixels and noise, first of the ``visible`` patches, then of the ``hidden`` ones, in these orders."""
        positions = self.positions[0, 1:]
        cls, patches = features[:, :1], features[:, 1:] + positions[visible]
        x = torch.cat([cls, patches, (self.mask_token + positions[hidden]).to(patches.dtype)], dim=1)
        for block, change in zip(self.blocks, self.changes, strict=True):
            x = block(x, None if time is None else change(time))
        x = self.norm(x[:, 1:])
        if time is not None:
            shift, scale = self.last_change(time)[:, :, None].unbind(1)
            x = x * (1 + scale) + shift
        pixels, noise = self.predict(x).chunk(2, dim=2)
        return pixels, noise
