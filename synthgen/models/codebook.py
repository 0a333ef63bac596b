"""Ids for patches: the nearest of some codes, which k-means finds once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Codebook"]

#: Directions of most variance that pixels are described by; k-means in many more sees mostly noise.
DIRECTIONS = 8

#: Of k-means; MaPeT's code has as many.
ROUNDS = 20


class Codebook(nn.Module):
    """``size`` codes for vectors; a vector's id is that of its nearest code, by squared distance.

    With ``whiten`` vectors are first described by their directions of most variance, each in units of its deviation:
    without that the brightness of a patch of pixels would be nearly all of its distance to others. Codes and directions
    come from :meth:`fit`, stay as they are from then on, and travel with checkpoints.
    """

    mean: Tensor
    directions: Tensor
    codes: Tensor
    is_fitted: Tensor

    def __init__(self, dim: int, size: int, *, whiten: bool) -> None:
        super().__init__()
        self.whiten = whiten
        kept = min(dim, DIRECTIONS) if whiten else dim
        self.register_buffer("mean", torch.zeros(dim if whiten else 0))
        self.register_buffer("directions", torch.zeros(dim if whiten else 0, kept))
        self.register_buffer("codes", torch.zeros(size, kept))
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))
        self._known_to_be = False

    def fitted(self) -> bool:
        """Whether codes were found, now or before a checkpoint; a device is made to wait only until they are."""
        self._known_to_be = self._known_to_be or bool(self.is_fitted)
        return self._known_to_be

    @torch.no_grad()
    def fit(self, vectors: Float[Tensor, "n c"], lot: Float[Tensor, " n"]) -> None:
        """Find the codes; ``lot`` is even in [0, 1). On the CPU, so that equal vectors give equal codes everywhere."""
        with torch.autocast("cpu", enabled=False):
            points, lot = vectors.float().cpu(), lot.cpu()
            if self.whiten:
                mean = points.mean(0)
                covariance = (points - mean).T @ (points - mean) / len(points)
                values, vectors = torch.linalg.eigh(covariance)
                scale = (values + 1e-4 * values.sum()).clamp(min=1e-8).rsqrt()  # what hardly varies stays small
                self.mean.copy_(mean)
                self.directions.copy_((vectors * scale)[:, -self.directions.shape[1] :])
                points = (points - mean) @ self.directions.cpu()
            self.codes.copy_(kmeans(points, lot, len(self.codes)))
            self.is_fitted.fill_(True)

    @torch.no_grad()
    def forward(self, vectors: Float[Tensor, "b n c"]) -> Int[Tensor, "b n"]:
        """The id of each vector."""
        with torch.autocast(vectors.device.type, enabled=False):
            points = vectors.float().flatten(0, 1)
            if self.whiten:
                points = (points - self.mean) @ self.directions
            return nearest(points, self.codes)[0].view(vectors.shape[:2])


def nearest(points: Float[Tensor, "n d"], codes: Float[Tensor, "k d"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The nearest code of each point, the first of equal ones, and how far it is, squared."""
    lengths = codes.square().sum(1)
    found = [(lengths - 2 * part @ codes.T).min(1) for part in torch.split(points, 4096)]  # no table of all pairs
    distances, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, (distances + points.square().sum(1)).clamp(min=0)


def kmeans(points: Float[Tensor, "n d"], lot: Float[Tensor, " n"], count: int) -> Float[Tensor, "k d"]:
    """``count`` codes of little squared distance to the points (Lloyd's rounds), drawn from the points at first.

    A code that no point is nearest to is put on another point, drawn in proportion to its squared distance (as
    k-means++ draws): else points that are all alike, such as a plain background's, would waste most codes.
    """
    ranks = torch.arange(count) % len(points)  # fewer points than codes: some codes are never used
    codes = points[lot.argsort()[ranks]]
    for _ in range(ROUNDS):
        ids, distances = nearest(points, codes)
        sizes = ids.bincount(minlength=count)
        codes = torch.zeros_like(codes).index_add_(0, ids, points) / sizes.clamp(min=1)[:, None]
        unused = sizes == 0
        drawn = (lot.log() / distances).argsort(descending=True)  # Efraimidis and Spirakis, 2006
        codes[unused] = points[drawn[ranks[: int(unused.sum())]]]
    return codes
