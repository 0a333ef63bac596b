"""The generator and the discriminator that learn which patches to hide (AutoMAE)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["MaskDiscriminator", "MaskGenerator"]


class MaskGenerator(nn.Module):
    """A score of each patch for hiding, from the attention of each head to it (AutoMAE's code).

    The first biases are initialised above 0. Attention is small and never negative, so most channels with a negative
    bias would be 0 after the ReLU and get no gradient, and 4 heads have only two channels.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        inner = max(1, num_heads // 2)
        self.conv1 = nn.Conv2d(num_heads, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, 1, 3, padding=1)
        nn.init.constant_(self.conv1.bias, (9 * num_heads) ** -0.5)  # type: ignore[arg-type]  # the bound of torch's own initialisation

    def forward(self, attention: Float[Tensor, "b h n"]) -> Float[Tensor, "b n"]:
        """Log-probabilities over the patches of a square grid."""
        b, h, n = attention.shape
        grid = round(n**0.5)
        scores: Tensor = self.conv2(self.conv1(attention.reshape(b, h, grid, grid)).relu())
        return scores.flatten(1).float().log_softmax(dim=1)


class MaskDiscriminator(nn.Module):
    """Real (1) or generated (0), for a distribution over patches (AutoMAE's code).

    Two convolutions halve the grid each; the kernel of the last covers the rest: 3 x 3 for the paper's grid of 14, as
    there, 2 x 2 for 8, 4 x 4 for 16.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        if grid < 4:
            raise ValueError(f"the discriminator needs a grid of 4 x 4 patches or more, not {grid} x {grid}")
        self.layers = nn.Sequential(
            SpectralConv(1, 16, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            SpectralConv(16, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            SpectralConv(32, 1, grid // 4),
        )

    def forward(self, shares: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """One output per image."""
        b, n = shares.shape
        grid = round(n**0.5)
        outputs: Tensor = self.layers(shares.reshape(b, 1, grid, grid))
        return outputs.flatten().float()


class SpectralConv(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value (Miyato et al., 2018).

    The value is exact. The usual power iteration keeps state between calls, so that equal inputs would give different
    outputs.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The convolution."""
        norm = torch.linalg.matrix_norm(self.weight.flatten(1), ord=2)
        y: Tensor = self._conv_forward(x, self.weight / norm, self.bias)
        return y
