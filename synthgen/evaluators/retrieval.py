"""Retrieval of texts by images, and of images by texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int
from torch import Tensor

from synthgen.evaluators import Baseline, EvalData, ImageTextPairs, Need
from synthgen.evaluators._bootstrap import mean_with_interval

__all__ = ["Retrieval"]


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Recall at K in both directions, by cosine between all images and all texts; nothing is trained.

    R@K of images is the share that have one of their own texts among the K nearest; R@K of texts is the share that
    have one of their images among the K nearest. Equal texts are one text with several images. Wrong answers as near
    as the right one rank before it, so an encoder with constant embeddings retrieves nothing.
    """

    needs: ClassVar[Need] = "pairs"
    baselines: ClassVar[tuple[Baseline, ...]] = ()

    ranks: tuple[int, ...] = (1, 5, 10)  # the K of recall at K

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be whole numbers of 1 or more, not {list(self.ranks)}")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``mean_recall`` over both directions and all ranks, its interval, each recall, its ``chance``, and counts."""
        pairs = data.image_text_pairs()
        of_images, of_texts = self.best_ranks(pairs)
        num_images, num_texts = len(pairs.images), len(pairs.texts)
        recalls = {f"image_to_text_r{k}": float((of_images <= k).double().mean()) for k in self.ranks}
        recalls |= {f"text_to_image_r{k}": float((of_texts <= k).double().mean()) for k in self.ranks}
        # an image contributes its own share of the mean and that of its texts: a text of three images is split in three
        levels = torch.tensor(self.ranks)
        texts = (of_texts[:, None] <= levels).double().mean(1)
        share = 1 / torch.bincount(pairs.of_text, minlength=num_texts).double()
        owned = torch.zeros(num_images, dtype=torch.float64)
        owned.index_add_(0, pairs.of_image, (texts * share)[pairs.of_text])
        images = (of_images[:, None] <= levels).double().mean(1)
        sums = (images / num_images + owned / num_texts) / 2 * num_images
        mean, low, high = mean_with_interval(sums.numpy())
        chance = {f"chance_r{k}": self.chance(pairs, k) for k in self.ranks}
        counts = {"images": float(num_images), "texts": float(num_texts)}
        return {"mean_recall": mean, "low": low, "high": high, **recalls, **chance, **counts}

    def best_ranks(self, pairs: ImageTextPairs) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """The rank, from 1, of each image's first right text, and of each text's first right image."""
        images, texts = F.normalize(pairs.images, dim=1), F.normalize(pairs.texts, dim=1)
        return (
            _best_ranks(images, texts, pairs.of_image, pairs.of_text),
            _best_ranks(texts, images, pairs.of_text, pairs.of_image),
        )

    def chance(self, pairs: ImageTextPairs, k: int) -> float:
        """The expected recall of images at ``k`` for a random ranking of the texts."""
        m = len(pairs.texts)
        right = torch.bincount(pairs.of_image, minlength=len(pairs.images)).double()
        missed = torch.ones_like(right)
        for rank in range(min(k, m)):
            missed *= ((m - right - rank) / (m - rank)).clamp(min=0)
        return float(1 - missed.mean())


def _best_ranks(
    asked: Float32[Tensor, "a d"],
    known: Float32[Tensor, "b d"],
    of_asked: Int[Tensor, " p"],
    of_known: Int[Tensor, " p"],
) -> Int[Tensor, " a"]:
    """The rank of the nearest right answer for each row of ``asked``; equally near wrong ones rank first."""
    by_row = torch.argsort(of_asked, stable=True)
    of_asked, of_known = of_asked[by_row], of_known[by_row]
    found = []
    for start in range(0, len(asked), 256):
        similarity = asked[start : start + 256] @ known.T
        first, last = torch.searchsorted(of_asked, torch.tensor([start, start + 256]))
        rows, columns = of_asked[first:last] - start, of_known[first:last]
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[rows, columns] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        before = (similarity >= best - 1e-6) & ~right  # rounding must not separate equal vectors
        found.append(1 + before.sum(1))
    return torch.cat(found)
