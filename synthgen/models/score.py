"""A score network that is told a code: used in pretraining, thrown away after it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["LevelEmbedding", "ResidualBlock", "ScoreNetwork"]

LEVELS = 4


class LevelEmbedding(nn.Module):
    """A vector of even width for each noise level: sines and cosines of ln sigma, then two linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Frequencies rise from 1/4 to 16 radians for a level e times as high."""
        omega = torch.logspace(-2, 4, self.dim // 2, base=2, device=sigma.device)
        angle = sigma.log()[:, None] * omega
        embedded: Tensor = self.layers(torch.cat([angle.sin(), angle.cos()], dim=1))
        return embedded


class ResidualBlock(nn.Module):
    """Two convolutions after group norms; what the block is told is added between them, a vector for all places."""

    def __init__(self, dim: int, out_dim: int, told_dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(dim), nn.Conv2d(dim, out_dim, 3, padding=1)
        self.tell = nn.Linear(told_dim, out_dim)
        self.norm2, self.conv2 = _norm(out_dim), nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.skip = nn.Identity() if dim == out_dim else nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"], told: Float[Tensor, "b d"]) -> Float[Tensor, "b k h w"]:
        """The sum of both ways, over the root of 2."""
        y = self.conv1(F.silu(self.norm1(x))) + self.tell(F.silu(told))[:, :, None, None]
        z: Tensor = (self.skip(x) + self.conv2(F.silu(self.norm2(y)))) / math.sqrt(2)
        return z


class ScoreNetwork(nn.Module):
    """sigma times the score of noised images, given the noise level and a code: a small U-Net (DRL's is an NCSN++).

    A residual block on each of four levels, down and up, and one between; the sides are halved from level to level, and
    from the second on all is twice as wide. The code enters twice: beside the noise level into every block, and as a
    map that three linear layers paint at the lowest level.
    """

    def __init__(self, size: int, *, code_dim: int, width: int) -> None:
        super().__init__()
        wide, told_dim = 2 * width, 8 * width
        lowest = math.ceil(size / 2 ** (LEVELS - 1))
        dims = [width, *[wide] * (LEVELS - 1)]
        self.level, self.code = LevelEmbedding(told_dim // 2), nn.Linear(code_dim, told_dim // 2)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(*pair, told_dim) for pair in zip([width, *dims], dims, strict=False))
        self.halve = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1) for dim in dims[:-1])
        self.paint = nn.Sequential(
            nn.Linear(told_dim, wide * lowest),
            nn.SiLU(),
            nn.Linear(wide * lowest, wide * lowest),
            nn.SiLU(),
            nn.Linear(wide * lowest, wide * lowest**2),
            nn.SiLU(),
            nn.Unflatten(1, (wide, lowest, lowest)),
        )
        self.middle = ResidualBlock(2 * wide, wide, told_dim)
        self.up = nn.ModuleList(ResidualBlock(wide + dim, dim, told_dim) for dim in reversed(dims))
        self.norm, self.leave = _norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(
        self, noised: Float[Tensor, "b 3 s s"], sigma: Float[Tensor, " b"], code: Float[Tensor, "b z"]
    ) -> Float[Tensor, "b 3 s s"]:
        """Minus the noise, as far as it can be told.

        Where pixels have variance 1, sigma x / (1 + sigma^2) is the best linear guess of the noise in x; what the
        network adds is scaled to what is left (Karras et al., 2022, section 5).
        """
        told = torch.cat([self.level(sigma), self.code(code)], dim=1)
        sigma = sigma[:, None, None, None]
        deviation = (1 + sigma**2).sqrt()  # of noised pixels
        x = self.enter(noised / deviation)
        passed: list[Tensor] = []  # on the way down
        for number, block in enumerate(self.down):
            x = block(self.halve[number - 1](x) if number else x, told)
            passed.append(x)
        x = self.middle(torch.cat([x, self.paint(told)], dim=1), told)
        for block in self.up:
            beside = passed.pop()
            x = block(torch.cat([F.interpolate(x, size=beside.shape[2:]), beside], dim=1), told)
        score: Tensor = (self.leave(F.silu(self.norm(x))) - sigma * noised / deviation) / deviation
        return score


def _norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(dim // 4, dim, eps=1e-6)
