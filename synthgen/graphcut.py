"""Exact minimum cuts on a pixel grid, and many labels by one exact cut after another.

A labelling ``l`` of the pixels costs

    E(l) = sum_i unary[l_i, i] + sum_(i, j) weight_ij * [l_i != l_j]

with every price in one unit (nats, where unaries are surprises) and no weight below zero. Two labels: the minimum is
exact, being a minimum s-t cut (Greig, Porteous and Seheult, 1989). More labels: alpha-expansion (Boykov, Veksler and
Zabih, 2001), in which each move is such a cut; where no move is left and no unary is negative, the result costs at most
twice the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

__all__ = ["Edges", "cut", "ends", "energy", "expand", "grid_edges"]

#: A window of a grid.
Slices = tuple[slice, slice]

#: SciPy's flows are int32. The whole flow is kept near 2^29, so that a capacity plus a flow stays below 2^31.
_FULL = 2.0**29


@dataclass(frozen=True, slots=True)
class Edges:
    """Pairs of pixels and the price of giving the two different labels. Pixels count row by row."""

    first: Int32[np.ndarray, " edges"]
    second: Int32[np.ndarray, " edges"]
    weight: Float64[np.ndarray, " edges"]

    def __add__(self, other: Edges) -> Edges:
        """Both sets; the prices of a pair that is in both add up."""
        return Edges(
            np.concatenate([self.first, other.first]),
            np.concatenate([self.second, other.second]),
            np.concatenate([self.weight, other.weight]),
        )

    def times(self, factor: float) -> Edges:
        """The same pairs at ``factor`` times the price, which must not be negative."""
        return replace(self, weight=self.weight * factor)

    def where(self, chosen: Bool[np.ndarray, " edges"]) -> Edges:
        """The chosen pairs alone."""
        return Edges(self.first[chosen], self.second[chosen], self.weight[chosen])


def ends(shape: tuple[int, int], offset: tuple[int, int]) -> tuple[Slices, Slices]:
    """Where the pairs of pixels that lie ``offset`` (rows, columns) apart begin and end; empty where none fits."""
    (height, width), (dy, dx) = shape, offset
    rows, columns = max(height - abs(dy), 0), max(width - abs(dx), 0)
    y, x = min(max(-dy, 0), height), min(max(-dx, 0), width)
    return (slice(y, y + rows), slice(x, x + columns)), (slice(y + dy, y + dy + rows), slice(x + dx, x + dx + columns))


def grid_edges(shape: tuple[int, int], neighbours: Iterable[tuple[tuple[int, int], Float[np.ndarray, "h w"]]]) -> Edges:
    """The pairs of pixels that lie an offset apart: ``weight[y, x]`` prices (y, x) with (y + dy, x + dx).

    Pairs that leave the grid or cost nothing are left out.

    Raises:
        ValueError: a weight is negative or not finite, which no cut can minimise.
    """
    index = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    parts = [Edges(index[:0].ravel(), index[:0].ravel(), np.empty(0))]
    for offset, weight in neighbours:
        here, there = ends(shape, offset)
        price = np.asarray(weight, dtype=np.float64)[here].ravel()
        parts.append(Edges(index[here].ravel(), index[there].ravel(), price))
    first, second, weights = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "second", "weight")
    )
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError("the price of an edge must be finite and not negative")
    return Edges(first, second, weights).where(weights > 0)


def energy(unaries: Float[np.ndarray, "labels *grid"], edges: Edges, labels: Int[np.ndarray, "*grid"]) -> float:
    """What a labelling costs: the formula of this module."""
    flat = labels.ravel()
    own = unaries.reshape(len(unaries), -1)[flat, np.arange(flat.size)].sum(dtype=np.float64)
    return float(own + edges.weight[flat[edges.first] != flat[edges.second]].sum())


def cut(
    inside: Float[np.ndarray, "h w"],
    outside: Float[np.ndarray, "h w"],
    edges: Edges,
    *,
    free: Bool[np.ndarray, "h w"] | None = None,
    held: Bool[np.ndarray, "h w"] | None = None,
) -> Bool[np.ndarray, "h w"]:
    """The cheapest division of the pixels in two, exact up to rounding each price.

    A price is rounded to a power of two between 2^-29 and 2^-28 of the whole flow (the cost of the answer, beyond what
    every answer costs, is at most that flow); whole numbers of nats are kept as they are.

    Where several divisions cost the same, the one that lies inside all the others; so the result depends on the
    arguments alone and not on the order in which a solver works.

    Args:
        inside: the price of each pixel inside, in the unit of ``edges``; may be negative, must be finite.
        outside: its price outside.
        edges: the price of each pair of which one is inside and one outside.
        free: the pixels to decide, all by default. The others are as ``held`` says, and only free pixels are solved.
        held: the pixels that are inside for certain, where not free; none by default.

    Raises:
        ValueError: a price is not finite.
    """
    prices = np.stack([outside.ravel(), inside.ravel()])
    labels = np.zeros(inside.size, dtype=np.intp) if held is None else held.ravel().astype(np.intp)
    return _solve(prices, edges, labels, free, max_rounds=1).reshape(inside.shape).astype(bool)


def expand(
    unaries: Float[np.ndarray, "labels h w"],
    edges: Edges,
    *,
    free: Bool[np.ndarray, "h w"] | None = None,
    start: Int[np.ndarray, "h w"] | None = None,
    max_rounds: int = 5,
) -> Int[np.ndarray, "h w"]:
    """A cheap labelling by alpha-expansion: each label in turn takes the pixels that lower the energy most.

    Stops when no label can take any, or after ``max_rounds`` rounds. Two labels are one cut, and exact.

    Args:
        unaries: the price of each label at each pixel, finite.
        edges: the price of each pair whose labels differ.
        free: the pixels to decide, all by default; the others keep their label of ``start``.
        start: the labels to begin with, by default each pixel's cheapest.
        max_rounds: rounds over all labels.
    """
    labels = np.argmin(unaries, axis=0) if start is None else start
    prices = unaries.reshape(len(unaries), -1)
    return _solve(prices, edges, labels.ravel().astype(np.intp), free, max_rounds).reshape(labels.shape)


def _solve(
    prices: Float[np.ndarray, "labels n"],
    edges: Edges,
    labels: Int[np.ndarray, " n"],
    free: Bool[np.ndarray, "h w"] | None,
    max_rounds: int,
) -> Int[np.ndarray, " n"]:
    """Cut or expand, over the free pixels alone."""
    result = labels.copy()
    chosen = slice(None) if free is None else free.ravel()
    if free is not None:
        prices, edges = _fold(prices, edges, free.ravel(), labels)
    if len(prices) == 2:
        result[chosen] = _divide(np.subtract(prices[0], prices[1], dtype=np.float64), edges)
    elif len(prices) > 2:
        result[chosen] = _expand(prices, edges, labels[chosen], max_rounds)
    return result


def _expand(
    prices: Float[np.ndarray, "labels n"], edges: Edges, labels: Int[np.ndarray, " n"], max_rounds: int
) -> Int[np.ndarray, " n"]:
    count = len(prices)
    cost = energy(prices, edges, labels)
    stuck = 0  # moves in a row that changed nothing
    for label in [*range(1, count), 0] * max_rounds:
        moved = _move(prices, edges, labels, label)
        lower = energy(prices, edges, moved)
        if lower < cost:  # rounding inside the cut may make it a little dearer, never let that in
            labels, cost, stuck = moved, lower, 0
        else:
            stuck += 1
        if stuck == count:
            break
    return labels


def _move(
    prices: Float[np.ndarray, "labels n"], edges: Edges, labels: Int[np.ndarray, " n"], label: int
) -> Int[np.ndarray, " n"]:
    """The best labelling in which every pixel keeps its label or takes ``label``.

    A pair of other, different labels costs w unless both ends change. That is an edge of w / 2 and w / 2 off the
    price of changing either end, so the move remains a cut with edges that look the same from both ends.
    """
    first, second = labels[edges.first], labels[edges.second]
    apart = (first != second) & (first != label) & (second != label)
    half = edges.weight[apart] / 2
    relief = _sums(edges.first[apart], half, labels.size) + _sums(edges.second[apart], half, labels.size)
    softer = replace(edges, weight=np.where(apart, edges.weight / 2, edges.weight))
    other = labels != label
    two = np.stack([prices[labels, np.arange(labels.size)], prices[label] - relief])
    two, softer = _fold(two, softer, other, np.ones_like(labels))
    moved = labels.copy()
    moved[np.flatnonzero(other)[_divide(two[0] - two[1], softer)]] = label
    return moved


def _sums(where: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"], size: int) -> Float64[np.ndarray, " size"]:
    """The sum of the values that fall on each place."""
    return np.bincount(where, weights=values, minlength=size).astype(
        np.float64
    )  # counts, where there is nothing to add


def _fold(
    prices: Float[np.ndarray, "labels n"],
    edges: Edges,
    free: Bool[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
) -> tuple[Float64[np.ndarray, "labels m"], Edges]:
    """The same problem over the free pixels alone, prices less a constant.

    What an edge to a held pixel costs with any other label is taken off the price of that pixel's label.
    """
    first, second = free[edges.first], free[edges.second]
    into, out = first & ~second, second & ~first
    mine = np.concatenate([edges.first[into], edges.second[out]])
    theirs = labels[np.concatenate([edges.second[into], edges.first[out]])]
    weight = np.concatenate([edges.weight[into], edges.weight[out]])
    relief = _sums(theirs * free.size + mine, weight, prices.size).reshape(prices.shape)
    number = np.cumsum(free, dtype=np.int32) - np.int32(1)
    kept = edges.where(first & second)
    inner = replace(kept, first=number[kept.first], second=number[kept.second])
    return prices[:, free] - relief[:, free], inner


def _divide(net: Float64[np.ndarray, " n"], edges: Edges) -> Bool[np.ndarray, " n"]:
    """The minimum cut: pixel i hangs on the source by ``net[i]`` where that is positive, else on the sink."""
    if not np.all(np.isfinite(net)):
        raise ValueError("the price of a pixel must be finite")
    graph, source = _network(net, edges)
    flow = maximum_flow(graph, source, source + 1, method="dinic").flow
    residual = graph - flow  # holds no zeros: SciPy leaves them out of a difference
    reached = np.zeros(source + 2, dtype=bool)
    reached[breadth_first_order(residual, source, return_predecessors=False)] = True
    return reached[:source]


def _network(net: Float64[np.ndarray, " n"], edges: Edges) -> tuple[csr_array, int]:
    """The capacities as SciPy wants them, int32: nodes are the pixels, then source, then sink."""
    size = net.size
    gain, loss = np.maximum(net, 0), np.maximum(-net, 0)
    whole = min(gain.sum(), loss.sum())  # no flow is larger
    largest = max(gain.max(initial=0), loss.max(initial=0), edges.weight.max(initial=0))
    scale = 2.0 ** math.floor(math.log2(_FULL / max(whole or largest, 1e-30)))  # a power of two: equal sums stay equal
    pixels = np.arange(size, dtype=np.int32)
    source, sink = np.full(size, size, dtype=np.int32), np.full(size, size + 1, dtype=np.int32)
    tails = np.concatenate([source, pixels, edges.first, edges.second])
    heads = np.concatenate([pixels, sink, edges.second, edges.first])
    capacity = np.concatenate([gain, loss, edges.weight, edges.weight])
    some = capacity > 0
    shape = (size + 2, size + 2)
    graph = csr_array((capacity[some] * scale, (tails[some], heads[some])), shape=shape)  # adds up equal pairs
    # Dearer than cutting everything is never cut, so capping there changes no minimum and keeps the sums small.
    graph.data = np.rint(np.minimum(graph.data, 1.5 * _FULL)).astype(np.int32)
    return graph, size
