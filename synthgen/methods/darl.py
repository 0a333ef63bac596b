"""Predict the next patch, or denoise a noised copy of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synthgen.config import check_range
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._hiding import coverage
from synthgen.methods._pixels import pixel_range, pixel_target, to_pixels
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import Block, attend, patchify, unpatchify
from synthgen.models.linear import Linear
from synthgen.models.patch_denoiser import PatchDenoiser
from synthgen.models.vit import VisionTransformer

__all__ = ["DARL"]

#: Random streams of a sample.
GAMMA, NOISE, SAMPLING = range(3)


class DARL(Method):
    """Denoising autoregressive representation learning: predict each patch from those before it (Li et al., 2024).

    h_t  = encoder([S], x_1, ..., x_t-1) at its last token, under a causal mask; [S] is the class token
    loss = mean over images and over t = 1..n of w_t * mean over pixels of (g_t - x_t)^2

    head "denoise": g_t = decoder(sqrt(gamma_t) x_t + sqrt(1 - gamma_t) noise_t, h_t)        gamma_t ~ Beta(beta_a, 1)
    head "mse":     g_t = W h_t + b; with ``norm_pixels`` x_t is standardised

    gamma_t, the signal's share of the power, is drawn for each patch independently. A ``beta_a`` of 0.03 concentrates
    it at 0: most patches are predicted from their context alone, a few are denoised. w_t is 1. The last patch is never
    an input in training. The encoder is the plain ViT, which attends without a causal mask when it is evaluated.

    With ``foreground_weight`` f above 0, patches under word masks weigh more:

    w_t  = (1 + f c_t) / mean over the image's patches of (1 + f c)          c_t: share of patch t under any mask

    So every image weighs the same, and one without masks is in the plain form. That is our own; the paper has no masks
    of words.
    """

    guided: ClassVar = {"foreground_weight": 1.0}

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        head: Literal["denoise", "mse"] = "denoise",  # denoise a noised copy of the next patch, or predict it
        beta_a: float = 0.03,  # denoise: gamma ~ Beta(beta_a, 1); 1 is uniform, lower is noisier
        condition_on_gamma: bool = False,  # denoise: each patch's gamma is an input of the decoder
        norm_pixels: bool = False,  # mse: targets are standardised patches
        foreground_weight: float = 0.0,  # f: a patch under masks has the weight 1 + f
    ) -> None:
        super().__init__()
        check_range(gt=0, beta_a=beta_a)
        check_range(ge=0, foreground_weight=foreground_weight)
        if norm_pixels and head == "denoise":
            raise ValueError("norm_pixels goes with head mse: head denoise predicts the pixels themselves")
        if condition_on_gamma and head == "mse":
            raise ValueError("condition_on_gamma goes with head denoise: head mse has no noise")
        config = encoder.config
        self.encoder = encoder
        self.decoder = (
            PatchDenoiser(encoder, condition_on_gamma=condition_on_gamma)
            if head == "denoise"
            else Linear(config.dim, 3 * config.patch_size**2)
        )
        self.head, self.beta_a, self.norm_pixels = head, beta_a, norm_pixels
        self.foreground_weight = foreground_weight

    @property
    def uses_masks(self) -> bool:
        """Whether masks weight the loss."""
        return self.foreground_weight > 0

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The mean error of all patches, each given those before it."""
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        context, _ = self.read(patches[:, :-1])  # b n d
        if self.head == "denoise":
            gamma = self.gammas(batch.seeds, patches.shape[1])
            noised = mixed(patches, normal(batch.seeds, *patches.shape[1:], stream=NOISE), gamma)
            predicted = self.decoder(noised, context, gamma)
        else:
            predicted = self.decoder(context)
        error = ((predicted.float() - pixel_target(patches, norm=self.norm_pixels)) ** 2).mean(2)  # b n
        if not self.uses_masks:
            return StepOutput(error.mean())
        foreground = coverage(batch.masks, self.encoder.config.patch_size)
        weights = 1 + self.foreground_weight * foreground
        of_foreground = (error.detach() * foreground).sum() / foreground.sum().clamp(min=1e-6)
        return StepOutput((error * weights / weights.mean(1, keepdim=True)).mean(), {"foreground_error": of_foreground})

    def read(
        self, patches: Float[Tensor, "b m p"], past: Sequence[Tensor] = ()
    ) -> tuple[Float[Tensor, "b t d"], list[Tensor]]:
        """The encoder's outputs after [S] and after each patch, and the keys and values of each block.

        ``past`` are the keys and values of earlier calls, [S] among them, which these patches continue.
        """
        start = past[0].shape[3] - 1 if past else 0
        indices = torch.arange(start, start + patches.shape[1], device=patches.device)
        x = self.encoder.embed(patches, indices.expand(len(patches), -1))[:, 1 if past else 0 :]
        cache = []
        for number, block in enumerate(self.encoder.blocks):
            x, keys_values = causal_block(cast(Block, block), x, past[number] if past else None)
            cache.append(keys_values)
        return self.encoder.norm(x), cache

    def gammas(self, seeds: Int[Tensor, " b"], count: int) -> Float[Tensor, "b n"]:
        """gamma of each patch, by the inverse of Beta(a, 1)'s distribution function gamma^a."""
        return uniform(seeds, count, stream=GAMMA) ** (1 / self.beta_a)

    @torch.no_grad()
    def sample(self, seeds: Int[Tensor, " b"], num_steps: int = 50) -> Float[Tensor, "b 3 H W"]:
        """New images in [0, 1], one per seed: patch by patch, each from noise in ``num_steps`` steps of DDPM.

        Raises:
            ValueError: num_steps is below 1, or the head is "mse", which predicts the mean of all possible patches.
        """
        if self.head != "denoise":
            raise ValueError('only head "denoise" samples images; "mse" predicts the mean of all possible patches')
        check_range(ge=1, num_steps=num_steps)
        config, device = self.encoder.config, self.encoder.cls_token.device
        seeds, size = seeds.to(device), 3 * config.patch_size**2
        low, high = pixel_range(config, device)
        patches: list[Tensor] = []
        past: list[Tensor] = []
        for index in range(config.grid**2):
            before = patches[-1] if patches else torch.zeros(len(seeds), 0, size, device=device)
            context, past = self.read(before, past)
            noise = normal(seeds, num_steps + 1, size, stream=SAMPLING + index)
            patches.append(self.sample_patch(context, noise, low, high))
        return to_pixels(unpatchify(torch.cat(patches, dim=1), config.patch_size), config)

    def sample_patch(
        self, context: Float[Tensor, "b 1 d"], noise: Float[Tensor, "b s p"], low: Tensor, high: Tensor
    ) -> Float[Tensor, "b 1 p"]:
        """The next patch: from the first noise, one step per further noise, gamma rising from 0 to 1 by a cosine."""
        x, *fresh = noise[:, :, None].unbind(1)
        gammas = torch.linspace(math.pi / 2, 0, len(fresh) + 1, device=x.device).cos() ** 2
        for (now, after), new in zip(itertools.pairwise(gammas), fresh, strict=True):
            clean = self.decoder(x, context, now.expand(len(x), 1)).clamp(low, high)
            noise_ratio, signal_ratio = (1 - after) / (1 - now), now / after
            x = (
                after.sqrt() * (1 - signal_ratio) / (1 - now) * clean
                + signal_ratio.sqrt() * noise_ratio * x
                + (noise_ratio * (1 - signal_ratio)).sqrt() * new
            )
        return x


def mixed(
    x: Float[Tensor, "b n p"], noise: Float[Tensor, "b n p"], gamma: Float[Tensor, "b n"]
) -> Float[Tensor, "b n p"]:
    """Noised patches: sqrt(gamma) x + sqrt(1 - gamma) noise."""
    return gamma.sqrt()[:, :, None] * x + (1 - gamma).sqrt()[:, :, None] * noise


def causal_block(
    block: Block, x: Float[Tensor, "b m d"], past: Float[Tensor, "2 b h k w"] | None = None
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "2 b h n w"]]:
    """A plain block under a causal mask, and its keys and values, past and new."""
    qkv = block.project_qkv(x).view(*x.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    keys_values = qkv[1:] if past is None else torch.cat([past, qkv[1:]], dim=3)
    m, n = x.shape[1], keys_values.shape[3]
    causal = torch.ones(1, 1, m, n, dtype=torch.bool, device=x.device).tril(n - m)
    x = x + block.attn.proj(attend(qkv[0], keys_values[0], keys_values[1], causal).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x)), keys_values
