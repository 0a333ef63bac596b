"""Rebuild hidden patches."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._hiding import Hiding, coverage, num_visible_patches
from synthgen.methods._pixels import pixel_decoder, pixel_target
from synthgen.models.draws import uniform
from synthgen.models.layers import patchify, restore, take, unpatchify
from synthgen.models.vit import VisionTransformer

__all__ = ["MAE"]


class MAE(Method):
    """Masked autoencoder: hide most patches, rebuild their pixels (He et al., 2022, section 3).

    loss = mean over hidden patches of the mean over pixels of (predicted - target)^2

    The target is the patch, with ``norm_pixels`` less its own mean and over its own standard deviation.

    With ``foreground_share`` above 0, patches under word masks are hidden first (after Free-ATM): of the hidden
    patches, a share that rises linearly from ``foreground_share_start`` to ``foreground_share`` over the training is
    taken from the patches that masks cover at least by half, most covered first, ties by lot; chance takes the rest
    from all others. The number of hidden patches never changes, so a guided step costs what a plain one does. Where
    an image has too few such patches, or none, chance takes more. The paper at hand names the idea, not these
    numbers: see docs/methods.md.

    ``decoder_dim`` and ``decoder_depth`` of 0 are the paper's 512 and 8 for the sizes of the paper, and the encoder's
    width and half its depth for smaller ones.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,  # share of the patches that is hidden
        foreground_share: float = 0.0,  # of the hidden patches, those from under masks; 0: chance alone
        foreground_share_start: float = 0.0,  # the same at the training's beginning
        norm_pixels: bool = True,  # patches are rebuilt less their mean, over their deviation
        decoder_dim: int = 0,  # 0: by the encoder's size
        decoder_depth: int = 0,  # 0: by the encoder's size
    ) -> None:
        super().__init__()
        self.num_visible = num_visible_patches("mask_ratio", mask_ratio, encoder.config.grid**2)
        self.hiding = Hiding(foreground_share, foreground_share_start)
        self.encoder = encoder
        self.decoder = pixel_decoder(encoder, decoder_dim, decoder_depth)
        self.norm_pixels = norm_pixels

    @property
    def uses_masks(self) -> bool:
        """Masks matter where they guide the hiding."""
        return self.hiding.guided

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The error of the hidden patches."""
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = self.coverage(batch.masks)  # b n
        visible, hidden = self.split(batch.seeds, foreground, progress)
        features = self.encoder.encode(take(patches, visible), visible)  # b v+1 d
        predicted = self.decoder(features, visible, hidden)  # b h p
        loss = F.mse_loss(predicted.float(), pixel_target(take(patches, hidden), norm=self.norm_pixels))
        metrics: dict[str, Tensor] = {}
        if self.uses_masks:
            total = foreground.sum().clamp(min=1e-6)
            metrics["foreground_hidden"] = foreground.gather(1, hidden).sum() / total  # mask_ratio if left to chance
        return StepOutput(loss, metrics)

    def coverage(self, masks: Bool[Tensor, "b k H W"]) -> Float[Tensor, "b n"]:
        """How much of each patch lies under the mask of any word, in [0, 1]."""
        if not (self.uses_masks and masks.shape[1]):
            return torch.zeros(len(masks), self.encoder.config.grid**2, device=masks.device)
        return coverage(masks, self.encoder.config.patch_size)

    def split(
        self, seeds: Int[Tensor, " b"], foreground: Float[Tensor, "b n"], progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """Which patches stay visible and which are hidden."""
        return self.hiding.split(uniform(seeds, foreground.shape[1]), foreground, self.num_visible, progress)

    @torch.no_grad()
    def rebuild(self, batch: Batch, progress: float = 0.0) -> tuple[Float[Tensor, "b 3 H W"], Bool[Tensor, "b n"]]:
        """The images with their hidden patches as the decoder sees them, and which were hidden: for looking at.

        With ``norm_pixels`` the true mean and deviation of each hidden patch are put back, as in the paper's figures.
        """
        size = self.encoder.config.patch_size
        patches = patchify(batch.images, size)
        visible, hidden = self.split(batch.seeds, self.coverage(batch.masks), progress)
        predicted = self.decoder(self.encoder.encode(take(patches, visible), visible), visible, hidden)
        if self.norm_pixels:
            variance, mean = torch.var_mean(take(patches, hidden), dim=2, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        whole = restore(take(patches, visible), predicted, visible, hidden)
        was_hidden = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return unpatchify(whole, size), was_hidden.scatter(1, hidden, True)
