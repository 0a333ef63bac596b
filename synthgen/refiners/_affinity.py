"""Self-attention between cells, as edges of a graph and as a walk along them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64
from scipy.sparse import csr_array

from synthgen.graphcut import Edges, ends, grid_edges
from synthgen.records import AFFINITY_OFFSETS
from synthgen.refiners._words import scaled

__all__ = ["affinity_edges", "walk"]


def affinity_edges(affinity: Float[np.ndarray, "edges h w"]) -> Edges:
    """Self-attention between cells in [0, 1): what is above uniform, over the most that an end gives anyone.

    Both ends are averaged. Attention that falls everywhere alike is 1 everywhere and links nothing.
    """
    given = affinity.astype(np.float64)
    shape = given.shape[1:]
    pairs = [ends(shape, offset) for offset in AFFINITY_OFFSETS]
    most = np.ones(shape)
    for attention, pair in zip(given, pairs, strict=True):
        for end in pair:
            most[end] = np.maximum(most[end], attention[pair[0]])
    above = np.maximum(given - 1, 0)
    for attention, (here, there) in zip(above, pairs, strict=True):
        attention[here] *= 0.5 / most[here] + 0.5 / most[there]
    return grid_edges(shape, zip(AFFINITY_OFFSETS, above, strict=True))


def walk(
    attention: Float64[np.ndarray, "words h w"], links: Edges, num_steps: int, spread: float
) -> Float64[np.ndarray, "words h w"]:
    """Let attention spread along self-attention. A cell without links keeps its own."""
    flat = attention.reshape(len(attention), -1).T
    size = len(flat)
    tails, heads = np.concatenate([links.first, links.second]), np.concatenate([links.second, links.first])
    matrix = csr_array((np.concatenate([links.weight, links.weight]), (tails, heads)), shape=(size, size))
    total = matrix @ np.ones((size, 1))
    for _ in range(num_steps):
        near = np.divide(matrix @ flat, total, out=flat.copy(), where=total > 0)
        flat = (1 - spread) * flat + spread * near
    return scaled(flat.T.reshape(attention.shape))
