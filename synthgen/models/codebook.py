"""A codebook by k-means, which gives each patch the id of its nearest code."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Codebook"]

DIRECTIONS = 8  # principal components of whitened vectors; with many more, distances are mostly noise
ROUNDS = 20  # of k-means, as in MaPeT's code


class Codebook(nn.Module):
    """``size`` codes; a vector's id is that of its nearest code, by squared distance.

    With ``whiten``, vectors are first projected on their principal components and divided by each one's deviation:
    otherwise the distance between patches of pixels would be mostly their difference in brightness. :meth:`fit` sets
    codes and components once; checkpoints hold them.
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
        self._is_fitted = False  # a copy of the buffer on the host

    def fitted(self) -> bool:
        """Whether codes exist; once they do, the answer needs no synchronisation with the device."""
        self._is_fitted = self._is_fitted or bool(self.is_fitted)
        return self._is_fitted

    @torch.no_grad()
    def fit(self, vectors: Float[Tensor, "n c"], noise: Float[Tensor, " n"]) -> None:
        """Find the codes; ``noise`` is uniform in [0, 1). On the CPU, so that the codes depend on no device."""
        with torch.autocast("cpu", enabled=False):
            points, noise = vectors.float().cpu(), noise.cpu()
            if self.whiten:
                mean = points.mean(0)
                covariance = (points - mean).T @ (points - mean) / len(points)
                values, vectors = torch.linalg.eigh(covariance)
                scale = (values + 1e-4 * values.sum()).clamp(min=1e-8).rsqrt()  # bounded where variance is tiny
                self.mean.copy_(mean)
                self.directions.copy_((vectors * scale)[:, -self.directions.shape[1] :])
                points = (points - mean) @ self.directions.cpu()
            self.codes.copy_(kmeans(points, noise, len(self.codes)))
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
    """The nearest code of each point, the first of ties, and the squared distance to it."""
    lengths = codes.square().sum(1)
    found = [(lengths - 2 * part @ codes.T).min(1) for part in torch.split(points, 4096)]  # in parts, to save memory
    distances, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, (distances + points.square().sum(1)).clamp(min=0)


def kmeans(points: Float[Tensor, "n d"], noise: Float[Tensor, " n"], count: int) -> Float[Tensor, "k d"]:
    """``count`` codes by Lloyd's k-means, initialised with random points.

    A code without points moves to a point drawn in proportion to its squared distance (as in k-means++): otherwise
    equal points, such as those of a plain background, would waste most codes.
    """
    ranks = torch.arange(count) % len(points)  # with fewer points than codes, some codes are never used
    codes = points[noise.argsort()[ranks]]
    for _ in range(ROUNDS):
        ids, distances = nearest(points, codes)
        sizes = ids.bincount(minlength=count)
        codes = torch.zeros_like(codes).index_add_(0, ids, points) / sizes.clamp(min=1)[:, None]
        unused = sizes == 0
        drawn = (noise.log() / distances).argsort(descending=True)  # Efraimidis and Spirakis, 2006
        codes[unused] = points[drawn[ranks[: int(unused.sum())]]]
    return codes
