"""Which patches are hidden: by chance alone, or those under word masks first."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Hiding", "coverage", "num_visible_patches"]


@dataclass(frozen=True)
class Hiding:
    """Of the hidden patches, a share that rises linearly over the training is taken from the foreground (Free-ATM).

    a     = start + (share - start) * progress
    n_fg  = min( floor(a * num_hidden), number of patches covered by half or more )

    The n_fg most covered patches are hidden, ties by lot; chance takes the rest from all others.
    """

    share: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for name, share in (("foreground_share", self.share), ("foreground_share_start", self.start)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {share}")

    @property
    def guided(self) -> bool:
        """Whether masks matter at all."""
        return max(self.share, self.start) > 0

    def split(
        self, lot: Float[Tensor, "b n"], foreground: Float[Tensor, "b n"], num_visible: int, progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """The visible patches and the hidden ones; ``lot`` is even in [0, 1), the highest are hidden."""
        if self.guided:
            share = self.start + (self.share - self.start) * progress
            by_lot = lot.argsort(dim=1)
            by_score = by_lot.gather(1, foreground.gather(1, by_lot).argsort(dim=1, descending=True, stable=True))
            most = int(share * (lot.shape[1] - num_visible))
            num_guided = (foreground >= 0.5).sum(1, keepdim=True).clamp(max=most)
            rank = by_score.argsort(dim=1)  # 0 for the best covered patch
            lot = lot + (rank < num_guided)  # a guided patch stands behind all that are left to chance
        order = lot.argsort(dim=1)
        return order[:, :num_visible], order[:, num_visible:]


def coverage(masks: Bool[Tensor, "b k H W"], patch_size: int) -> Float[Tensor, "b n"]:
    """How much of each patch lies under the mask of any word, in [0, 1]."""
    return F.avg_pool2d(masks.any(1, keepdim=True).float(), patch_size).flatten(1)


def num_visible_patches(name: str, ratio: float, num_patches: int) -> int:
    """The number of visible patches.

    Raises:
        ValueError: nothing would be hidden, or everything.
    """
    num_visible = int(num_patches * (1 - ratio))
    if not 0 < ratio < 1 or not 0 < num_visible < num_patches:
        raise ValueError(f"{name} {ratio} must hide some of {num_patches} patches and leave some visible")
    return num_visible
