"""What the encoder and the decoders share: transformer blocks, patches, and positions on the patch grid."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synthgen.models.linear import Linear

__all__ = [
    "EVERY",
    "HEAD_DIM",
    "Block",
    "CrossBlock",
    "Modulation",
    "Projector",
    "TimeEmbedding",
    "attend",
    "check_decoder",
    "initialize",
    "patchify",
    "restore",
    "sincos_positions",
    "split_heads",
    "take",
    "unpatchify",
]

EVERY = slice(None)  # all tokens
HEAD_DIM = 32  # of the decoders that are narrower than their encoders


class Attention(nn.Module):
    """Multi-head self-attention, with timm's parameter names."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n d"], key_mask: Bool[Tensor, "b n"] | None = None, queries: slice = EVERY
    ) -> Float[Tensor, "b m d"]:
        """Every token attends to every token, or to those of ``key_mask``; the results of the ``queries`` alone."""
        return self.mix(self.qkv(x), key_mask, queries)

    def mix(
        self, qkv: Float[Tensor, "b n c"], key_mask: Bool[Tensor, "b n"] | None = None, queries: slice = EVERY
    ) -> Float[Tensor, "b m d"]:
        """As :meth:`forward`, from each token's query, key and value."""
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=2))
        attn_mask = None if key_mask is None else key_mask[:, None, None]
        y: Tensor = self.proj(attend(q[:, :, queries], k, v, attn_mask).transpose(1, 2).flatten(2))
        return y


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens to another of the same width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t d"], context: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        """Every token of ``x`` attends to every token of ``context``."""
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(x), *self.kv(context).chunk(2, dim=2)))
        y: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return y


def split_heads(x: Float[Tensor, "b n d"], num_heads: int) -> Float[Tensor, "b h n w"]:
    """Each head's share of the channels."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def attend(
    q: Float[Tensor, "b h m w"],
    k: Float[Tensor, "b h n w"],
    v: Float[Tensor, "b h n w"],
    attn_mask: Bool[Tensor, "#b 1 #m n"] | None = None,
) -> Float[Tensor, "b h m w"]:
    """softmax(q k^T / sqrt(w)) v, over the keys where ``attn_mask`` is true.

    By torch's fused kernel, except for training in bfloat16 on a CPU: there the kernel, forward and backward, takes
    five times as long as matrix products for 17 to 65 tokens, and nearly twice as long for 577.
    """
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask)
    scores = (q @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    y: Tensor = scores.softmax(dim=3).to(v.dtype) @ v
    return y


class Mlp(nn.Module):
    """Two linear layers with a GELU between, the hidden one four times as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The layers applied to each token by itself."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """A pre-norm transformer block, optionally with a :class:`Modulation`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 6 d"] | None = None,
        key_mask: Bool[Tensor, "b n"] | None = None,
        queries: slice = EVERY,
        qkv: Float[Tensor, "b n c"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Attention to the tokens of ``key_mask``, then the MLP, each added to its input.

        The result holds the tokens ``queries`` alone, for callers that need no others. ``qkv`` is
        :meth:`project_qkv` of ``x`` where the caller has it already; it excludes a ``modulation``.
        """
        if modulation is None:
            x = x[:, queries] + self.attn.mix(self.project_qkv(x) if qkv is None else qkv, key_mask, queries)
            y: Tensor = x + self.mlp(self.norm2(x))
            return y
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None].unbind(1)  # b 1 d each
        x = x[:, queries] + (1 + gate1) * self.attn(self.norm1(x) * (1 + scale1) + shift1, key_mask, queries)
        modulated: Tensor = x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return modulated

    def project_qkv(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """The query, key and value of each token, which depend on that token alone."""
        y: Tensor = self.attn.qkv(self.norm1(x))
        return y


class CrossBlock(nn.Module):
    """A pre-norm transformer block with cross-attention between self-attention and MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.cross = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b n d"],
        key_mask: Bool[Tensor, "b t"] | None = None,
        queries: slice = EVERY,
    ) -> Float[Tensor, "b m d"]:
        """Self-attention to the tokens of ``key_mask``, cross-attention to ``context``, then the MLP.

        Each is added to its input. The result holds the tokens ``queries`` alone.
        """
        x = x[:, queries] + self.attn(self.norm1(x), key_mask, queries)
        x = x + self.cross(self.norm_cross(x), context)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Projector(nn.Sequential):
    """``depth`` linear layers, with a LayerNorm and a ReLU between: the head of contrastive methods."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, depth: int) -> None:
        widths = [dim, *[hidden_dim] * (depth - 1)]
        inner = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (Linear(before, after), nn.LayerNorm(after, eps=1e-6), nn.ReLU())
        ]
        super().__init__(*inner, Linear(widths[-1], out_dim))
        self.apply(initialize)


class TimeEmbedding(nn.Module):
    """A vector for each time: sines and cosines of it, then two linear layers (UMD, and DiT before it)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.fc1, self.fc2 = Linear(dim, 2 * dim), Linear(2 * dim, dim)
        self.apply(initialize)

    def forward(self, times: Int[Tensor, " b"], condition: Float[Tensor, "b d"] | None = None) -> Float[Tensor, "b d"]:
        """Frequencies fall from 1 to 1/10000; a further ``condition`` is added before the last SiLU."""
        half = self.dim // 2
        omega = 10000.0 ** -(torch.arange(half, device=times.device) / max(1, half - 1))
        angle = times[:, None] * omega
        projected = self.fc2(F.silu(self.fc1(torch.cat([angle.sin(), angle.cos()], dim=1))))
        embedded: Tensor = F.silu(projected if condition is None else projected + condition)
        return embedded


class Modulation(nn.Module):
    """Shift, scale and gate of a block's two halves, from a vector (adaLN, Peebles and Xie, 2023).

    Initially the identity: all are 0, and scale and gate are added to 1.
    """

    def __init__(self, dim: int, parts: int = 6) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(dim, parts * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vector: Float[Tensor, "b d"]) -> Float[Tensor, "b parts d"]:
        """The vectors of each part."""
        parts: Tensor = self.linear(vector).view(len(vector), self.parts, -1)
        return parts


def check_decoder(dim: int, depth: int) -> None:
    """Check a method's options ``decoder_dim`` and ``decoder_depth``, after 0 was replaced by their defaults.

    Raises:
        ValueError: one is out of range.
    """
    if dim < HEAD_DIM or dim % HEAD_DIM:
        raise ValueError(f"decoder_dim must be a multiple of {HEAD_DIM} (the width of a head), not {dim}")
    if depth < 1:
        raise ValueError(f"decoder_depth must be 1 or more, or 0 to go by the encoder's size, not {depth}")


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
    patches = torch.cat([column, row], dim=2).reshape(1, grid * grid, dim)
    return torch.cat([torch.zeros(1, 1, dim), patches.float()], dim=1)


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


def take(tokens: Float[Tensor, "b n d"], indices: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The tokens of each image at ``indices``, in that order."""
    b, n, d = tokens.shape
    rows = indices + n * torch.arange(b, device=indices.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(*indices.shape, d)


def restore(
    visible_tokens: Float[Tensor, "b v d"],
    hidden_tokens: Float[Tensor, "b h d"],
    visible: Int[Tensor, "b v"],
    hidden: Int[Tensor, "b h"],
) -> Float[Tensor, "b v+h d"]:
    """Visible and hidden tokens in the order of the grid: the inverse of :func:`take`."""
    order = torch.cat([visible, hidden], dim=1).argsort(dim=1)
    return take(torch.cat([visible_tokens, hidden_tokens], dim=1), order)
