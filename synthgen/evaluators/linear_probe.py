"""Classification with a linear layer on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int
from torch import Tensor

from synthgen.evaluators import Baseline, EvalData, Need
from synthgen.evaluators._bootstrap import mean_with_interval

__all__ = ["LinearProbe"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Multinomial logistic regression on frozen, standardised features, solved to convergence.

    minimise  mean_i -log softmax(W z_i + b)[y_i] + l2 / 2 |W|^2,    z = (features - mean) / deviation of training

    The problem is convex, so neither seed nor learning rate matters. An ``l2`` of 0 selects the
    strength among ``strengths`` that is best on every fifth training image of a class, held out for this purpose;
    test images are never used for it.
    """

    needs: ClassVar[Need] = "features"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random",)

    l2: float = 0.0  # penalty strength; 0: the best of strengths
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # candidates for l2
    max_steps: int = 200  # LBFGS iterations

    def __post_init__(self) -> None:
        if self.l2 < 0 or not self.strengths or min(self.strengths) <= 0:
            raise ValueError("l2 must be 0 or more, and strengths one or more numbers above 0")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``accuracy`` with its interval, ``train_accuracy``, and the selected ``l2``."""
        train, test = data.labelled()
        train = train.by_key()
        features = train.features.to(torch.float64, copy=True)
        mean, deviation = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
        known = features.sub_(mean).div_(deviation)  # in place: of a million images it is several GB
        asked = (test.features.double() - mean) / deviation
        num_classes = int(train.labels.max()) + 1
        l2 = self.l2 or self.choose(known, train.labels, num_classes)
        weight, bias = self.solve(known, train.labels, num_classes, l2)
        right = ((asked @ weight.T + bias).argmax(1) == test.labels).double()
        fitted = ((known @ weight.T + bias).argmax(1) == train.labels).double().mean()
        accuracy, low, high = mean_with_interval(right.numpy())
        return {"accuracy": accuracy, "low": low, "high": high, "train_accuracy": float(fitted), "l2": l2}

    def choose(self, features: Float64[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int) -> float:
        """The strength that is best on the held-out fifth; a tie goes to the strongest."""
        held_out = _every_fifth(labels)
        if not held_out.any():
            return sorted(self.strengths)[len(self.strengths) // 2]
        scores, used, others = {}, features[~held_out], features[held_out]
        for l2 in sorted(self.strengths):
            weight, bias = self.solve(used, labels[~held_out], num_classes, l2)
            right = (others @ weight.T + bias).argmax(1) == labels[held_out]
            scores[l2] = (int(right.sum()), l2)
        return max(scores, key=lambda l2: scores[l2])

    def solve(
        self, features: Float64[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int, l2: float
    ) -> tuple[Float64[Tensor, "c d"], Float64[Tensor, " c"]]:
        """Solve for the weights and biases at the minimum."""
        weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=self.max_steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(features @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            solver.step(closure)  # type: ignore[no-untyped-call]
        return weight.detach(), bias.detach()


def _every_fifth(labels: Int[Tensor, " n"]) -> Tensor:
    """The fifth, tenth, ... image of each class."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for number in range(int(labels.max()) + 1):
        held_out[(labels == number).nonzero()[4::5]] = True
    return held_out
