"""Denoise images with half of their patches hidden."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.augment import Augment
from synthgen.config import check_range
from synthgen.datasets import ImageDataset, Sample
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._classes import (
    Labels,
    check_labels,
    class_numbers,
    class_vectors,
    classifier_free_guidance,
    labels_of,
    sampled_classes,
)
from synthgen.methods._ema import update_ema
from synthgen.methods._hiding import Hiding, coverage, hidden_share, num_visible_patches
from synthgen.methods._pixels import pixel_target, to_pixels
from synthgen.models.classes import ClassEmbedding
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import Modulation, TimeEmbedding, patchify, take, unpatchify
from synthgen.models.narrow_decoder import NarrowDecoder
from synthgen.models.vit import VisionTransformer, save_encoder

__all__ = ["MaskDiT"]

#: Random streams of a sample.
HIDING, LEVEL, NOISE, SAMPLING, LABEL = range(5)

SIGMA_DATA = 0.5  # deviation of the scaled pixels
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # the sampler's noise levels


class MaskDiT(Method):
    """Masked diffusion transformer: denoise visible patches, reconstruct hidden ones (Zheng et al., 2024; its code).

    y        = x + sigma noise, with ln sigma ~ N(noise_mean, noise_std^2); ``mask_ratio`` of the patches is hidden
    D        = c_skip y + c_out F(c_in y at the visible patches, c_noise), for all patches                  (EDM)
    c_skip   = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2), c_in = 1 / sqrt(sigma^2 + s^2)
    denoise  = mean over visible patches of (sigma^2 + s^2) / (sigma s)^2 (D - x)^2
    rebuild  = mean over hidden patches of (D - norm(y))^2
    loss     = mean over images of denoise + ``rebuild_weight`` rebuild

    x are the encoder's normalised pixels times s = 0.5, the deviation EDM expects; norm standardises each patch. F is
    the encoder on visible patches, then a narrow decoder on all positions; c_noise = ln(sigma) / 4 modulates every
    block (adaLN). Over the last ``tuning_share`` of the training nothing is hidden (or gradually less, with ``tuning``
    "cosine"), which leaves denoise alone: EDM's loss.

    The encoder's modulation is multiplied by c_in sigma, the noise's share of its input. So it vanishes with the noise,
    and the plain ViT on a clean image is the limit of the denoiser at sigma 0. That is our own.

    With ``class_labels`` the vector of the image's class is added to that of c_noise, except for a share
    ``label_dropout`` of the images. So the network can sample with a class, without one, and with classifier-free
    guidance. In the limit of sigma 0 the class has no effect on the encoder either.

    An EMA of the weights samples images, and its encoder is saved in ``average/``.

    With ``foreground_share`` above 0, patches under word masks are hidden first, as in ``mae``. That is our own
    combination; the paper has no masks of words.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    steps: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.5,  # share of hidden patches
        tuning_share: float = 0.1,  # share of the training, at its end, for tuning
        tuning: Literal["unmasked", "cosine"] = "unmasked",  # hide nothing, or from mask_ratio down to nothing by cos^4
        rebuild_weight: float = 0.1,  # weight of the error of hidden patches
        noise_mean: float = -1.2,  # mean of ln sigma
        noise_std: float = 1.2,  # standard deviation of ln sigma
        foreground_share: float = 0.0,  # share of hidden patches taken from under masks; 0: random hiding
        foreground_share_start: float = 0.0,  # the same at the start of the training
        ema_decay: float = 0.999,  # of the EMA of the weights; lower over the first steps
        decoder_dim: int = 0,  # 0: half the encoder's, at least 128 and at most 512
        decoder_depth: int = 0,  # 0: a third of the encoder's
        class_labels: bool = False,  # condition on each image's class
        label_dropout: float = 0.1,  # class_labels: share of images trained without their class
    ) -> None:
        super().__init__()
        config = encoder.config
        if mask_ratio:
            num_visible_patches("mask_ratio", mask_ratio, config.grid**2)
        check_range(ge=0, le=1, tuning_share=tuning_share, ema_decay=ema_decay)
        check_range(ge=0, rebuild_weight=rebuild_weight)
        check_range(ge=0, lt=1, label_dropout=label_dropout)
        if not (noise_std >= 0 and abs(noise_mean) + 5.3 * noise_std <= 12):  # the largest magnitude of a draw is 5.3
            raise ValueError(
                f"noise_mean {noise_mean} and noise_std {noise_std} must keep ln sigma between -12 and 12; "
                "the paper has -1.2 and 1.2"
            )
        self.mask_ratio, self.tuning_share, self.tuning = mask_ratio, tuning_share, tuning
        self.hiding = Hiding(foreground_share, foreground_share_start)
        self.rebuild_weight, self.noise_mean, self.noise_std = rebuild_weight, noise_mean, noise_std
        self.encoder = encoder
        self.time = TimeEmbedding(config.dim)
        self.changes = nn.ModuleList(Modulation(config.dim) for _ in range(config.depth))
        self.decoder = NarrowDecoder(
            encoder,
            dim=decoder_dim or min(512, max(128, config.dim // 2 // 32 * 32)),
            depth=decoder_depth or max(1, config.depth // 3),
        )
        self.classes = ClassEmbedding(config.dim) if class_labels else None
        self.label_dropout = label_dropout
        self.average = copy.deepcopy(self).requires_grad_(False)
        self.ema_decay = ema_decay
        self.register_buffer("steps", torch.zeros(()))

    @property
    def uses_masks(self) -> bool:
        """Whether masks guide the hiding."""
        return self.hiding.guided

    @property
    def copies(self) -> Mapping[str, str]:
        """The EMA is a copy of all."""
        return {"average.": ""}

    def fit_to(self, data: ImageDataset) -> None:
        """Set the classes, those of all of the data."""
        if self.classes is not None:
            self.classes.learn(labels_of(data))
            self.average.classes = copy.deepcopy(self.classes).requires_grad_(False)

    def check(self, samples: Sequence[Sample]) -> None:
        """Check for labels with ``class_labels``, and for masks if guided."""
        super().check(samples)
        if self.classes is not None:
            check_labels(samples)

    def views(self) -> Augment:
        """A flip, as in the paper's code, of the middle square."""
        return Augment(size=self.encoder.config.image_size, scale=(1.0, 1.0), ratio=(1.0, 1.0))

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The error of visible patches, plus ``rebuild_weight`` times that of hidden ones."""
        x = SIGMA_DATA * patchify(batch.images, self.encoder.config.patch_size)  # b n p
        sigma = self.levels(batch.seeds)
        y = x + sigma[:, None, None] * normal(batch.seeds, *x.shape[1:], stream=NOISE)
        foreground = coverage(batch.masks, self.encoder.config.patch_size)  # b n
        visible, hidden = self.split(batch.seeds, foreground, progress)
        numbers, shares = class_numbers(self.classes, batch.labels, batch.seeds, self.label_dropout, stream=LABEL)
        denoised = self.denoise(y, sigma, visible, hidden, numbers)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * ((denoised[:, : visible.shape[1]] - take(x, visible)) ** 2).mean((1, 2))).mean()
        metrics = {"denoise": loss.detach(), **shares}
        if hidden.shape[1]:
            rebuild = ((denoised[:, visible.shape[1] :] - pixel_target(take(y, hidden), norm=True)) ** 2).mean()
            loss = loss + self.rebuild_weight * rebuild
            metrics["rebuild"] = rebuild.detach()
        if self.uses_masks:
            metrics["foreground_hidden"] = hidden_share(foreground, hidden)
        return StepOutput(loss, metrics)

    def levels(self, seeds: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The noise level of each image, sigma."""
        return (self.noise_mean + self.noise_std * normal(seeds, stream=LEVEL)).exp()

    def hidden_ratio(self, progress: float) -> float:
        """The share of hidden patches at this ``progress``."""
        start = 1 - self.tuning_share
        if progress < start or not self.tuning_share:
            return self.mask_ratio
        if self.tuning == "unmasked":
            return 0.0
        return self.mask_ratio * math.cos(math.pi / 2 * (progress - start) / self.tuning_share) ** 4

    def split(
        self, seeds: Int[Tensor, " b"], foreground: Float[Tensor, "b n"], progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """Indices of the visible and of the hidden patches."""
        num_patches = foreground.shape[1]
        num_visible = int(num_patches * (1 - self.hidden_ratio(progress)))
        if num_visible == num_patches:
            return self.whole(len(seeds))
        return self.hiding.split(uniform(seeds, num_patches, stream=HIDING), foreground, num_visible, progress)

    def whole(self, count: int) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """Indices of all patches as visible, in their order, and none as hidden."""
        visible = torch.arange(self.encoder.config.grid**2, device=self.encoder.cls_token.device).expand(count, -1)
        return visible, visible[:, :0]

    def denoise(
        self,
        y: Float[Tensor, "b n p"],
        sigma: Float[Tensor, " b"],
        visible: Int[Tensor, "b v"],
        hidden: Int[Tensor, "b h"],
        numbers: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b n p"]:
        """D: the denoised patches, first the visible ones, then the hidden ones.

        ``numbers`` are the class numbers of the images; None means no class.
        """
        sigma = sigma[:, None, None]
        variance = sigma**2 + SIGMA_DATA**2
        outputs = self.outputs(y, sigma, visible, hidden, numbers).float()
        y = take(y, torch.cat([visible, hidden], dim=1))
        return SIGMA_DATA**2 / variance * y + sigma * SIGMA_DATA * variance.rsqrt() * outputs

    def outputs(
        self,
        y: Float[Tensor, "b n p"],
        sigma: Float[Tensor, "b 1 1"],
        visible: Int[Tensor, "b v"],
        hidden: Int[Tensor, "b h"],
        numbers: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b n p"]:
        """F, the network's outputs in the same order; hidden patches are not part of its input."""
        scale = (sigma**2 + SIGMA_DATA**2).rsqrt()
        times = (1000 * sigma[:, 0, 0].log() / 4).round().long()
        time = self.time(times, class_vectors(self.classes, numbers, len(y)))
        modulations = [scale * sigma * change(time) for change in self.changes]
        features = self.encoder.encode(scale * take(y, visible), visible, modulations)
        outputs: Tensor = self.decoder(features, visible, hidden, time)
        return outputs

    def after_step(self, progress: float) -> None:
        """Update the EMA."""
        update_ema(self.average, self, self.steps, self.ema_decay)

    def export(self, folder: Path) -> None:
        """The encoder of the EMA, in a folder of its own."""
        save_encoder(self.average.encoder, folder / "average")

    @torch.no_grad()
    def sample(
        self,
        seeds: Int[Tensor, " b"],
        num_steps: int = 40,
        *,
        labels: Labels = None,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "b 3 H W"]:
        """New images in [0, 1], one per seed, by the EMA: EDM's Heun sampler without churn, nothing hidden.

        ``num_steps`` noise levels from 80 to 0.002, then 0; every step but the last evaluates the network twice.
        ``labels``, by name or number, are the classes to sample; None is no class. A ``guidance_scale`` w other than 1
        doubles the evaluations: D = none + w (class - none).

        Raises:
            ValueError: num_steps is below 2, or labels and guidance contradict each other, the seeds or the network.
            UnknownName, ConfigError: no class has this name or number.
        """
        if num_steps < 2:
            raise ValueError(f"num_steps must be 2 or more, not {num_steps}")
        config, device = self.encoder.config, self.steps.device
        seeds = seeds.to(device)
        indices = self.whole(len(seeds))
        numbers = sampled_classes(self.average.classes, labels, len(seeds), guidance_scale)

        def slope(y: Tensor, sigma: float) -> Tensor:
            level = torch.full((len(y),), sigma, device=device)
            clean = classifier_free_guidance(partial(self.average.denoise, y, level, *indices), numbers, guidance_scale)
            return (y - clean) / sigma

        high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
        levels = [*((high + (low - high) * number / (num_steps - 1)) ** RHO for number in range(num_steps)), 0.0]
        y = levels[0] * normal(seeds, config.grid**2, 3 * config.patch_size**2, stream=SAMPLING)
        for sigma, after in itertools.pairwise(levels):
            first = slope(y, sigma)
            euler = y + (after - sigma) * first
            y = y + (after - sigma) * (first + slope(euler, after)) / 2 if after else euler
        return to_pixels(unpatchify(y / SIGMA_DATA, config.patch_size), config)
