"""The class of the nearest training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int
from torch import Tensor

from synthgen.evaluators import Baseline, Labelled, Material, Need
from synthgen.evaluators._bootstrap import mean_with_interval

__all__ = ["KNN"]


@dataclass(frozen=True, kw_only=True)
class KNN:
    """The ``k`` training images with the highest cosine vote, each with exp(cosine / temperature) (Wu et al., 2018).

    ``accuracy`` is the share of test images whose most voted class is right. Nothing is learned.
    """

    needs: ClassVar[Need] = "features"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random", "pixels")

    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # of the votes: lower counts the nearest more

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(f"k must be 1 or more and temperature above 0, not {self.k} and {self.temperature}")

    def evaluate(self, material: Material) -> dict[str, float]:
        """``accuracy`` with its interval."""
        train, test = material.labelled()
        right = (self.predict(train, test.features) == test.labels).double()
        accuracy, low, high = mean_with_interval(right.numpy())
        return {"accuracy": accuracy, "low": low, "high": high}

    def predict(self, train: Labelled, features: Float32[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """The class of each row of ``features``; of classes with equal votes the one of lowest number."""
        known = F.normalize(train.features, dim=1)
        num_classes = int(train.labels.max()) + 1
        found = []
        for rows in torch.split(F.normalize(features, dim=1), 256):
            similarity, nearest = (rows @ known.T).topk(min(self.k, len(known)), dim=1)
            votes = torch.zeros(len(rows), num_classes)
            # less the highest: the same winner, and no overflow
            weights = ((similarity - similarity[:, :1]) / self.temperature).exp()
            found.append(votes.scatter_add(1, train.labels[nearest], weights).argmax(1))
        return torch.cat(found)
