"""Images as evaluators use them: cropped to the centre square, with the boxes that remain."""

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

__all__ = ["Boxes", "Collate", "Viewed", "Views", "boxes_of_masks", "cut_boxes"]

Edges = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the view
Boxes = tuple[tuple[str, Edges], ...]


@dataclass(frozen=True, slots=True)
class Viewed:
    """One preprocessed image."""

    view: Sample
    boxes: Boxes
    drawn: UInt8[np.ndarray, "s s 3"] | None = None  # the same square at the size of the generator's own images


class Views(Dataset[Viewed]):
    """Samples cropped to the centre square, with the boxes that remain."""

    def __init__(
        self, samples: ImageDataset, numbers: Sequence[int], size: int, *, boxed: Collection[int], drawn_size: int = 0
    ) -> None:
        self.samples, self.numbers, self.size = samples, numbers, size
        self.boxed = boxed  # indices of the samples whose boxes are needed
        self.drawn_size = drawn_size  # 0: there is no generator

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Viewed:
        number = self.numbers[index]
        sample = self.samples[number]
        view = CenterCrop(size=self.size)(sample)
        drawn = CenterCrop(size=self.drawn_size)(replace(sample, label_map=None)).image if self.drawn_size else None
        if number not in self.boxed:
            return Viewed(view, (), drawn)
        if given := self.samples.boxes(number):
            height, width = sample.image.shape[:2]
            return Viewed(view, cut_boxes(given, height, width, self.size), drawn)
        return Viewed(view, () if view.label_map is None else boxes_of_masks(view), drawn)


def cut_boxes(boxes: Sequence[NamedBox], height: int, width: int, size: int) -> Boxes:
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


def boxes_of_masks(view: Sample) -> Boxes:
    """The bounding box of each non-empty word mask."""
    assert view.label_map is not None
    found = []
    for number, word in enumerate(view.words, start=1):
        rows, columns = (np.flatnonzero((view.label_map == number).any(axis)) for axis in (1, 0))
        if len(rows):
            edges = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
            found.append((word, edges))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Collate:
    """Collate rows; pixels become (pixels / 255 - mean) / std. A class so that it can be pickled for workers."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, rows: list[Viewed]) -> tuple[Float[Tensor, "b 3 S S"], list[Viewed]]:
        pixels = torch.from_numpy(np.stack([row.view.image for row in rows])).float()
        images = (pixels / 255 - torch.tensor(self.mean)) / torch.tensor(self.std)
        return images.permute(0, 3, 1, 2).contiguous(), rows
