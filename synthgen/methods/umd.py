"""Hide patches and add noise in one autoencoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

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
from synthgen.methods._hiding import Hiding, coverage, num_visible_patches
from synthgen.methods._pixels import pixel_range, to_pixels
from synthgen.models.classes import ClassEmbedding
from synthgen.models.decoder import NoiseDecoder
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import Modulation, TimeEmbedding, patchify, take, unpatchify
from synthgen.models.vit import VisionTransformer, save_encoder

__all__ = ["UMD"]

#: Random streams of a sample; sampling takes one per step, from SAMPLING upwards.
LABEL, HIDING, TIME, NOISE, SAMPLING = range(-1, 4)

TIMES = 1000  # noise levels; time 0 is the clean image, time s + 1 is noise level s


class UMD(Method):
    """Unified masked diffusion: clean images mostly hidden, noised ones partly (Hansen-Estruch et al., 2024; its code).

    clean:  time 0, ``clean_mask_ratio`` hidden             L0 = mean over hidden of (pixels - x)^2
    noised: x_s = sqrt(a_s) x + sqrt(1 - a_s) noise, time s + 1, s ~ U{0..999}, ``noisy_mask_ratio`` hidden
            L1 = 1/2 mean over visible of (noise' - noise)^2 + 1/2 mean over hidden of (pixels - x)^2
    loss = r L0 + (1 - r) L1                                r: ``clean_share`` of the batch, in whole images

    a_s is the cosine schedule (Nichol and Dhariwal, 2021). One network does both: the input of the encoder are visible
    patches, that of the decoder all positions, and the time modulates every block (adaLN). At time 0 the modulation is
    the identity, so the encoder is a plain ViT for clean images; what the paper's network learns for time 0 is part of
    the blocks' own weights.

    With ``class_labels`` the vector of a noised image's class is added to that of its time, except for a share
    ``label_dropout`` of them; clean images get no class. So the network can sample with a class, without one, and with
    classifier-free guidance.

    The paper's fine-tuning for sampling starts from a training without classes. It hides nothing of noised images, adds
    classes, and keeps an EMA of the weights (``ema_decay``), which then samples; its encoder is saved in ``average/``.

    With ``foreground_share`` above 0, patches under word masks are hidden first, as in ``mae``: in clean and noised
    images alike. That is our own combination; the paper has no masks of words.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    levels: Tensor
    steps: Tensor
    average: UMD | None

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        clean_share: float = 0.5,  # share of the images without noise
        clean_mask_ratio: float = 0.75,  # share of hidden patches in a clean image
        noisy_mask_ratio: float = 0.375,  # share of hidden patches in a noised image
        foreground_share: float = 0.0,  # share of hidden patches taken from under masks; 0: random hiding
        foreground_share_start: float = 0.0,  # the same at the start of the training
        decoder_depth: int = 0,  # 0: a third of the encoder's
        class_labels: bool = False,  # condition on each noised image's class
        label_dropout: float = 0.1,  # class_labels: share of images trained without their class
        ema_decay: float = 0.0,  # of an EMA of the weights, lower over the first steps; 0: no EMA
        crop_area: float = 0.8,  # least area of a crop, as a share of the image; 0.95 in the paper's fine-tuning
    ) -> None:
        super().__init__()
        check_range(ge=0, lt=1, clean_share=clean_share, label_dropout=label_dropout)
        check_range(ge=0.01, le=1, crop_area=crop_area)
        check_range(ge=0, le=1, ema_decay=ema_decay)
        config = encoder.config
        num_patches = config.grid**2
        self.clean_visible = num_visible_patches("clean_mask_ratio", clean_mask_ratio, num_patches)
        self.noisy_visible = (
            num_visible_patches("noisy_mask_ratio", noisy_mask_ratio, num_patches) if noisy_mask_ratio else num_patches
        )
        self.hiding = Hiding(foreground_share, foreground_share_start)
        self.clean_share = clean_share
        self.encoder = encoder
        self.time = TimeEmbedding(config.dim)
        self.changes = nn.ModuleList(Modulation(config.dim) for _ in range(config.depth))
        self.decoder = NoiseDecoder(encoder, depth=decoder_depth or max(1, config.depth // 3))
        self.classes = ClassEmbedding(config.dim, deep=True) if class_labels else None
        self.label_dropout = label_dropout
        self.crop_area = crop_area
        self.register_buffer("levels", cosine_schedule(TIMES), persistent=False)
        self.ema_decay = ema_decay
        self.average = copy.deepcopy(self).requires_grad_(False) if ema_decay else None
        if ema_decay:
            self.register_buffer("steps", torch.zeros(()))

    @property
    def uses_masks(self) -> bool:
        """Whether masks guide the hiding."""
        return self.hiding.guided

    def fit_to(self, data: ImageDataset) -> None:
        """Set the classes, those of all of the data."""
        if self.classes is not None:
            self.classes.learn(labels_of(data))
            if self.average is not None:
                self.average.classes = copy.deepcopy(self.classes).requires_grad_(False)

    @property
    def copies(self) -> Mapping[str, str]:
        """The EMA, if there is one, is a copy of all."""
        return {"average.": ""} if self.average is not None else {}

    def check(self, samples: Sequence[Sample]) -> None:
        """Check for labels with ``class_labels``, and for masks if guided."""
        super().check(samples)
        if self.classes is not None:
            check_labels(samples)

    def views(self) -> Augment:
        """The paper's code: a crop of 80 % of the area or more (``crop_area``), and a flip."""
        return Augment(size=self.encoder.config.image_size, scale=(self.crop_area, 1.0))

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of a batch, whose first images are noised and whose last ones stay clean."""
        clean = int(self.clean_share * len(batch))
        noisy = len(batch) - clean
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = coverage(batch.masks, self.encoder.config.patch_size)  # b n
        order = uniform(batch.seeds, patches.shape[1], stream=HIDING)

        # noised
        x, seeds = patches[:noisy], batch.seeds[:noisy]
        levels = (uniform(seeds, stream=TIME) * TIMES).long()
        noise = normal(seeds, *x.shape[1:], stream=NOISE)
        visible, hidden = self.hiding.split(order[:noisy], foreground[:noisy], self.noisy_visible, progress)
        numbers, shares = class_numbers(self.classes, batch.labels[:noisy], seeds, self.label_dropout, stream=LABEL)
        pixels, guess = self.run(self.noised(x, noise, levels), visible, hidden, levels + 1, numbers)
        noise_error = _error(guess[:, : visible.shape[1]], take(noise, visible))
        indices, predicted = (hidden, pixels[:, visible.shape[1] :]) if hidden.shape[1] else (visible, pixels)
        pixel_error = _error(predicted, take(x, indices))  # of all patches, where none is hidden
        loss = (1 - clean / len(batch)) * (noise_error + pixel_error) / 2
        metrics = {"noise_error": noise_error.detach(), "noisy_pixel_error": pixel_error.detach(), **shares}

        if clean:
            x = patches[noisy:]
            visible, hidden = self.hiding.split(order[noisy:], foreground[noisy:], self.clean_visible, progress)
            pixels, _ = self.run(x, visible, hidden)
            clean_error = _error(pixels[:, visible.shape[1] :], take(x, hidden))
            loss = loss + clean / len(batch) * clean_error
            metrics["clean_pixel_error"] = clean_error.detach()
        return StepOutput(loss, metrics)

    def noised(
        self, x: Float[Tensor, "b n p"], noise: Float[Tensor, "b n p"], levels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b n p"]:
        """Patches at their noise levels."""
        a = self.levels[levels][:, None, None]
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def run(
        self,
        x: Float[Tensor, "b n p"],
        visible: Int[Tensor, "b v"],
        hidden: Int[Tensor, "b h"],
        times: Int[Tensor, " b"] | None = None,
        numbers: Int[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n p"]]:
        """Predicted clean pixels and noise, first of the visible patches, then of the hidden ones.

        ``numbers`` are the class numbers of noised images; None means no class.
        """
        time = None if times is None else self.time(times, class_vectors(self.classes, numbers, len(x)))
        modulations = None if time is None else [change(time) for change in self.changes]
        features = self.encoder.encode(take(x, visible), visible, modulations)
        pixels, noise = self.decoder(features, visible, hidden, time)
        return pixels, noise

    def noise(
        self, x: Float[Tensor, "b n p"], time: int, numbers: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """The predicted noise in whole images of one time."""
        visible = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        _, noise = self.run(x, visible, visible[:, :0], torch.full((len(x),), time, device=x.device), numbers)
        return noise

    def after_step(self, progress: float) -> None:
        """Update the EMA, if there is one."""
        if self.average is not None:
            update_ema(self.average, self, self.steps, self.ema_decay)

    def export(self, folder: Path) -> None:
        """The encoder of the EMA, if there is one, in a folder of its own."""
        if self.average is not None:
            save_encoder(self.average.encoder, folder / "average")

    @torch.no_grad()
    def sample(
        self,
        seeds: Int[Tensor, " b"],
        num_steps: int = 125,
        *,
        labels: Labels = None,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "b 3 H W"]:
        """New images in [0, 1], one per seed: DDIM with eta 1, nothing hidden, by the EMA if there is one.

        Each of ``num_steps`` steps evaluates the network once, at levels evenly spaced from 999 to 0. Expect rough
        images without the paper's fine-tuning on whole noised images.
        ``labels``, by name or number, are the classes to sample; None is no class. A ``guidance_scale`` w other than 1
        evaluates the network twice per step: noise' = none + w (class - none).

        Raises:
            ValueError: num_steps is out of range, or labels and guidance contradict each other, the seeds or the
                network.
            UnknownName, ConfigError: no class has this name or number.
        """
        if not 1 <= num_steps <= TIMES:
            raise ValueError(f"num_steps must be between 1 and {TIMES}, not {num_steps}")
        config, device = self.encoder.config, self.levels.device
        seeds = seeds.to(device)
        b, n, p = len(seeds), config.grid**2, 3 * config.patch_size**2
        low, high = pixel_range(config, device)
        network = self if self.average is None else self.average
        numbers = sampled_classes(network.classes, labels, b, guidance_scale)
        levels = torch.linspace(TIMES - 1, 0, num_steps, dtype=torch.float64).round().long().tolist()
        x = normal(seeds, n, p, stream=SAMPLING)
        for number, level in enumerate(levels):
            a = self.levels[level]
            noise = classifier_free_guidance(partial(network.noise, x, level + 1), numbers, guidance_scale)
            clean = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(low, high)
            if number == num_steps - 1:
                break
            noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
            before = self.levels[levels[number + 1]]
            sigma = ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
            fresh = normal(seeds, n, p, stream=SAMPLING + 1 + number)
            x = before.sqrt() * clean + (1 - before - sigma**2).clamp(min=0).sqrt() * noise + sigma * fresh
        return to_pixels(unpatchify(clean, config.patch_size), config)


def cosine_schedule(count: int) -> Float[Tensor, " count"]:
    """a_s, the signal's share of the variance at each level; a step removes 99.9 % of it at most."""
    times = torch.arange(count + 1, dtype=torch.float64) / count
    left = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    steps = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return (1 - steps).cumprod(0).float()


def _error(predicted: Float[Tensor, "b m p"], true: Float[Tensor, "b m p"]) -> Float[Tensor, ""]:
    return ((predicted.float() - true) ** 2).mean()
