"""What an attention head can read off frozen maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float16, Int
from torch import Tensor

from synthgen.evaluators import Baseline, Mapped, Material, Need
from synthgen.evaluators._attentive import AttentiveHead
from synthgen.evaluators._bootstrap import mean_with_interval, spread
from synthgen.evaluators._heads import fitted

__all__ = ["AttentiveProbe"]

_AT_ONCE = 64  # images that are judged together


@dataclass(frozen=True, kw_only=True)
class AttentiveProbe:
    """Classification by a small transformer over the tokens of frozen blocks, trained with cross-entropy.

    Of one block at one timestep that is the attention head of Mukhopadhyay et al. (2023), of several their DifFormer;
    of an encoder its patch tokens are the one block. Theirs has a ``width`` of 1024 and learns for 28 epochs by plain
    SGD; ours learns ``steps`` by AdamW, and its images are noised once and not anew each time.
    """

    needs: ClassVar[Need] = "maps"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random",)

    width: int = 128  # of a token
    depth: int = 2  # transformer blocks
    num_heads: int = 8
    seeds: int = 3  # trainings, of which the score is the mean
    steps: int = 300  # of a training
    batch_size: int = 32  # images a step
    learning_rate: float = 1e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.num_heads, self.seeds, self.steps, self.batch_size) < 1:
            raise ValueError("width, depth, num_heads, seeds, steps and batch_size must be 1 or more")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, not {self.width} of {self.num_heads}")
        if not self.learning_rate > 0:
            raise ValueError("learning_rate must be above 0")

    def evaluate(self, material: Material) -> dict[str, float]:
        """``accuracy`` with its interval and spread, and ``train_accuracy``."""
        train, test = material.mapped()
        right, fit = list[Tensor](), list[float]()
        for seed in range(self.seeds):
            head = self.train(train, material.device, seed)
            right.append(_right(head, test, material.device))
            fit.append(float(_right(head, train, material.device).mean()))
        accuracy, low, high = mean_with_interval(torch.stack(right).mean(0).numpy())
        return {
            "accuracy": accuracy,
            "low": low,
            "high": high,
            **spread([float(one.mean()) for one in right]),
            "train_accuracy": sum(fit) / len(fit),
            "seeds": float(self.seeds),
        }

    def train(self, given: Mapped, device: str, seed: int) -> AttentiveHead:
        """A head for maps as they are given."""
        shapes = [(block.shape[2], block.shape[3], block.shape[4]) for block in given.maps]
        num_classes = int(given.labels.max()) + 1

        def make() -> AttentiveHead:
            return AttentiveHead(
                shapes,
                given.maps[0].shape[1],
                num_classes,
                width=self.width,
                depth=self.depth,
                num_heads=self.num_heads,
            )

        def loss(head: AttentiveHead, numbers: Int[Tensor, " b"]) -> Tensor:
            return F.cross_entropy(head(_of(given, numbers, device)), given.labels[numbers].to(device))

        return fitted(
            make,
            given.keys,
            loss,
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            device=device,
        )


def _of(given: Mapped, numbers: Int[Tensor, " b"], device: str) -> list[Float16[Tensor, "b t _ _ _"]]:
    return [block[numbers].to(device) for block in given.maps]


def _right(head: AttentiveHead, given: Mapped, device: str) -> Tensor:
    """For each image 1 where its class is named, else 0."""
    with torch.inference_mode():
        guesses = [
            head(_of(given, numbers, device)).argmax(1).cpu()
            for numbers in torch.split(torch.arange(len(given.labels)), _AT_ONCE)
        ]
    return (torch.cat(guesses) == given.labels).double()
