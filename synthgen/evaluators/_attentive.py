"""The attention head of DifFormer and DifFeed (Mukhopadhyay et al., 2023): maps of blocks to class scores.

Each map becomes tokens, preceded by a class token, and passes through two transformer blocks; the class tokens of all
timesteps are concatenated and go to a linear layer. There is no positional embedding: only the affine weights of the
tokenizer's norm distinguish positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.evaluators import LabelledFeatureMaps, Latents
from synthgen.evaluators._bootstrap import accuracy_over_seeds
from synthgen.evaluators._heads import finite, fit
from synthgen.models.linear import Linear

__all__ = ["LARGEST", "AttentiveHead", "AttentiveSettings"]

LARGEST = 16  # rows and columns of a map; larger maps are average-pooled to this size
_AT_ONCE = 16  # test images per batch


class Tokenizer(nn.Module):
    """Turn a block's map into tokens: average-pool, normalise over channels and positions, project each position."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, rows, columns = shape
        self.size = min(rows, LARGEST), min(columns, LARGEST)
        self.norm = nn.LayerNorm([channels, *self.size])
        self.project = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Tokens in row-major order."""
        y: Tensor = self.project(self.norm(F.adaptive_avg_pool2d(maps, self.size)))
        return y.flatten(2).mT


class Block(nn.Module):
    """A pre-norm transformer block; queries, keys and values without a bias."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)
        self.mlp = nn.Sequential(Linear(width, mlp_ratio * width), nn.GELU(), Linear(mlp_ratio * width, width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Tokens after attention and the MLP."""
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class AttentiveHead(nn.Module):
    """Class scores from the maps of some blocks at some timesteps.

    Args:
        shapes: channels, rows and columns of each block's map; each has a tokenizer of its own.
        timesteps: number of timesteps; all share the weights of tokenizers and transformer.
        num_classes: number of scores.
        width: width of the tokens.
        depth: number of transformer blocks.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        timesteps: int,
        num_classes: int,
        *,
        width: int = 1024,
        depth: int = 2,
        num_heads: int = 8,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.tokenizers = nn.ModuleList(Tokenizer(shape, width) for shape in shapes)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_ratio) for _ in range(depth)))
        self.classify = Linear(timesteps * width, num_classes)

    def forward(self, maps: Sequence[Float[Tensor, "b t _ _ _"]]) -> Float[Tensor, "b k"]:
        """Class scores; attention mixes the blocks of a timestep, and only the last linear layer mixes timesteps."""
        b, t = maps[0].shape[:2]
        given = zip(self.tokenizers, maps, strict=True)
        tokens = torch.cat([tokenizer(block.flatten(0, 1).float()) for tokenizer, block in given], 1)
        x = self.blocks(torch.cat([self.class_token.expand(b * t, -1, -1), tokens], 1))
        scores: Tensor = self.classify(x[:, 0].reshape(b, -1))
        return scores


L = TypeVar("L", bound=nn.Module)
S = TypeVar("S", LabelledFeatureMaps, Latents)


@dataclass(frozen=True, kw_only=True)
class AttentiveSettings:
    """Settings, training and scoring shared by the evaluators with this head."""

    width: int = 128  # token width
    depth: int = 2  # number of transformer blocks
    num_heads: int = 8  # attention heads, which share the width
    seeds: int = 3  # number of trainings; the score is their mean
    steps: int = 300  # training steps
    batch_size: int = 32  # images per step
    learning_rate: float = 1e-3  # peak learning rate
    weight_decay: float = 0.05  # of AdamW

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.num_heads, self.seeds, self.steps, self.batch_size) < 1:
            raise ValueError("width, depth, num_heads, seeds, steps and batch_size must be 1 or more")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, not {self.width} of {self.num_heads}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ValueError("learning_rate must be above 0, and weight_decay 0 or more")

    def head(self, shapes: Sequence[tuple[int, int, int]], timesteps: int, num_classes: int) -> AttentiveHead:
        """An untrained head with these settings."""
        return AttentiveHead(
            shapes, timesteps, num_classes, width=self.width, depth=self.depth, num_heads=self.num_heads
        )

    def train(
        self, make: Callable[[], L], scores: Callable[[L, S, Tensor], Tensor], train: S, device: str, seed: int
    ) -> L:
        """A learner from ``make``, trained by cross-entropy on ``scores``, the class scores of the images by number."""

        def loss(learner: L, numbers: Int[Tensor, " b"]) -> Tensor:
            return F.cross_entropy(scores(learner, train, numbers), train.labels[numbers].to(device))

        return fit(
            make,
            train.keys,
            loss,
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            device=device,
        )

    def score(
        self, make: Callable[[], L], scores: Callable[[L, S, Tensor], Tensor], train: S, test: S, device: str
    ) -> dict[str, float]:
        """``accuracy`` with its interval and spread, and ``train_accuracy``, over ``seeds`` trainings.

        Raises:
            ConfigError: a training diverged.
        """
        correct, train_accuracies = list[Tensor](), list[float]()
        for seed in range(self.seeds):
            learner = self.train(make, scores, train, device, seed)
            correct.append(_correct(learner, scores, test))
            train_accuracies.append(float(_correct(learner, scores, train).mean()))
        return accuracy_over_seeds(correct, train_accuracies)


def _correct(learner: L, scores: Callable[[L, S, Tensor], Tensor], given: S) -> Tensor:
    """1 for each image that is classified correctly, else 0."""
    with torch.inference_mode():
        batches = torch.split(torch.arange(len(given.labels)), _AT_ONCE)
        guesses = [finite(scores(learner, given, numbers)).argmax(1).cpu() for numbers in batches]
    return (torch.cat(guesses) == given.labels).double()
