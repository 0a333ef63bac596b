"""The attention head of DifFormer and DifFeed (Mukhopadhyay et al., 2023): maps of blocks to class scores.

A map becomes tokens, a class token is put before them, two transformer blocks mix them, and the class tokens of all
timesteps, side by side, go to a linear layer. There is no positional embedding: places are told apart by the affine
weights of the norm in the tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["LARGEST", "AttentiveHead"]

LARGEST = 16  # rows and columns of a map that is read; larger ones are averaged down to it


class Tokenizer(nn.Module):
    """A block's map to tokens: averaged down, normalised over channels and places together, each place projected."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, rows, columns = shape
        self.size = min(rows, LARGEST), min(columns, LARGEST)
        self.norm = nn.LayerNorm([channels, *self.size])
        self.project = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Tokens, row by row."""
        y: Tensor = self.project(self.norm(F.adaptive_avg_pool2d(maps, self.size)))
        return y.flatten(2).mT


class Block(nn.Module):
    """A pre-norm transformer block; queries, keys and values without a bias."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Tokens that have seen each other."""
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class AttentiveHead(nn.Module):
    """Class scores from the maps of some blocks at some timesteps.

    Args:
        shapes: channels, rows and columns of each block's map; each has a tokenizer of its own.
        timesteps: how many; all share the weights of tokenizers and transformer.
        num_classes: scores.
        width: of the tokens.
        depth: transformer blocks.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        timesteps: int,
        num_classes: int,
        *,
        width: int = 1024,
        depth: int = 2,
        num_heads: int = 8,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.tokenizers = nn.ModuleList(Tokenizer(shape, width) for shape in shapes)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_ratio) for _ in range(depth)))
        self.classify = nn.Linear(timesteps * width, num_classes)

    def forward(self, maps: Sequence[Float[Tensor, "b t _ _ _"]]) -> Float[Tensor, "b k"]:
        """Scores; blocks mix within a timestep by attention, timesteps only in the linear layer at the end."""
        b, t = maps[0].shape[:2]
        given = zip(self.tokenizers, maps, strict=True)
        tokens = torch.cat([tokenizer(block.flatten(0, 1).float()) for tokenizer, block in given], 1)
        x = self.blocks(torch.cat([self.class_token.expand(b * t, -1, -1), tokens], 1))
        scores: Tensor = self.classify(x[:, 0].reshape(b, -1))
        return scores
