"""Classification by nearest neighbours on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int
from torch import Tensor

from synthgen.evaluators import Baseline, EvalData, LabelledFeatures, Need
from synthgen.evaluators._bootstrap import mean_with_interval

__all__ = ["KNN"]

_EQUAL = 1e-6  # cosines closer than this count as equal


@dataclass(frozen=True, kw_only=True)
class KNN:
    """The ``k`` training images with the highest cosine vote, each with exp(cosine / temperature) (Wu et al., 2018).

    ``accuracy`` is the share of test images whose winning class is right. Nothing is trained. All training images as
    near as the ``k``-th (cosines within 1e-6) have the same vote, so their order does not matter in a tie; for an
    encoder with constant features, the class with the most training images wins.
    """

    needs: ClassVar[Need] = "features"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random", "pixels")

    k: int = 20  # number of neighbours
    temperature: float = 0.07  # of the votes: a lower value gives the nearest ones more weight

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(f"k must be 1 or more and temperature above 0, not {self.k} and {self.temperature}")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``accuracy`` with its interval."""
        train, test = data.labelled()
        right = (self.predict(train, test.features) == test.labels).double()
        accuracy, low, high = mean_with_interval(right.numpy())
        return {"accuracy": accuracy, "low": low, "high": high}

    def predict(self, train: LabelledFeatures, features: Float32[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """The class of each row of ``features``; a tie goes to the lowest class number."""
        train = train.by_key()
        known = F.normalize(train.features, dim=1)
        k, num_classes = min(self.k, len(known)), int(train.labels.max()) + 1
        found = []
        for rows in torch.split(F.normalize(features, dim=1), 256):
            similarity = rows @ known.T
            highest, nearest = similarity.topk(min(k + 1, len(known)), dim=1)
            votes = torch.zeros(len(rows), num_classes)
            # subtract the highest: the same winner without overflow
            weights = ((highest[:, :k] - highest[:, :1]) / self.temperature).exp()
            best = votes.scatter_add(1, train.labels[nearest[:, :k]], weights).argmax(1)
            tied = highest[:, k - 1] - highest[:, -1] <= _EQUAL
            if tied.any():
                best[tied] = self._with_equals(similarity[tied], highest[tied, k - 1], train.labels, num_classes)
            found.append(best)
        return torch.cat(found)

    def _with_equals(
        self, similarity: Float32[Tensor, "t n"], last: Float32[Tensor, " t"], labels: Int[Tensor, " n"], classes: int
    ) -> Int[Tensor, " t"]:
        """The class of each row, if all training images as near as the ``last`` neighbour share its vote."""
        equal = (similarity - last[:, None]).abs() <= _EQUAL
        similarity = torch.where(equal, last[:, None], similarity).double()
        weights = ((similarity - similarity.amax(1, keepdim=True)) / self.temperature).exp()
        weights = torch.where(equal | (similarity > last[:, None]), weights, 0.0)
        votes = torch.zeros(len(weights), classes, dtype=torch.float64)
        return votes.scatter_add(1, labels.expand(len(weights), -1), weights).argmax(1)
