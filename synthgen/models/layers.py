"""What the encoder and the decoders share: transformer blocks, patches, and places on the patch grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Block", "initialize", "patchify", "restore", "sincos_positions", "take", "unpatchify"]


class Attention(nn.Module):
    """Multi-head self-attention; the parameters bear timm's names."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Every token looks at every token."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return mixed


class Mlp(nn.Module):
    """Two linear layers, four times as wide between, with a GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Each token by itself."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Attention, then the MLP, each added to its input."""
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def initialize(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as in MAE's code; for ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(dim: int, grid: int) -> Float[Tensor, "1 t d"]:
    """Fixed two-dimensional positions: a row of zeros for the class token, then the patches row by row.

    The first half of the channels holds sine and cosine of the column, the second of the row, with wavelengths from
    2 pi to 10000 * 2 pi (MAE's code, so that its weights fit).
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} is not a multiple of 4, which sine-cosine positions need")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # grid d/2
    column, row = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    places = torch.cat([column, row], dim=2).reshape(1, grid * grid, dim)
    return torch.cat([torch.zeros(1, 1, dim), places.float()], dim=1)


def patchify(images: Float[Tensor, "b 3 H W"], size: int) -> Float[Tensor, "b n p"]:
    """Squares of ``size`` pixels row by row; inside a patch the order is row, column, channel (p = 3 size^2)."""
    b, c, h, w = images.shape
    squares = images.view(b, c, h // size, size, w // size, size)
    return squares.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(patches: Float[Tensor, "b n p"], size: int) -> Float[Tensor, "b 3 H W"]:
    """The inverse of :func:`patchify` for square images."""
    b, n, _ = patches.shape
    grid = round(n**0.5)
    squares = patches.view(b, grid, grid, size, size, 3)
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, grid * size, grid * size)


def take(tokens: Float[Tensor, "b n d"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The tokens at ``places``, in that order."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def restore(
    visible_tokens: Float[Tensor, "b v d"],
    hidden_tokens: Float[Tensor, "b h d"],
    visible: Int[Tensor, "b v"],
    hidden: Int[Tensor, "b h"],
) -> Float[Tensor, "b v+h d"]:
    """Put tokens back where :func:`take` found them."""
    order = torch.cat([visible, hidden], dim=1).argsort(dim=1)
    return take(torch.cat([visible_tokens, hidden_tokens], dim=1), order)
