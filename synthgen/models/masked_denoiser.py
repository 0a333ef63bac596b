"""A decoder that denoises hidden patches given the visible ones, used in pretraining only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.models.layers import (
    EVERY,
    HEAD_DIM,
    Attention,
    Block,
    Mlp,
    TimeEmbedding,
    attend,
    check_decoder,
    initialize,
    sincos_positions,
    split_heads,
)
from synthgen.models.linear import Linear
from synthgen.models.vit import VisionTransformer

__all__ = ["DecoderKind", "MaskedDenoiser"]

DecoderKind = Literal["cross-self", "cross", "joint"]


class _LinkedBlock(nn.Module):
    """A pre-norm transformer block: optional self-attention, cross-attention to an encoder layer, the MLP."""

    def __init__(self, dim: int, num_heads: int, *, self_attention: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.own = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)) if self_attention else None
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.q = Linear(dim, dim)
        self.proj = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Float[Tensor, "b h d"], kv: Float[Tensor, "b t c"]) -> Float[Tensor, "b h d"]:
        """Each part is added to its input; ``kv`` holds keys and values of the encoder's tokens, concatenated."""
        if self.own is not None:
            x = x + self.own(x)
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(self.norm_cross(x)), *kv.chunk(2, dim=2)))
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class MaskedDenoiser(nn.Module):
    """Clean pixels of hidden patches from their noised ones and the features of visible ones (DiffMAE's decoders).

    cross-self: noised patches attend to each other, then to the visible ones
    cross:      noised patches attend to the visible ones alone
    joint:      noised and visible patches attend to all, as in MAE

    In the first two, block 1 attends to the encoder's last layer, and with ``u_links`` each further one to an earlier
    layer, at equal distances: 4 blocks on an encoder of 12 attend to layers 12, 9, 6 and 3. Keys and values of visible
    patches depend on neither noise nor time, so :meth:`read` computes them once for any number of steps.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, *, kind: DecoderKind, dim: int, depth: int, u_links: bool) -> None:
        super().__init__()
        check_decoder(dim, depth)
        config, heads = encoder.config, dim // HEAD_DIM
        last = config.depth
        self.joint = kind == "joint"
        self.embed = Linear(3 * config.patch_size**2, dim)
        self.time = TimeEmbedding(dim)
        self.register_buffer("positions", sincos_positions(dim, config.grid), persistent=False)
        if self.joint:
            self.links = [last]
            self.readers = nn.ModuleList([Linear(config.dim, dim)])
            self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        else:
            own = kind == "cross-self"
            self.links = [last - last * number // depth if u_links else last for number in range(depth)]
            self.readers = nn.ModuleList(
                nn.Sequential(
                    nn.Identity() if link == last else nn.LayerNorm(config.dim, eps=1e-6),  # the encoder has its own
                    Linear(config.dim, 2 * dim),
                )
                for link in self.links
            )
            self.blocks = nn.ModuleList(_LinkedBlock(dim, heads, self_attention=own) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = Linear(dim, 3 * config.patch_size**2)
        self.apply(initialize)

    def read(self, layers: Sequence[Float[Tensor, "b t d"]], visible: Int[Tensor, "b v"]) -> list[Tensor]:
        """The keys and values of visible patches for each block; for ``joint`` their tokens.

        ``layers`` are the outputs of the encoder's blocks, class token first; the last one is normalised.
        """
        memory: list[Tensor] = [read(layers[link - 1]) for read, link in zip(self.readers, self.links, strict=True)]
        if self.joint:
            (shown,) = memory
            return [torch.cat([shown[:, :1], shown[:, 1:] + self.positions[0, 1:][visible]], dim=1)]
        return memory

    def forward(
        self,
        noised: Float[Tensor, "b h p"],
        times: Int[Tensor, " b"],
        hidden: Int[Tensor, "b h"],
        memory: Sequence[Tensor],
    ) -> Float[Tensor, "b h p"]:
        """The clean patches, in the order of ``hidden``; ``memory`` is the result of :meth:`read`."""
        x: Tensor = self.embed(noised) + self.positions[0, 1:][hidden] + self.time(times)[:, None]
        if self.joint:
            (shown,) = memory
            x, last = torch.cat([shown, x], dim=1), self.blocks[-1]
            for block in self.blocks:  # the last one computes hidden patches alone
                x = block(x, queries=slice(shown.shape[1], None) if block is last else EVERY)
        else:
            for block, kv in zip(self.blocks, memory, strict=True):
                x = block(x, kv)
        pixels: Tensor = self.predict(self.norm(x))
        return pixels
