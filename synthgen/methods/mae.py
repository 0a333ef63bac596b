"""Reconstruct hidden patches."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._hiding import Hiding, coverage, hidden_share, num_visible_patches
from synthgen.methods._pixels import pixel_decoder, pixel_target
from synthgen.models.draws import uniform
from synthgen.models.layers import patchify, restore, take, unpatchify
from synthgen.models.vit import VisionTransformer

__all__ = ["MAE"]


class MAE(Method):
    """Masked autoencoder: hide most patches, reconstruct their pixels (He et al., 2022, section 3).

    loss = mean over hidden patches of the mean over pixels of (predicted - target)^2

    The target is the patch, standardised with ``norm_pixels``.

    With ``foreground_share`` above 0, patches under word masks are hidden first (after Free-ATM): of the hidden
    patches, a share that rises linearly from ``foreground_share_start`` to ``foreground_share`` over the training is
    taken from the patches at least half covered by masks, most covered first, ties in random order; the rest is drawn
    uniformly from all others. The number of hidden patches is constant, so a guided step costs as much as a plain one.
    An image with too few such patches has more random ones. The idea is Free-ATM's; the numbers are ours, see
    docs/methods.md.

    The default 0 of ``decoder_dim`` and ``decoder_depth`` means the paper's 512 and 8 for encoders of the paper's sizes
    and the encoder's width and half its depth for smaller ones.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,  # share of hidden patches
        foreground_share: float = 0.0,  # share of hidden patches taken from under masks; 0: random hiding
        foreground_share_start: float = 0.0,  # the same at the start of the training
        norm_pixels: bool = True,  # targets are standardised patches
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
        """Whether masks guide the hiding."""
        return self.hiding.guided

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The reconstruction error of the hidden patches."""
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = coverage(batch.masks, self.encoder.config.patch_size)  # b n
        visible, hidden = self.split(batch.seeds, foreground, progress)
        features = self.encoder.encode(take(patches, visible), visible)  # b v+1 d
        predicted = self.decoder(features, visible, hidden)  # b h p
        loss = F.mse_loss(predicted.float(), pixel_target(take(patches, hidden), norm=self.norm_pixels))
        return StepOutput(loss, {"foreground_hidden": hidden_share(foreground, hidden)} if self.uses_masks else {})

    def split(
        self, seeds: Int[Tensor, " b"], foreground: Float[Tensor, "b n"], progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """Indices of the visible and of the hidden patches."""
        return self.hiding.split(uniform(seeds, foreground.shape[1]), foreground, self.num_visible, progress)

    @torch.no_grad()
    def rebuild(self, batch: Batch, progress: float = 0.0) -> tuple[Float[Tensor, "b 3 H W"], Bool[Tensor, "b n"]]:
        """The images with their hidden patches reconstructed, for display, and which patches those are.

        With ``norm_pixels`` each gets its true mean and deviation back, as in the paper's figures.
        """
        size = self.encoder.config.patch_size
        patches = patchify(batch.images, size)
        visible, hidden = self.split(batch.seeds, coverage(batch.masks, size), progress)
        predicted = self.decoder(self.encoder.encode(take(patches, visible), visible), visible, hidden)
        if self.norm_pixels:
            variance, mean = torch.var_mean(take(patches, hidden), dim=2, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        whole = restore(take(patches, visible), predicted, visible, hidden)
        was_hidden = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return unpatchify(whole, size), was_hidden.scatter(1, hidden, True)
