"""Denoise hidden patches, given the visible ones."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synthgen.config import check_range
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._hiding import Hiding, coverage, hidden_share, num_visible_patches
from synthgen.methods._pixels import decoder_size, pixel_range, pixel_target
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import patchify, restore, take, unpatchify
from synthgen.models.masked_denoiser import DecoderKind, MaskedDenoiser
from synthgen.models.vit import VisionTransformer

__all__ = ["DiffMAE"]

#: Random streams of a sample.
HIDING, TIME, NOISE, SAMPLING = range(4)

TIMES = 1000  # time 0 is the clean image, time 1000 nearly pure noise


class DiffMAE(Method):
    """Diffusion as masked autoencoding: hide patches, denoise them given the visible ones (Wei et al., 2023).

    x_t  = sqrt(a_t) x + sqrt(1 - a_t) noise            x: a hidden patch; t ~ U{1..1000}, one per image
    a_t  = product over s = 1..t of (1 - b_s^rho)       b: from 0.0001 to 0.02 in equal steps
    loss = mean over hidden patches of the mean over pixels of (D(x_t, t, E(visible)) - x)^2

    The input of the encoder E are the clean visible patches and no time: it is the plain ViT, at the cost of ``mae``.
    The decoder D gets the time, and the noised patches instead of mask tokens. ``rho`` below 1 is noisier than DDPM; at
    pure noise the task is that of ``mae``. With ``norm_target`` the x of the loss, not that of x_t, is standardised.

    With ``foreground_share`` above 0, patches under word masks are hidden first, as in ``mae``. That is our own
    combination; the paper has no masks of words.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    log_signal: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,  # share of hidden patches
        foreground_share: float = 0.0,  # share of hidden patches taken from under masks; 0: random hiding
        foreground_share_start: float = 0.0,  # the same at the start of the training
        rho: float = 0.8,  # exponent of the noise variances; lower is noisier, 1 is DDPM's schedule
        norm_target: bool = False,  # targets are standardised patches; excludes sampling
        decoder: DecoderKind = "cross-self",  # what noised patches attend to: cross, visible ones; joint, all
        u_links: bool = True,  # later decoder blocks attend to earlier encoder blocks; false: to the last
        decoder_dim: int = 0,  # 0: by the encoder's size
        decoder_depth: int = 0,  # 0: by the encoder's size
    ) -> None:
        super().__init__()
        check_range(ge=0.01, le=3, rho=rho)
        config = encoder.config
        self.num_visible = num_visible_patches("mask_ratio", mask_ratio, config.grid**2)
        self.hiding = Hiding(foreground_share, foreground_share_start)
        self.norm_target = norm_target
        self.encoder = encoder
        self.decoder = MaskedDenoiser(
            encoder,
            kind=decoder,
            u_links=u_links,
            **decoder_size(config, decoder_dim, decoder_depth),
        )
        self.register_buffer("log_signal", schedule(rho), persistent=False)

    @property
    def uses_masks(self) -> bool:
        """Whether masks guide the hiding."""
        return self.hiding.guided

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The error of the hidden patches, with a random time for each image."""
        size, seeds = self.encoder.config.patch_size, batch.seeds
        patches = patchify(batch.images, size)  # b n p
        foreground = coverage(batch.masks, size)  # b n
        order = uniform(seeds, patches.shape[1], stream=HIDING)
        visible, hidden = self.hiding.split(order, foreground, self.num_visible, progress)
        x, times = take(patches, hidden), self.times(seeds)
        noised = self.noised(x, normal(seeds, *x.shape[1:], stream=NOISE), times)
        predicted = self.decoder(noised, times, hidden, self.read(patches, visible))
        errors = ((predicted.float() - pixel_target(x, norm=self.norm_target)) ** 2).mean((1, 2))  # b
        signal = self.log_signal[times].exp()
        metrics = {
            "error_less_noise": _weighted(errors.detach(), signal),
            "error_more_noise": _weighted(errors.detach(), 1 - signal),
        }
        if self.uses_masks:
            metrics["foreground_hidden"] = hidden_share(foreground, hidden)
        return StepOutput(errors.mean(), metrics)

    def times(self, seeds: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """A time for each image, uniform in 1..1000."""
        return (uniform(seeds, stream=TIME) * TIMES).long() + 1

    def noised(
        self, x: Float[Tensor, "b h p"], noise: Float[Tensor, "b h p"], times: Int[Tensor, " b"]
    ) -> Float[Tensor, "b h p"]:
        """Patches noised to their image's time."""
        log = self.log_signal[times][:, None, None]
        return (log / 2).exp() * x + (-log.expm1()).sqrt() * noise

    def read(self, patches: Float[Tensor, "b n p"], visible: Int[Tensor, "b v"]) -> list[Tensor]:
        """The decoder's memory of the visible patches: one pass of the encoder for any number of times."""
        x = self.encoder.embed(take(patches, visible), visible)
        layers = [x := block(x) for block in self.encoder.blocks]
        layers[-1] = self.encoder.norm(x)
        return self.decoder.read(layers, visible)

    @torch.no_grad()
    def sample(
        self,
        images: Float[Tensor, "b 3 H W"],
        hidden: Int[Tensor, "b h"],
        seeds: Int[Tensor, " b"],
        num_steps: int = 100,
    ) -> Float[Tensor, "b 3 H W"]:
        """Inpainting: the images with the patches at ``hidden`` sampled and all others unchanged, bit for bit.

        Input and output are normalised as in batches. Each step samples DDPM's posterior between two times, given the
        decoder's clean patches, clamped to the range of pixels; a single step returns those of time 1000.

        Raises:
            ValueError: an index or num_steps is out of range, or the method was trained with ``norm_target``.
        """
        config, device = self.encoder.config, self.log_signal.device
        images, hidden, seeds = images.to(device), hidden.to(device), seeds.to(device)
        patches = patchify(images, config.patch_size)
        num_patches, num_hidden = patches.shape[1], hidden.shape[1]
        if self.norm_target:
            raise ValueError("norm_target leaves no mean and deviation to sample with; train with norm_target: false")
        if not 1 <= num_steps <= TIMES:
            raise ValueError(f"num_steps must be between 1 and {TIMES}, not {num_steps}")
        indices = set(range(num_patches))
        if not num_hidden or not all(len(indices.intersection(row)) == num_hidden for row in hidden.tolist()):
            raise ValueError(f"hidden must name one or more places from 0 to {num_patches - 1}, each once an image")
        shown = torch.ones_like(patches[:, :, 0]).scatter(1, hidden, 0)
        visible = shown.argsort(dim=1, descending=True, stable=True)[:, : num_patches - num_hidden]
        low, high = pixel_range(config, device)
        memory = self.read(patches, visible)
        shape = num_hidden, patches.shape[2]
        x = normal(seeds, *shape, stream=SAMPLING)
        times = [TIMES * remaining // num_steps for remaining in range(num_steps, -1, -1)]
        for number, (now, then) in enumerate(itertools.pairwise(times), start=1):
            clean = self.decoder(x, torch.full_like(seeds, now), hidden, memory)
            x, deviation = self.posterior(x, clean.float().clamp(low, high), now, then)
            if then:
                x = x + deviation * normal(seeds, *shape, stream=SAMPLING + number)
        return unpatchify(restore(take(patches, visible), x, visible, hidden), config.patch_size)

    def posterior(
        self, x: Float[Tensor, "b h p"], clean: Float[Tensor, "b h p"], now: int, then: int
    ) -> tuple[Float[Tensor, "b h p"], Float[Tensor, ""]]:
        """Mean and deviation of x at the earlier time ``then``, given x at ``now`` (DDPM, equations 6 and 7)."""
        since = self.log_signal[now] - self.log_signal[then]
        gone, noise, before = (-log.expm1() for log in (since, self.log_signal[now], self.log_signal[then]))
        mean = (self.log_signal[then] / 2).exp() * gone / noise * clean + (since / 2).exp() * before / noise * x
        return mean, (before / noise * gone).sqrt()


def schedule(rho: float) -> Float[Tensor, " times"]:
    """log a_t for t = 0..1000; with a low ``rho`` the last a_t themselves would underflow."""
    rates = torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64) ** rho
    return torch.cat([torch.zeros(1), torch.log1p(-rates).cumsum(0).float()])


def _weighted(errors: Float[Tensor, " b"], weights: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    return (errors * weights).sum() / weights.sum().clamp(min=1e-12)
