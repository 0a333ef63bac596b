"""Semantic segmentation on frozen patch features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Int16
from torch import Tensor, nn

from synthgen.evaluators import Baseline, DenseFeatures, EvalData, Need
from synthgen.evaluators._bootstrap import interval, spread
from synthgen.evaluators._heads import finite, train_head, trunk

__all__ = ["Segmentation"]

_FINER = 4  # heads are trained on a grid this many times finer than the patch grid
_LOGITS = 2**24  # logits upsampled to pixels at a time: 64 MB


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Semantic segmentation by a linear head and by a small decoder, scored by mean IoU over classes.

    The linear head is one layer from a patch's features to its class scores, upsampled bilinearly; the decoder
    projects features to ``width``, applies two 3 x 3 convolutions and gives 4 x 4 scores per patch. Both are trained
    with cross-entropy and scored at the encoder's input size. A class's IoU pools the pixels of all test images;
    ``miou`` is the mean over the classes present in the test images, background included.
    """

    needs: ClassVar[Need] = "patches"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random", "pixels")

    decoder: bool = True  # also train the decoder
    width: int = 64  # channels of the decoder
    seeds: int = 3  # number of trainings; the score is their mean
    steps: int = 400  # training steps
    batch_size: int = 16  # images per step
    learning_rate: float = 0.1  # of the linear head, whose problem is convex
    decoder_learning_rate: float = 5e-3  # of the decoder
    weight_decay: float = 0.01  # of both

    def __post_init__(self) -> None:
        if min(self.width, self.seeds, self.steps, self.batch_size) < 1:
            raise ValueError("width, seeds, steps and batch_size must be 1 or more")
        if not (self.learning_rate > 0 and self.decoder_learning_rate > 0):
            raise ValueError("learning_rate and decoder_learning_rate must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``miou`` of the linear head with interval and spread, its ``pixel_accuracy``, and the same of the decoder.

        Raises:
            ConfigError: there are no images with masks, no mask has a pixel, or a training diverged.
        """
        train, test = data.scenes()
        numbers = self.score(train, test, data.device, decoder=False)
        if self.decoder:
            of_decoder = self.score(train, test, data.device, decoder=True)
            first = {name: numbers[name] for name in ("miou", "low", "high")}
            first["decoder_miou"] = of_decoder["miou"]  # early, because a console truncates the line
            numbers = {**first, **numbers, **{f"decoder_{name}": value for name, value in of_decoder.items()}}
        num_classes = float(len(torch.unique(test.pixels)))
        return {**numbers, "classes": num_classes, "images": float(len(test)), "seeds": float(self.seeds)}

    def score(self, train: DenseFeatures, test: DenseFeatures, device: str, *, decoder: bool) -> dict[str, float]:
        """Train and score one kind of head."""
        counts, setting = [], "decoder_learning_rate" if decoder else "learning_rate"
        for seed in range(self.seeds):
            head = self.train(train, device, seed=seed, decoder=decoder)
            counts.append(count_pixels(head, test, device, setting))
        once = np.ones((1, len(test)))
        scores = [float(mean_iou(*count, once)[0]) for count in counts]
        low, high = interval(lambda times: np.mean([mean_iou(*count, times) for count in counts], axis=0), len(test))
        # correctly classified pixels over all pixels
        right = float(np.mean([shared.sum() / true.sum() for shared, _, true in counts]))
        return {"miou": float(np.mean(scores)), "low": low, "high": high, **spread(scores), "pixel_accuracy": right}

    def train(self, scenes: DenseFeatures, device: str, *, seed: int, decoder: bool) -> nn.Module:
        """Train a head that gives class scores on a grid, on the patches of ``scenes``."""
        num_channels, grid = scenes.patches.shape[1:3]
        num_classes = len(scenes.classes)
        finer = min(_FINER, max(1, scenes.pixels.shape[1] // grid))
        targets = _downsample(scenes.pixels, grid * finer)

        def make() -> nn.Module:
            if not decoder:
                return nn.Conv2d(num_channels, num_classes, kernel_size=1)
            return nn.Sequential(
                trunk(num_channels, self.width),
                nn.Conv2d(self.width, num_classes * finer**2, kernel_size=1),
                nn.PixelShuffle(finer),
            )

        def loss(head: nn.Module, patches: Float[Tensor, "b d h w"], numbers: Int[Tensor, " b"]) -> Tensor:
            wanted = targets[numbers].long().to(device)
            return F.cross_entropy(_upsample(head(patches), wanted.shape[-1]), wanted)

        return train_head(
            make,
            scenes,
            loss,
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.decoder_learning_rate if decoder else self.learning_rate,
            weight_decay=self.weight_decay,
            device=device,
        )


Counts = tuple[Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"]]


def count_pixels(head: nn.Module, scenes: DenseFeatures, device: str, setting: str = "learning_rate") -> Counts:
    """Per image and class, the pixels that are correct, that are predicted, and that are true.

    Raises:
        ConfigError: the training of the head diverged; the message names ``setting``, its learning rate.
    """
    num_classes, size = len(scenes.classes), scenes.pixels.shape[1]
    counts = np.zeros((3, len(scenes), num_classes))
    start, chunk = 0, 1
    with torch.inference_mode():
        while start < len(scenes):
            coarse = finite(head(scenes.patches[start : start + chunk].to(device)), setting)
            guess = _upsample(coarse, size).argmax(1).cpu()
            for row, (found, true) in enumerate(zip(guess, scenes.pixels[start : start + chunk].long(), strict=True)):
                sets = (true[found == true], found, true)
                counts[:, start + row] = [torch.bincount(part.flatten(), minlength=num_classes) for part in sets]
            start += len(guess)
            chunk = max(1, min(64, _LOGITS // (coarse.shape[1] * size * size)))
    shared, predicted, true = counts
    return shared, predicted, true


def mean_iou(
    shared: Float64[np.ndarray, "n c"],
    predicted: Float64[np.ndarray, "n c"],
    true: Float64[np.ndarray, "n c"],
    times: Float64[np.ndarray, "b n"],
) -> Float64[np.ndarray, " b"]:
    """Mean IoU over the classes with true pixels, with image i counted ``times[:, i]`` times."""
    both, found, there = times @ shared, times @ predicted, times @ true
    iou = both / np.maximum(found + there - both, 1)
    shown = there > 0
    mean: Float64[np.ndarray, " b"] = (iou * shown).sum(1) / shown.sum(1)
    return mean


def _upsample(scores: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c S S"]:
    if scores.shape[-1] == size:
        return scores
    return F.interpolate(scores, size=(size, size), mode="bilinear", align_corners=False)


def _downsample(pixels: Int16[Tensor, "n S S"], side: int) -> Int16[Tensor, "n s s"]:
    """The class at the centre of each cell of a coarser grid."""
    places = ((torch.arange(side) + 0.5) * pixels.shape[1] / side).long()
    return pixels[:, places][:, :, places]
