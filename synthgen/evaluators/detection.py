"""Object detection on frozen patch features."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor, nn

from synthgen.errors import ConfigError, MissingDependency
from synthgen.evaluators import Baseline, DenseFeatures, EvalData, Need
from synthgen.evaluators._bootstrap import interval, spread
from synthgen.evaluators._heads import finite, train_head, trunk

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ModuleNotFoundError:
    raise MissingDependency(
        "the evaluator 'detection' needs the library 'pycocotools'; install it with: pip install pycocotools"
    ) from None

__all__ = ["Detection"]

_MOST = 100  # detections per image, as in COCO
_NUMBERS = 2**21  # numbers in an array of the bootstrap: 16 MB
_DRAWS = 400  # bootstrap resamples: one of average precision costs more than one of a mean


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections of all images."""

    images: Int[Tensor, " k"]  # image index
    boxes: Float32[Tensor, "k 4"]  # left, top, right, bottom in pixels
    scores: Float32[Tensor, " k"]
    classes: Int[Tensor, " k"]


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Object detection by a small head without anchors, scored by COCO's average precision (pycocotools).

    Features are projected to ``width`` and pass through two 3 x 3 convolutions; each cell of the patch grid then
    predicts a score per class and the distances to the sides of a box, as in FCOS (Tian et al., 2019). A cell is
    assigned the smallest box that contains its centre within 1.5 cells of the box's centre; scores are trained with
    the focal loss (Lin et al., 2017), distances with generalised IoU. Of the 100 best scores of an image, those below
    ``min_score`` are dropped, and those that overlap a better one of their class by more than ``nms``.
    """

    needs: ClassVar[Need] = "boxes"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random", "pixels")

    width: int = 64  # channels of the head
    min_score: float = 0.05  # boxes with a lower score are dropped
    nms: float = 0.6  # IoU threshold of non-maximum suppression
    seeds: int = 3  # number of trainings; the score is their mean
    steps: int = 300  # training steps
    batch_size: int = 16  # images per step
    learning_rate: float = 5e-3  # peak learning rate
    weight_decay: float = 0.01  # of AdamW

    def __post_init__(self) -> None:
        if min(self.width, self.seeds, self.steps, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError("width, seeds, steps and batch_size must be 1 or more, and learning_rate above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if not (0 <= self.min_score < 1 and 0 < self.nms <= 1):
            raise ValueError("min_score must be 0 or more and below 1, nms above 0 and 1 at most")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``ap`` (IoU 0.5 to 0.95) with interval and spread, ``ap50``, ``ap75``, and counts.

        Raises:
            ConfigError: there are no images with boxes to train on, or none to evaluate on, or a training diverged.
        """
        train, test = data.scenes()
        if not any(map(len, train.boxes)) or not any(map(len, test.boxes)):
            raise ConfigError("no training image has a box, or no test image")
        figures = [
            average_precision(self.detect(self.train(train, data.device, seed), test, data.device), test)
            for seed in range(self.seeds)
        ]
        scores = [score.ap for score in figures]
        low, high = interval(
            lambda times: np.mean([score.resampled(times) for score in figures], 0), len(test), draws=_DRAWS
        )
        ap = float(np.mean(scores))
        return {
            "ap": ap,
            "low": min(low, ap),  # pycocotools rounds in a different order
            "high": max(high, ap),
            **spread(scores),
            "ap50": float(np.mean([score.ap50 for score in figures])),
            "ap75": float(np.mean([score.ap75 for score in figures])),
            "classes": float(len(torch.unique(torch.cat(test.box_classes)))),
            "boxes": float(sum(map(len, test.boxes))),
            "images": float(len(test)),
            "seeds": float(self.seeds),
        }

    def train(self, scenes: DenseFeatures, device: str, seed: int) -> nn.Module:
        """Train a head that predicts class scores and distances for each cell."""
        num_classes, grid = len(scenes.classes) - 1, scenes.patches.shape[2]
        cell = scenes.pixels.shape[1] / grid
        wanted = [
            assign(boxes / cell, classes, grid) for boxes, classes in zip(scenes.boxes, scenes.box_classes, strict=True)
        ]
        targets = torch.stack([classes for classes, _ in wanted])
        sides = torch.stack([boxes for _, boxes in wanted])

        def loss(head: nn.Module, patches: Float[Tensor, "b d h w"], numbers: Int[Tensor, " b"]) -> Tensor:
            logits, found = _boxes(head(patches), num_classes)
            classes, boxes = targets[numbers].to(device), sides[numbers].to(device)
            there = classes > 0
            right = F.one_hot(classes, num_classes + 1)[..., 1:].to(logits.dtype)
            focal = focal_loss(logits, right).sum()
            return (focal + generalised_iou_loss(found[there], boxes[there]).sum()) / max(1, int(there.sum()))

        return train_head(
            lambda: _Head(scenes.patches.shape[1], self.width, num_classes),
            scenes,
            loss,
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            device=device,
        )

    def detect(self, head: nn.Module, scenes: DenseFeatures, device: str) -> Detections:
        """Detections of ``head`` in each image, best first.

        Raises:
            ConfigError: the training of the head diverged.
        """
        size, grid = scenes.pixels.shape[1], scenes.patches.shape[2]
        found = []
        with torch.inference_mode():
            for start in range(0, len(scenes), 64):
                output = finite(head(scenes.patches[start : start + 64].to(device)))
                logits, boxes = _boxes(output, output.shape[1] - 4)
                scores, places = logits.sigmoid().flatten(1).topk(min(_MOST, logits[0].numel()), dim=1)
                cells, classes = places // logits.shape[-1], places % logits.shape[-1]
                boxes = (boxes.gather(1, cells[..., None].expand(-1, -1, 4)) * (size / grid)).clamp(0, size)
                kept = _non_maximum_suppression(boxes, classes, self.nms) & (scores > self.min_score)
                rows = kept.nonzero()[:, 0] + start
                parts = (rows, boxes[kept], scores[kept], classes[kept] + 1)
                found.append(tuple(part.cpu() for part in parts))
        return Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _Head(nn.Module):
    def __init__(self, num_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk(num_channels, width)
        self.out = nn.Conv2d(width, num_classes + 4, kernel_size=1)
        nn.init.constant_(self.out.bias[:num_classes], -math.log(99))  # type: ignore[index]  # scores of 0.01 at first

    def forward(self, patches: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c4 h w"]:
        y: Tensor = self.out(self.trunk(patches))
        return y


@dataclass(frozen=True, slots=True)
class DetectionFigures:
    """COCO's figures for the detections of one head, and what is needed to recompute them on a resampled set."""

    ap: float
    ap50: float
    ap75: float
    matches: tuple[tuple[Int[np.ndarray, " _"], Bool[np.ndarray, "t _"]], ...]  # per class, best score first:
    # the image of each detection, and whether it is correct at each IoU threshold
    boxes: Float64[np.ndarray, "n c"]  # ground-truth boxes per image and class

    def resampled(self, times: Float64[np.ndarray, "b n"]) -> Float64[np.ndarray, " b"]:
        """Average precision at COCO's 101 recalls, with image i counted ``times[:, i]`` times."""
        rows = max(1, _NUMBERS // max(1, *(right.size for _, right in self.matches)))
        parts = [self._resampled(times[start : start + rows]) for start in range(0, len(times), rows)]
        return np.concatenate(parts)

    def _resampled(self, times: Float64[np.ndarray, "b n"]) -> Float64[np.ndarray, " b"]:
        there = times @ self.boxes
        total = np.zeros(len(times))
        for (images, right), truth in zip(self.matches, there.T, strict=True):
            if not len(images):
                continue
            weights = times[:, None, images]
            hits, misses = (weights * right).cumsum(-1), (weights * ~right).cumsum(-1)
            precision = hits / np.maximum(hits + misses, 1e-12)
            precision = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
            recall = hits / np.maximum(truth, 1)[:, None, None]
            reached = np.floor(recall * 100 + 1e-9) + 1  # among the recalls 0, 0.01, ..., 1
            steps = np.diff(reached, axis=-1, prepend=0)
            total += (precision * steps).sum(-1).mean(-1) / 101 * (truth > 0)
        mean: Float64[np.ndarray, " b"] = total / np.maximum((there > 0).sum(1), 1)
        return mean


def average_precision(found: Detections, scenes: DenseFeatures) -> DetectionFigures:
    """Score ``found`` with pycocotools: boxes of any size, 100 per image."""
    truth, printed = COCO(), io.StringIO()
    annotations: list[dict[str, Any]] = []
    for image, (boxes, classes) in enumerate(zip(scenes.boxes, scenes.box_classes, strict=True)):
        for (left, top, right, bottom), number in zip(boxes.tolist(), classes.tolist(), strict=True):
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": number,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    shown = sorted({entry["category_id"] for entry in annotations})
    truth.dataset = {
        "info": {},
        "images": [{"id": image} for image in range(len(scenes))],
        "categories": [{"id": number, "name": scenes.classes[number]} for number in shown],
        "annotations": annotations,
    }
    left_top, right_bottom = found.boxes[:, :2], found.boxes[:, 2:]
    rows = torch.cat(
        [found.images[:, None], left_top, right_bottom - left_top, found.scores[:, None], found.classes[:, None]], 1
    ).double()
    with contextlib.redirect_stdout(printed):  # pycocotools prints its progress
        truth.createIndex()
        results = truth.loadRes(rows.numpy()) if len(rows) else COCO()
        if not len(rows):
            results.dataset = {**truth.dataset, "annotations": []}
            results.createIndex()
        judge = COCOeval(truth, results, iouType="bbox")
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.params.maxDets = [_MOST]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][..., 0, 0]  # threshold, recall, class
    return DetectionFigures(
        float(precision.mean()),
        float(precision[0].mean()),
        float(precision[5].mean()),
        *_matches(judge, len(scenes), len(shown)),
    )


def _matches(judge: Any, num_images: int, num_classes: int) -> tuple[Any, Float64[np.ndarray, "n c"]]:
    matches, boxes = [], np.zeros((num_images, num_classes))
    for number in range(num_classes):
        rows = judge.evalImgs[number * num_images : (number + 1) * num_images]
        there = [(image, row) for image, row in enumerate(rows) if row is not None]
        for image, row in there:
            boxes[image, number] = len(row["gtIds"])
        scores = np.concatenate([row["dtScores"] for _, row in there])
        images = np.concatenate([np.full(len(row["dtScores"]), image) for image, row in there]).astype(np.int64)
        right = np.concatenate([np.asarray(row["dtMatches"]) > 0 for _, row in there], axis=1)
        order = np.argsort(-scores, kind="mergesort")
        matches.append((images[order], right[:, order]))
    return tuple(matches), boxes


def assign(
    boxes: Float32[Tensor, "k 4"], classes: Int[Tensor, " k"], grid: int
) -> tuple[Int[Tensor, " g"], Float32[Tensor, "g 4"]]:
    """The class (0: none) and the box assigned to each cell; boxes in units of cells, cells in row-major order."""
    middle = torch.arange(grid) + 0.5
    y, x = (axis.flatten() for axis in torch.meshgrid(middle, middle, indexing="ij"))
    learned, sides = torch.zeros(grid * grid, dtype=torch.long), torch.zeros(grid * grid, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for number in areas.argsort(descending=True, stable=True).tolist():  # the smallest comes last and wins
        left, top, right, bottom = boxes[number]
        across, down = x - (left + right) / 2, y - (top + bottom) / 2
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        taken = inside & (across.abs() <= 1.5) & (down.abs() <= 1.5)
        taken[(across.square() + down.square()).argmin()] = True  # a box smaller than a cell gets one as well
        learned[taken], sides[taken] = classes[number], boxes[number]
    return learned, sides


def _boxes(
    output: Float[Tensor, "b c4 h w"], num_classes: int
) -> tuple[Float[Tensor, "b cells c"], Float[Tensor, "b cells 4"]]:
    """Class scores (logits), and boxes in units of cells, from a head's output."""
    grid = output.shape[-1]
    flat = output.flatten(2).transpose(1, 2)
    middle = torch.arange(grid, device=output.device) + 0.5
    y, x = (axis.flatten() for axis in torch.meshgrid(middle, middle, indexing="ij"))
    left, top, right, bottom = F.softplus(flat[..., num_classes:]).unbind(-1)
    return flat[..., :num_classes], torch.stack([x - left, y - top, x + right, y + bottom], -1)


def focal_loss(logits: Float[Tensor, "*n"], right: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The focal loss with alpha 0.25 and gamma 2 (Lin et al., 2017)."""
    probability = logits.sigmoid()
    surprise = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
    missed = right * (1 - probability) + (1 - right) * probability
    return (0.25 * right + 0.75 * (1 - right)) * missed.square() * surprise


def generalised_iou_loss(found: Float[Tensor, "k 4"], true: Float[Tensor, "k 4"]) -> Float[Tensor, " k"]:
    """1 - GIoU (Rezatofighi et al., 2019); right and bottom of a box must not be less than its left and top."""
    shared = _area(torch.cat([torch.maximum(found[:, :2], true[:, :2]), torch.minimum(found[:, 2:], true[:, 2:])], 1))
    hull = _area(torch.cat([torch.minimum(found[:, :2], true[:, :2]), torch.maximum(found[:, 2:], true[:, 2:])], 1))
    union = _area(found) + _area(true) - shared
    return 1 - shared / union.clamp(min=1e-6) + (hull - union) / hull.clamp(min=1e-6)


def _area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _non_maximum_suppression(
    boxes: Float[Tensor, "b k 4"], classes: Int[Tensor, "b k"], overlap: float
) -> Bool[Tensor, "b k"]:
    """Which boxes non-maximum suppression keeps, per class and over all images at once; boxes come best first."""
    left_top = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    right_bottom = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared, areas = _area(torch.cat([left_top, right_bottom], -1)), _area(boxes)
    iou = shared / (areas[:, :, None] + areas[:, None] - shared).clamp(min=1e-6)
    rivals = (iou > overlap) & (classes[:, :, None] == classes[:, None])
    stays = torch.ones_like(classes, dtype=torch.bool)
    for better in range(boxes.shape[1] - 1):
        stays[:, better + 1 :] &= ~(rivals[:, better, better + 1 :] & stays[:, better, None])
    return stays
