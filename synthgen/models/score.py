"""A score network conditioned on a code, used in pretraining only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synthgen.models.linear import Linear

__all__ = ["LevelEmbedding", "ResidualBlock", "ScoreNetwork"]

LEVELS = 4


class LevelEmbedding(nn.Module):
    """A vector for each noise level: sines and cosines of ln sigma, then two linear layers; ``dim`` is even."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(Linear(dim, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Frequencies rise from 1/4 to 16 radians per unit of ln sigma."""
        omega = torch.logspace(-2, 4, self.dim // 2, base=2, device=sigma.device)
        angle = sigma.log()[:, None] * omega
        embedded: Tensor = self.layers(torch.cat([angle.sin(), angle.cos()], dim=1))
        return embedded


class ResidualBlock(nn.Module):
    """Two convolutions after group norms; between them a linear map of the condition is added to every pixel."""

    def __init__(self, dim: int, out_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(dim), nn.Conv2d(dim, out_dim, 3, padding=1)
        self.tell = Linear(condition_dim, out_dim)
        self.norm2, self.conv2 = _norm(out_dim), nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.skip = nn.Identity() if dim == out_dim else nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"], condition: Float[Tensor, "b d"]) -> Float[Tensor, "b k h w"]:
        """The sum of skip connection and convolutions, divided by sqrt(2)."""
        y = self.conv1(F.silu(self.norm1(x))) + self.tell(F.silu(condition))[:, :, None, None]
        z: Tensor = (self.skip(x) + self.conv2(F.silu(self.norm2(y)))) / math.sqrt(2)
        return z


class ScoreNetwork(nn.Module):
    """sigma times the score of noised images, given the noise level and a code: a small U-Net (DRL's is an NCSN++).

    It has a residual block on each of four levels, down and up, and one between; each level halves the sides, and from
    the second on there are twice as many channels. The code enters twice: with the noise level in every block, and at
    the lowest level as a map from three linear layers.
    """

    def __init__(self, size: int, *, code_dim: int, width: int) -> None:
        super().__init__()
        wide, condition_dim = 2 * width, 8 * width
        lowest = math.ceil(size / 2 ** (LEVELS - 1))
        dims = [width, *[wide] * (LEVELS - 1)]
        self.level, self.code = LevelEmbedding(condition_dim // 2), Linear(code_dim, condition_dim // 2)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(*pair, condition_dim) for pair in zip([width, *dims], dims, strict=False)
        )
        self.halve = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1) for dim in dims[:-1])
        self.paint = nn.Sequential(
            Linear(condition_dim, wide * lowest),
            nn.SiLU(),
            Linear(wide * lowest, wide * lowest),
            nn.SiLU(),
            Linear(wide * lowest, wide * lowest**2),
            nn.SiLU(),
            nn.Unflatten(1, (wide, lowest, lowest)),
        )
        self.middle = ResidualBlock(2 * wide, wide, condition_dim)
        self.up = nn.ModuleList(ResidualBlock(wide + dim, dim, condition_dim) for dim in reversed(dims))
        self.norm, self.leave = _norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(
        self, noised: Float[Tensor, "b 3 s s"], sigma: Float[Tensor, " b"], code: Float[Tensor, "b z"]
    ) -> Float[Tensor, "b 3 s s"]:
        """An estimate of minus the noise.

        For pixels of variance 1, sigma x / (1 + sigma^2) is the best linear estimate of the noise in x; the network's
        output is added, scaled to the residual (Karras et al., 2022, section 5).
        """
        condition = torch.cat([self.level(sigma), self.code(code)], dim=1)
        sigma = sigma[:, None, None, None]
        deviation = (1 + sigma**2).sqrt()  # of noised pixels
        x = self.enter(noised / deviation)
        skips: list[Tensor] = []
        for number, block in enumerate(self.down):
            x = block(self.halve[number - 1](x) if number else x, condition)
            skips.append(x)
        x = self.middle(torch.cat([x, self.paint(condition)], dim=1), condition)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], dim=1), condition)
        score: Tensor = (self.leave(F.silu(self.norm(x))) - sigma * noised / deviation) / deviation
        return score


def _norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(dim // 4, dim, eps=1e-6)
