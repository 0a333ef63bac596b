"""Foreground segmentation on frozen patch features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int, Int16
from scipy import ndimage
from torch import Tensor, nn

from synthgen.errors import ConfigError
from synthgen.evaluators import Baseline, DenseFeatures, EvalData, Need
from synthgen.evaluators._bootstrap import mean_with_interval, spread
from synthgen.evaluators._heads import finite, train_head
from synthgen.mask_shape import box

__all__ = ["Saliency"]

_DOUBLINGS = 2  # times that the patch grid is doubled, at most
_GROUP = 4  # channels per group of the group norm
_THRESHOLDS = 255  # number of thresholds of the F-measure: 0, 1/255, ..., 254/255
_BETA_SQUARED = 0.3  # weights precision more than recall, as usual for saliency
_EIGHT = np.ones((3, 3), bool)  # 8-connectivity


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """Foreground or background of any class, by a small decoder; scored by the mean IoU over images.

    The second half of DiffusionSeg (Ma et al., 2023), where features and training masks come from a frozen generator.
    That paper's decoder, loss and schedule are not known; these are ours. A 1 x 1 convolution projects patches to
    ``width``, two 3 x 3 convolutions follow, then the grid is doubled twice (never beyond the pixels), each time
    followed by a 3 x 3 convolution of half the width, and a last layer gives one logit per cell. The loss is
    cross-entropy, without the cells near a mask's border, where generated masks are least reliable, plus Dice over
    all cells.
    """

    needs: ClassVar[Need] = "patches"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random", "pixels")

    width: int = 64  # channels of the decoder; a multiple of 16
    border: int = 1  # cells on either side of a mask's border that cross-entropy ignores
    seeds: int = 3  # number of trainings; the score is their mean
    steps: int = 300  # training steps
    batch_size: int = 16  # images per step
    learning_rate: float = 2e-3  # peak learning rate
    weight_decay: float = 1e-4  # of AdamW

    def __post_init__(self) -> None:
        if self.width < 16 or self.width % 16:
            raise ValueError(f"width must be a multiple of 16, not {self.width}")
        if min(self.seeds, self.steps, self.batch_size) < 1 or self.border < 0:
            raise ValueError("seeds, steps and batch_size must be 1 or more, and border 0 or more")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ValueError("learning_rate must be above 0, and weight_decay 0 or more")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``iou`` with interval and spread, ``max_f``, ``accuracy``, ``corloc``, and counts.

        Raises:
            ConfigError: there are no images with masks to train or evaluate on, no mask has a pixel, or the training of
                the decoder diverged.
        """
        train, test = data.scenes()
        for name, scenes in (("training", train), ("test", test)):
            if not scenes.pixels.any():
                raise ConfigError(f"no mask of the {name} images has a pixel, so there is no foreground")
        figures = [self.score(self.train(train, data.device, seed), test, data.device) for seed in range(self.seeds)]
        iou, low, high = mean_with_interval(np.mean([one.ious for one in figures], axis=0))
        return {
            "iou": iou,
            "low": low,
            "high": high,
            **spread([float(one.ious.mean()) for one in figures]),
            "max_f": float(np.mean([one.max_f for one in figures])),
            "accuracy": float(np.mean([one.accuracies for one in figures])),
            "corloc": float(np.mean([one.located for one in figures])),
            "images": float(len(test)),
            "seeds": float(self.seeds),
        }

    def train(self, scenes: DenseFeatures, device: str, seed: int) -> nn.Module:
        """Train a decoder that gives a logit for each cell of its grid, on the patches of ``scenes``."""
        (num_channels, grid), size = scenes.patches.shape[1:3], scenes.pixels.shape[1]
        doublings = min(_DOUBLINGS, max(1, size // grid).bit_length() - 1)

        def loss(head: nn.Module, patches: Float[Tensor, "b d h w"], numbers: Int[Tensor, " b"]) -> Tensor:
            logits = head(patches)[:, 0]
            wanted = foreground(scenes.pixels[numbers], logits.shape[-1]).to(device)
            return saliency_loss(logits, wanted, self.border)

        return train_head(
            lambda: decoder(num_channels, self.width, doublings),
            scenes,
            loss,
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            device=device,
        )

    def score(self, head: nn.Module, scenes: DenseFeatures, device: str) -> SaliencyFigures:
        """Evaluate a decoder on images."""
        return compare(self.probabilities(head, scenes, device), scenes)

    def probabilities(
        self, head: nn.Module, scenes: DenseFeatures, device: str
    ) -> Iterator[Float32[np.ndarray, "S S"]]:
        """The foreground probability of each pixel, image by image, computed in batches of the training's size.

        Raises:
            ConfigError: the training of the decoder diverged.
        """
        size = scenes.pixels.shape[1]
        for patches in torch.split(scenes.patches, self.batch_size):
            with torch.inference_mode():
                coarse = finite(head(patches.to(device)))
                logits = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
            yield from logits[:, 0].sigmoid().cpu().numpy()


@dataclass(frozen=True, slots=True)
class SaliencyFigures:
    """Figures of the predictions per image."""

    ious: Float64[np.ndarray, " n"]  # of each image
    accuracies: Float64[np.ndarray, " n"]  # share of correct pixels of each image
    curves: Float64[np.ndarray, "f k"]  # F-measure at each threshold, for each image with foreground
    located: Bool[np.ndarray, " l"]  # whether the box is right, for each image with a ground-truth box

    @property
    def max_f(self) -> float:
        """The maximum of the mean curve: one threshold for all images."""
        return float(self.curves.mean(0).max())


def compare(probabilities: Iterable[Float32[np.ndarray, "S S"]], scenes: DenseFeatures) -> SaliencyFigures:
    """Compare predictions with the truth, image by image; foreground is any class, also one that training lacks."""
    ious, accuracies, curves, located = [], [], [], []
    for probability, pixels, boxes in zip(probabilities, scenes.pixels.numpy(), scenes.boxes, strict=True):
        found, true = probability > 0.5, pixels > 0
        ious.append(iou(found, true))
        accuracies.append(float((found == true).mean()))
        if true.any():
            curves.append(f_curve(probability, true))
        if len(boxes) or true.any():
            places = boxes.double().numpy() if len(boxes) else np.array([box(true)], np.float64)
            located.append(bool((box_ious(main_box(found), places) >= 0.5).any()))
    return SaliencyFigures(np.array(ious), np.array(accuracies), np.stack(curves), np.array(located))


def iou(found: Bool[np.ndarray, "S S"], true: Bool[np.ndarray, "S S"]) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    either = int((found | true).sum())
    return int((found & true).sum()) / either if either else 1.0


def f_curve(probability: Float32[np.ndarray, "S S"], true: Bool[np.ndarray, "S S"]) -> Float64[np.ndarray, " k"]:
    """(1 + 0.3) P R / (0.3 P + R) of the pixels above k / 255, for k from 0 to 254; 0 if none of them is true.

    ``true`` must have a pixel, or recall would be undefined.
    """
    passed = np.ceil(probability * np.float32(_THRESHOLDS)).astype(np.int64)  # number of thresholds below each pixel
    above, right = (
        np.bincount(values, minlength=_THRESHOLDS + 1)[:0:-1].cumsum()[::-1]
        for values in (passed.ravel(), passed[true])
    )
    # P = right / above, R = right / true; multiplied out to avoid a division by 0
    curve: Float64[np.ndarray, " k"] = (1 + _BETA_SQUARED) * right / (_BETA_SQUARED * true.sum() + above)
    return curve


def main_box(found: Bool[np.ndarray, "S S"]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest connected component; the whole image if the mask is empty."""
    labels, num = ndimage.label(found, structure=_EIGHT)
    if not num:
        return 0, 0, found.shape[1], found.shape[0]
    return box(labels == 1 + np.bincount(labels.ravel())[1:].argmax())


def box_ious(one: tuple[int, int, int, int], others: Float64[np.ndarray, "k 4"]) -> Float64[np.ndarray, " k"]:
    """The IoU of a box with others: left, top, right, bottom in pixels, the last two exclusive."""
    edges = np.array(one, np.float64)
    sides = np.minimum(edges[2:], others[:, 2:]) - np.maximum(edges[:2], others[:, :2])
    shared = sides.clip(min=0).prod(1)
    areas = (edges[2:] - edges[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1)
    ious: Float64[np.ndarray, " k"] = shared / (areas - shared)
    return ious


def decoder(num_channels: int, width: int, doublings: int) -> nn.Sequential:
    """A decoder from patch features to one logit per cell, on a grid doubled ``doublings`` times."""
    layers = [*_layer(num_channels, width, 1), *_layer(width, width, 3), *_layer(width, width, 3)]
    for _ in range(doublings):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_layer(width, width // 2, 3)]
        width //= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, kernel_size=1))


def _layer(num_inputs: int, width: int, kernel_size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(num_inputs, width, kernel_size, padding=kernel_size // 2)
    return convolution, nn.GroupNorm(width // _GROUP, width), nn.GELU()


def foreground(pixels: Int16[Tensor, "b S S"], side: int) -> Float32[Tensor, "b s s"]:
    """1 for cells of a coarser grid that are at least half foreground, else 0."""
    share = F.adaptive_avg_pool2d((pixels > 0).float(), side)
    return (share >= 0.5).float()


def saliency_loss(logits: Float[Tensor, "b s s"], true: Float[Tensor, "b s s"], border: int) -> Float[Tensor, ""]:
    """Mean cross-entropy of the cells away from a border, plus Dice over all cells."""
    counts = ~near_border(true, border)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, true, reduction="none")
    return (cross_entropy * counts).sum() / counts.sum().clamp(min=1) + dice_loss(logits.sigmoid(), true)


def dice_loss(probability: Float[Tensor, "b s s"], true: Float[Tensor, "b s s"]) -> Float[Tensor, ""]:
    """1 - (2 sum p y + 1) / (sum p + sum y + 1), averaged over images."""
    shared, both = (probability * true).sum((1, 2)), (probability + true).sum((1, 2))
    return (1 - (2 * shared + 1) / (both + 1)).mean()


def near_border(true: Float[Tensor, "b s s"], cells: int) -> Bool[Tensor, "b s s"]:
    """Where foreground and background both lie within ``cells`` cells, diagonals included."""
    inside, outside = (F.max_pool2d(part, 2 * cells + 1, stride=1, padding=cells) for part in (true, 1 - true))
    return (inside > 0) & (outside > 0)
