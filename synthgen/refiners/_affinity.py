"""Self-attention between cells, as edges of a graph and for propagation along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from scipy.sparse import csr_array

from synthgen.graphcut import Edges, ends, grid_edges
from synthgen.records import AFFINITY_OFFSETS
from synthgen.refiners._words import scaled

__all__ = ["Links", "affinity_edges", "walk"]


def affinity_edges(affinity: Float[np.ndarray, "edges h w"]) -> Edges:
    """Self-attention between cells in [0, 1): the excess over uniform, divided by the largest value of an end.

    Both ends are averaged. Uniform attention is 1 everywhere and links nothing.
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


@dataclass(frozen=True, slots=True)
class Links:
    """Self-attention between cells as a sparse matrix, for :func:`walk`."""

    matrix: csr_array  # weight of the link between two cells
    total: Float64[np.ndarray, "cells 1"]  # row sums

    @classmethod
    def of(cls, edges: Edges) -> Links:
        """Each edge in both directions; a row has two entries per offset, 0 where there is no edge."""
        num_offsets, *shape = edges.weight.shape
        weight = np.zeros((*shape, 2 * num_offsets))
        step = np.empty(2 * num_offsets, dtype=np.int32)
        for k, (dy, dx) in enumerate(edges.offsets):
            here, there = ends((shape[0], shape[1]), (dy, dx))
            weight[..., k], step[k] = edges.weight[k], dy * shape[1] + dx
            weight[(*there, num_offsets + k)], step[num_offsets + k] = edges.weight[k][here], -step[k]
        size = shape[0] * shape[1]
        column = np.clip(np.arange(size, dtype=np.int32)[:, None] + step, 0, size - 1)
        begin = np.arange(0, weight.size + 1, max(len(step), 1), dtype=np.int32)
        matrix = csr_array((weight.ravel(), column.ravel(), begin), shape=(size, size))
        return cls(matrix, matrix @ np.ones((size, 1)))


def walk(
    attention: Float64[np.ndarray, "words h w"], links: Links, num_steps: int, spread: float
) -> Float64[np.ndarray, "words h w"]:
    """Propagate maps along self-attention and scale them to [0, 1]. A cell without links keeps its value."""
    flat = attention.reshape(len(attention), -1).T
    for _ in range(num_steps):
        near = np.divide(links.matrix @ flat, links.total, out=flat.copy(), where=links.total > 0)
        flat = (1 - spread) * flat + spread * near
    return scaled(flat.T.reshape(attention.shape))
