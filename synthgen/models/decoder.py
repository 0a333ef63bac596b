"""Decoders of masked methods: used in pretraining, thrown away after it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.models.layers import EVERY, Block, Modulation, initialize, sincos_positions
from synthgen.models.vit import VisionTransformer

__all__ = ["NoiseDecoder", "PixelDecoder"]


class PixelDecoder(nn.Module):
    """Pixels of hidden patches from the features of visible ones (MAE, section 3; 512 wide and 8 deep there).

    One learned token stands in for every hidden patch; positions tell them apart. As attention does not care for the
    order of tokens, hidden tokens are put behind the visible ones instead of between them. Three things follow, and the
    numbers stay those of un-shuffling everything: what the first block asks of a hidden place is the same for every
    image, and worked out once; in the last block only hidden tokens look; only they reach the last layer.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, dim: int, depth: int) -> None:
        super().__init__()
        if dim < 32 or dim % 32:
            raise ValueError(f"decoder_dim must be a multiple of 32 (the width of a head), not {dim}")
        if depth < 1:
            raise ValueError(f"decoder_depth must be 1 or more, or 0 to go by the encoder's size, not {depth}")
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
        seen = torch.cat([seen[:, :1], seen[:, 1:] + places[visible]], dim=1)
        masked = (self.mask_token[0] + places).to(seen.dtype)  # n d
        first, last = cast(Block, self.blocks[0]), self.blocks[-1]

        def joined(of_seen: Tensor, of_masked: Tensor) -> Tensor:
            return torch.cat([of_seen, F.embedding(hidden, of_masked)], dim=1)

        x = joined(seen, masked)
        for block in self.blocks:
            qkv = joined(first.qkv(seen), first.qkv(masked)) if block is first else None
            x = block(x, qkv=qkv, only=slice(seen.shape[1], None) if block is last else EVERY)
        pixels: Tensor = self.predict(self.norm(x))
        return pixels


class NoiseDecoder(nn.Module):
    """Clean pixels and noise of every patch from the features of visible ones (UMD; as wide as the encoder there).

    What the class token says reaches the patches here and nowhere else. Blocks change with the time where there is one.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, depth: int) -> None:
        super().__init__()
        config = encoder.config
        dim = config.dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, 2 * 3 * config.patch_size**2)
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
        """Pixels and noise, first of the visible patches, then of the hidden ones, each in their order."""
        places = self.positions[0, 1:]
        cls, patches = features[:, :1], features[:, 1:] + places[visible]
        x = torch.cat([cls, patches, (self.mask_token + places[hidden]).to(patches.dtype)], dim=1)
        for block, change in zip(self.blocks, self.changes, strict=True):
            x = block(x, None if time is None else change(time))
        x = self.norm(x[:, 1:])
        if time is not None:
            shift, scale = self.last_change(time)[:, :, None].unbind(1)
            x = x * (1 + scale) + shift
        pixels, noise = self.predict(x).chunk(2, dim=2)
        return pixels, noise
