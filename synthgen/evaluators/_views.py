"""The preprocessing of evaluation images: centre square, size, and the boxes within it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from synthgen.augment import CenterCrop
from synthgen.datasets import ImageDataset, NamedBox, Sample

__all__ = ["Boxes", "Collate", "EvalImage", "EvalImages", "clip_boxes", "mask_boxes"]

Edges = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the cropped image
Boxes = tuple[tuple[str, Edges], ...]


@dataclass(frozen=True, slots=True)
class EvalImage:
    """One preprocessed image."""

    sample: Sample
    boxes: Boxes
    generator_image: UInt8[np.ndarray, "s s 3"] | None = None  # the same square at the size of the generator's images


class EvalImages(Dataset[EvalImage]):
    """Samples cropped to the centre square and resized.

    Args:
        samples: the images.
        numbers: which of them, in order.
        size: side in pixels.
        with_boxes: the samples whose boxes are needed.
        generator_size: side of the generator's images; 0 without a generator.
    """

    def __init__(
        self,
        samples: ImageDataset,
        numbers: Sequence[int],
        size: int,
        *,
        with_boxes: Collection[int],
        generator_size: int = 0,
    ) -> None:
        self.samples, self.numbers, self.with_boxes = samples, numbers, with_boxes
        self.size, self.generator_size = size, generator_size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> EvalImage:
        number = self.numbers[index]
        sample = self.samples[number]
        cropped, generator_image = CenterCrop(size=self.size)(sample), None
        if self.generator_size:
            generator_image = CenterCrop(size=self.generator_size)(replace(sample, label_map=None)).image
        boxes: Boxes = ()
        if number in self.with_boxes:
            if given := self.samples.boxes(number):
                height, width = sample.image.shape[:2]
                boxes = clip_boxes(given, height, width, self.size)
            elif cropped.label_map is not None:
                boxes = mask_boxes(cropped)
        return EvalImage(cropped, boxes, generator_image)


def clip_boxes(boxes: Sequence[NamedBox], height: int, width: int, size: int) -> Boxes:
    """Boxes clipped to the centre square of an image and scaled to ``size``; those centred outside it are dropped."""
    side = min(height, width)
    found = []
    for name, x, y, w, h in boxes:
        edges = [(x - (width - side) / 2), (y - (height - side) / 2)]
        edges += [edges[0] + w, edges[1] + h]
        middle = (edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2
        left, top, right, bottom = (min(max(edge, 0.0), side) * size / side for edge in edges)
        if 0 < middle[0] < side and 0 < middle[1] < side and right > left and bottom > top:
            found.append((name, (left, top, right, bottom)))
    return tuple(found)


def mask_boxes(sample: Sample) -> Boxes:
    """The bounding box of each non-empty word mask."""
    assert sample.label_map is not None
    found = []
    for number, word in enumerate(sample.words, start=1):
        rows, columns = (np.flatnonzero((sample.label_map == number).any(axis)) for axis in (1, 0))
        if len(rows):
            edges = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
            found.append((word, edges))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Collate:
    """Stack images as (pixels / 255 - mean) / std. A class so that it can be pickled for loader processes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, rows: list[EvalImage]) -> tuple[Float[Tensor, "b 3 S S"], list[EvalImage]]:
        pixels = torch.from_numpy(np.stack([row.sample.image for row in rows])).float()
        images = (pixels / 255 - torch.tensor(self.mean)) / torch.tensor(self.std)
        return images.permute(0, 3, 1, 2).contiguous(), rows
