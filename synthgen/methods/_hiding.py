"""The choice of hidden patches: uniformly random, or those under word masks first."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synthgen.config import check_range

__all__ = ["Hiding", "coverage", "hidden_share", "num_visible_patches"]


@dataclass(frozen=True)
class Hiding:
    """Random hiding, of which a share that rises linearly over the training is taken from the foreground (Free-ATM).

    a     = start + (share - start) * progress
    n_fg  = min( floor(a * num_hidden), number of patches covered by half or more )

    The n_fg most covered patches are hidden, ties in random order; the rest is drawn uniformly from all others.
    """

    share: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        check_range(ge=0, le=1, foreground_share=self.share, foreground_share_start=self.start)

    @property
    def guided(self) -> bool:
        """Whether masks have any effect."""
        return max(self.share, self.start) > 0

    def split(
        self, noise: Float[Tensor, "b n"], foreground: Float[Tensor, "b n"], num_visible: int, progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """Indices of the visible and of the hidden patches; the highest ``noise``, uniform in [0, 1), is hidden."""
        if self.guided:
            share = self.start + (self.share - self.start) * progress
            by_noise = noise.argsort(dim=1)
            by_score = by_noise.gather(1, foreground.gather(1, by_noise).argsort(dim=1, descending=True, stable=True))
            limit = int(share * (noise.shape[1] - num_visible))
            num_guided = (foreground >= 0.5).sum(1, keepdim=True).clamp(max=limit)
            rank = by_score.argsort(dim=1)  # 0 for the most covered patch
            noise = noise + (rank < num_guided)  # above all noise, which is below 1
        order = noise.argsort(dim=1)
        return order[:, :num_visible], order[:, num_visible:]


def coverage(masks: Bool[Tensor, "b k H W"], patch_size: int) -> Float[Tensor, "b n"]:
    """The share of each patch under the mask of any word, in [0, 1]."""
    return F.avg_pool2d(masks.any(1, keepdim=True).float(), patch_size).flatten(1)


def hidden_share(foreground: Float[Tensor, "b n"], hidden: Int[Tensor, "b h"]) -> Float[Tensor, ""]:
    """The hidden share of the foreground: about ``mask_ratio`` where hiding is random, 0 without foreground."""
    return foreground.gather(1, hidden).sum() / foreground.sum().clamp(min=1e-6)


def num_visible_patches(name: str, ratio: float, num_patches: int) -> int:
    """The number of visible patches.

    Raises:
        ValueError: the ratio would hide no patch, or all of them.
    """
    num_visible = int(num_patches * (1 - ratio))
    if not 0 < ratio < 1 or not 0 < num_visible < num_patches:
        raise ValueError(f"{name} {ratio} must hide some of {num_patches} patches and leave some visible")
    return num_visible
