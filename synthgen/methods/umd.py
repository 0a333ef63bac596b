"""Hide patches and add noise in one auto-encoder."""

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
from synthgen.datasets import ImageDataset, Sample
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._classes import (
    Labels,
    asked,
    check_dropout,
    check_labels,
    class_numbers,
    classifier_free_guidance,
    labels_of,
    vectors,
)
from synthgen.methods._ema import check_decay, update_ema
from synthgen.methods._hiding import Hiding, coverage, num_visible_patches
from synthgen.methods._pixels import pixel_range, to_pixels
from synthgen.models.classes import ClassEmbedding
from synthgen.models.decoder import NoiseDecoder
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import Modulation, TimeEmbedding, patchify, take, unpatchify
from synthgen.models.vit import VisionTransformer, save_encoder

__all__ = ["UMD"]

#: Streams of a sample's draws.
LABEL, LOT, TIME, NOISE, SAMPLING = range(-1, 4)  # SAMPLING goes on upwards, by one a step

TIMES = 1000  # noise levels; time 0 is the clean image, time s + 1 is noise level s


class UMD(Method):
    """Unified masked diffusion: clean images mostly hidden, noised ones partly (Hansen-Estruch et al., 2024; its code).

    clean:  time 0, ``clean_mask_ratio`` hidden             L0 = mean over hidden of (pixels - x)^2
    noised: x_s = sqrt(a_s) x + sqrt(1 - a_s) noise, time s + 1, s even in 0..999, ``noisy_mask_ratio`` hidden
            L1 = 1/2 mean over visible of (noise' - noise)^2 + 1/2 mean over hidden of (pixels - x)^2
    loss = r L0 + (1 - r) L1                                r: ``clean_share`` of the batch, in whole images

    a_s is the cosine schedule (Nichol and Dhariwal, 2021). One network does both: the encoder sees visible patches, the
    decoder all places, and the time changes every block (adaLN). At time 0 it changes nothing: what the paper's network
    has to learn about time 0 stands in the blocks' own weights. So the encoder is a plain ViT for clean images.

    With ``class_labels`` a vector of a noised image's class is added to that of its time; a ``label_dropout`` of them
    have none told, and clean images never. So the network can draw with a class and without, and with guidance away
    from none.

    The paper's fine-tuning for drawing goes on from a training without classes, with nothing of noised images hidden,
    classes, and an average of the weights (``ema_decay``), which then draws the images; its encoder is left in
    ``average/``.

    With ``foreground_share`` above 0, patches under word masks are hidden first, as in ``mae``: in clean and noised
    images alike. That is our own combination; the paper has no masks of words.
    """

    guided: ClassVar = {"foreground_share": 0.5}
    added: ClassVar = {"class_labels": False, "label_dropout": 0.1, "ema_decay": 0.0, "crop_area": 0.8}

    levels: Tensor
    steps: Tensor
    average: UMD | None

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        clean_share: float = 0.5,  # share of the images that is not noised
        clean_mask_ratio: float = 0.75,  # share of a clean image's patches that is hidden
        noisy_mask_ratio: float = 0.375,  # the same of a noised image
        foreground_share: float = 0.0,  # of the hidden patches, those from under masks; 0: chance alone
        foreground_share_start: float = 0.0,  # the same at the training's beginning
        decoder_depth: int = 0,  # 0: a third of the encoder's
        class_labels: bool = False,  # the network is told each noised image's class, for drawing by class
        label_dropout: float = 0.1,  # class_labels: share of those whose class is not told, for drawing without
        ema_decay: float = 0.0,  # of an average of the weights; lower over the first steps; 0: there is none
        crop_area: float = 0.8,  # least share of the image that a view shows; 0.95 in the paper's fine-tuning
    ) -> None:
        super().__init__()
        if not 0 <= clean_share < 1:
            raise ValueError(f"clean_share must be at least 0 and below 1 (that would be mae), not {clean_share}")
        if not 0.01 <= crop_area <= 1:
            raise ValueError(f"crop_area must lie between 0.01 and 1, not {crop_area}")
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
        self.label_dropout = check_dropout(label_dropout)
        self.crop_area = crop_area
        self.register_buffer("levels", cosine_schedule(TIMES), persistent=False)
        self.ema_decay = check_decay(ema_decay)
        self.average = copy.deepcopy(self).requires_grad_(False) if ema_decay else None
        if ema_decay:
            self.register_buffer("steps", torch.zeros(()))

    @property
    def uses_masks(self) -> bool:
        """Masks matter where they guide the hiding."""
        return self.hiding.guided

    def fit_to(self, data: ImageDataset) -> None:
        """The classes there are."""
        if self.classes is not None:
            self.classes.learn(labels_of(data))
            if self.average is not None:
                self.average.classes = copy.deepcopy(self.classes).requires_grad_(False)

    @property
    def copies(self) -> Mapping[str, str]:
        """The average, if there is one, follows all."""
        return {"average.": ""} if self.average is not None else {}

    def check(self, samples: Sequence[Sample]) -> None:
        """Labels, if they are told, and masks if guided."""
        super().check(samples)
        if self.classes is not None:
            check_labels(samples)

    def views(self) -> Augment:
        """The paper's code: a crop of 80 % of the area or more (``crop_area``), and a flip."""
        return Augment(size=self.encoder.config.image_size, scale=(self.crop_area, 1.0))

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of a batch: its first images are noised, its last ones stay clean."""
        clean = int(self.clean_share * len(batch))
        noisy = len(batch) - clean
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = coverage(batch.masks, self.encoder.config.patch_size) if batch.masks.shape[1] else None
        if foreground is None:
            foreground = torch.zeros(patches.shape[:2], device=patches.device)
        lot = uniform(batch.seeds, patches.shape[1], stream=LOT)

        # noised
        x, seeds = patches[:noisy], batch.seeds[:noisy]
        levels = (uniform(seeds, stream=TIME) * TIMES).long()
        noise = normal(seeds, *x.shape[1:], stream=NOISE)
        visible, hidden = self.hiding.split(lot[:noisy], foreground[:noisy], self.noisy_visible, progress)
        numbers, shares = class_numbers(self.classes, batch.labels[:noisy], seeds, self.label_dropout, stream=LABEL)
        pixels, guess = self.run(self.noised(x, noise, levels), visible, hidden, levels + 1, numbers)
        noise_error = _error(guess[:, : visible.shape[1]], take(noise, visible))
        whole = not hidden.shape[1]  # nothing hidden: pixels of all patches are asked for
        place, said = (visible, pixels) if whole else (hidden, pixels[:, visible.shape[1] :])
        pixel_error = _error(said, take(x, place))
        loss = (1 - clean / len(batch)) * (noise_error + pixel_error) / 2
        metrics = {"noise_error": noise_error.detach(), "noisy_pixel_error": pixel_error.detach(), **shares}

        if clean:
            x = patches[noisy:]
            visible, hidden = self.hiding.split(lot[noisy:], foreground[noisy:], self.clean_visible, progress)
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
        """Clean pixels and noise as the network sees them: first of the visible patches, then of the hidden ones.

        ``numbers`` are those of noised images' classes; without them they have none.
        """
        time = None if times is None else self.time(times, vectors(self.classes, numbers, len(x)))
        changes = None if time is None else [change(time) for change in self.changes]
        features = self.encoder.encode(take(x, visible), visible, changes)
        pixels, noise = self.decoder(features, visible, hidden, time)
        return pixels, noise

    def noise(
        self, x: Float[Tensor, "b n p"], time: int, numbers: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """The noise in whole noised images of one time."""
        visible = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        _, noise = self.run(x, visible, visible[:, :0], torch.full((len(x),), time, device=x.device), numbers)
        return noise

    def after_step(self, progress: float) -> None:
        """The average, if there is one, follows: it forgets at ``ema_decay`` a step, and faster at first."""
        if self.average is not None:
            update_ema(self.average, self, self.steps, self.ema_decay)

    def export(self, folder: Path) -> None:
        """The averaged encoder, if there is one, as a folder of its own."""
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
        """New images in [0, 1], one a seed: DDIM with eta 1 from the noise that the network sees, nothing hidden.

        By the averaged weights, if there are any. Without the paper's short training on whole noised images, which
        follows its pretraining, expect rough ones.
        ``labels``, by name or number, are the classes to draw, and None is none. A ``guidance_scale`` w other than 1
        asks twice as often, with the class and without: noise' = none + w (class - none).

        Raises:
            ValueError: num_steps is out of range, or labels and guidance do not fit each other, the seeds or the
                network.
            UnknownName, ConfigError: there is no such class; names the nearest.
        """
        if not 1 <= num_steps <= TIMES:
            raise ValueError(f"num_steps must be between 1 and {TIMES}, not {num_steps}")
        config, device = self.encoder.config, self.levels.device
        seeds = seeds.to(device)
        b, n, p = len(seeds), config.grid**2, 3 * config.patch_size**2
        low, high = pixel_range(config, device)
        network = self if self.average is None else self.average
        numbers = asked(network.classes, labels, b, guidance_scale)
        stride = TIMES // num_steps
        levels = [*range(TIMES - 1, 0, -stride), 0]
        x = normal(seeds, n, p, stream=SAMPLING)
        for number, level in enumerate(levels):
            a = self.levels[level]
            noise = classifier_free_guidance(partial(network.noise, x, level + 1), numbers, guidance_scale)
            clean = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(low, high)
            if not level:
                break
            noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
            before = self.levels[levels[number + 1]]
            sigma = ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
            fresh = normal(seeds, n, p, stream=SAMPLING + 1 + number)
            x = before.sqrt() * clean + (1 - before - sigma**2).clamp(min=0).sqrt() * noise + sigma * fresh
        return to_pixels(unpatchify(clean, config.patch_size), config)


def cosine_schedule(count: int) -> Float[Tensor, " count"]:
    """How much of the image is left at each level, as a variance share; no step takes more than 99.9 % of it."""
    times = torch.arange(count + 1, dtype=torch.float64) / count
    left = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    steps = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return (1 - steps).cumprod(0).float()


def _error(said: Float[Tensor, "b m p"], true: Float[Tensor, "b m p"]) -> Float[Tensor, ""]:
    return ((said.float() - true) ** 2).mean()
