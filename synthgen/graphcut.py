"""Exact minimum cuts on a pixel grid, and many labels by one exact cut after another.

A labelling ``l`` of the pixels costs

    E(l) = sum_i unary[l_i, i] + sum_(i, j) weight_ij * [l_i != l_j]

with every price in one unit (nats, where unaries are surprises) and no weight below zero. Two labels: the minimum is
exact, being a minimum s-t cut (Greig, Porteous and Seheult, 1989). More labels: alpha-expansion (Boykov, Veksler and
Zabih, 2001), in which each move is such a cut; where no move is left and no unary is negative, the result costs at most
twice the minimum.

Prices are rounded to whole numbers of a small unit once; from there on all is exact. Of all cheapest divisions in two a
cut gives the one that lies inside all others, which is the same whatever maximum flow was found. So the solvers agree
to the last pixel: SciPy's maximum flow, and where numba is installed a compiled one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64, Num
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

__all__ = ["Edges", "MaximumFlow", "Solver", "cut", "ends", "energy", "expand", "fastest", "grid_edges"]

#: A window of a grid.
Slices = tuple[slice, slice]

#: SciPy's flows are int32: all edges of a pixel together stay near this many units, and twice as much below 2^31.
_DEAREST = 2.0**29
#: A pixel that is certain hangs on its side by this many units, more than all of its edges are worth.
HELD = 2**40


@runtime_checkable
class Solver(Protocol):
    """Pairs of pixels, made ready for one minimum cut after another."""

    def __init__(self, size: int, first: Int32[np.ndarray, " pairs"], second: Int32[np.ndarray, " pairs"]) -> None: ...

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int64[np.ndarray, " pairs"]) -> Bool[np.ndarray, " n"]:
        """The pixels on the source's side: the least of the cheapest sets.

        Args:
            gain: what pixel i saves on that side; it hangs on the source by as much, or where negative on the sink.
            capacity: the price of each pair that is parted, not negative.
        """
        ...


@functools.cache
def fastest() -> type[Solver]:
    """The compiled solver where numba is there (and fits the NumPy that is), else SciPy's; both give the same cut."""
    try:
        from synthgen.maxflow import SearchTree
    except ImportError:
        return MaximumFlow
    return SearchTree


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


def grid_edges(
    shape: tuple[int, int],
    neighbours: Iterable[tuple[tuple[int, int], Float[np.ndarray, "h w"]]],
    *,
    free: Bool[np.ndarray, "h w"] | None = None,
) -> Edges:
    """The pairs of pixels that lie an offset apart: ``weight[y, x]`` prices (y, x) with (y + dy, x + dx).

    Pairs that leave the grid or cost nothing are left out, and where ``free`` is given those of which no pixel is free.

    Raises:
        ValueError: a weight is negative or not finite, which no cut can minimise.
    """
    index = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    firsts, seconds, weights = [index[:0, 0]], [index[:0, 0]], [np.empty(0)]
    for offset, weight in neighbours:
        here, there = ends(shape, offset)
        price = weight[here]
        chosen = np.flatnonzero(price if free is None else (price != 0) & (free[here] | free[there]))
        firsts.append(index[here].take(chosen))
        seconds.append(index[there].take(chosen))
        weights.append(price.take(chosen))
    prices = np.concatenate(weights, dtype=np.float64)
    if not (prices.min(initial=0) >= 0 and prices.max(initial=0) < math.inf):
        raise ValueError("the price of an edge must be finite and not negative")
    return Edges(np.concatenate(firsts), np.concatenate(seconds), prices)


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
    solver: type[Solver] | None = None,
) -> Bool[np.ndarray, "h w"]:
    """The cheapest division of the pixels in two, exact up to rounding each price.

    A price is rounded to a power of two, at most 2^-28 of the dearest edge times the most edges of a pixel.

    Where several divisions cost the same, the one that lies inside all the others; so the result depends on the
    arguments alone and not on the order in which a solver works.

    Args:
        inside: the price of each pixel inside, in the unit of ``edges``; may be negative, must be finite.
        outside: its price outside.
        edges: the price of each pair of which one is inside and one outside.
        free: the pixels to decide, all by default. The others are as ``held`` says, and only free pixels are solved.
        held: the pixels that are inside for certain, where not free; none by default.
        solver: what finds the cut, by default the fastest; it changes no pixel.

    Raises:
        ValueError: a price is not finite.
    """
    prices = np.stack([outside.ravel(), inside.ravel()])
    labels = np.zeros(inside.size, dtype=np.intp) if held is None else held.ravel().astype(np.intp)
    chosen = None if free is None else free.ravel()
    return _solve(prices, edges, labels, chosen, 1, solver).reshape(inside.shape).astype(bool)


def expand(
    unaries: Float[np.ndarray, "labels h w"],
    edges: Edges,
    *,
    free: Bool[np.ndarray, "h w"] | None = None,
    start: Int[np.ndarray, "h w"] | None = None,
    max_rounds: int = 5,
    solver: type[Solver] | None = None,
) -> Int[np.ndarray, "h w"]:
    """A cheap labelling by alpha-expansion: each label in turn takes the pixels that lower the energy most.

    Stops when no label can take any, or after ``max_rounds`` rounds. Two labels are one cut, and exact.

    Args:
        unaries: the price of each label at each pixel, finite.
        edges: the price of each pair whose labels differ.
        free: the pixels to decide, all by default; the others keep their label of ``start``.
        start: the labels to begin with, by default each pixel's cheapest.
        max_rounds: rounds over all labels.
        solver: what finds the cuts, by default the fastest; it changes no pixel.

    Raises:
        ValueError: a price is not finite.
    """
    labels = np.argmin(unaries, axis=0) if start is None else start
    prices, chosen = unaries.reshape(len(unaries), -1), None if free is None else free.ravel()
    return _solve(prices, edges, labels.ravel().astype(np.intp), chosen, max_rounds, solver).reshape(labels.shape)


def _solve(
    prices: Float[np.ndarray, "labels n"],
    edges: Edges,
    labels: Int[np.ndarray, " n"],
    free: Bool[np.ndarray, " n"] | None,
    max_rounds: int,
    solver: type[Solver] | None,
) -> Int[np.ndarray, " n"]:
    """Cut or expand, over the free pixels and those that an edge joins to them."""
    if not np.all(np.isfinite(prices)):
        raise ValueError("the price of a pixel must be finite")
    if len(prices) < 2:
        return labels
    if free is None:
        return _divide_or_expand(prices, edges, labels, None, max_rounds, solver)
    inner = free.copy()
    inner[edges.first] = inner[edges.second] = True
    pixels = np.flatnonzero(inner)
    number = np.empty(free.size, dtype=np.int32)
    number[pixels] = np.arange(pixels.size, dtype=np.int32)
    small = Edges(number.take(edges.first), number.take(edges.second), edges.weight)
    result = labels.copy()
    result[pixels] = _divide_or_expand(
        prices.take(pixels, axis=1), small, labels.take(pixels), ~free.take(pixels), max_rounds, solver
    )
    return result


def _divide_or_expand(
    prices: Float[np.ndarray, "labels n"],
    edges: Edges,
    labels: Int[np.ndarray, " n"],
    held: Bool[np.ndarray, " n"] | None,
    max_rounds: int,
    solver: type[Solver] | None,
) -> Int[np.ndarray, " n"]:
    """One cut for two labels, else alpha-expansion. The pairs are made ready once; a cut writes prices alone."""
    whole, half = _rounded(prices, edges, held)
    pairs = (solver or fastest())(labels.size, edges.first, edges.second)
    if len(prices) == 2:
        gain = whole[0] - whole[1]
        if held is not None:
            gain[held] = np.where(labels[held] == 1, HELD, -HELD)
        return pairs.cut(gain, 2 * half).astype(labels.dtype)
    labels, count = labels.copy(), len(prices)
    stuck = 0  # moves in a row that changed nothing; a move that only costs the same changes nothing
    for label in [*range(1, count), 0] * max_rounds:
        taken = _move(whole, edges, half, labels, held, label, pairs)
        labels[taken] = label
        stuck = 0 if taken.any() else stuck + 1
        if stuck == count:
            break
    return labels


def _rounded(
    prices: Float[np.ndarray, "labels n"], edges: Edges, held: Bool[np.ndarray, " n"] | None
) -> tuple[Int64[np.ndarray, "labels n"], Int64[np.ndarray, " edges"]]:
    """Prices above each pixel's least, and half of each edge's price, in one small unit; nothing is rounded after this.

    The unit is a power of two, so that whole prices keep their ties.
    """
    above = (prices - prices.min(axis=0)).astype(np.float64)
    weight = edges.weight
    if held is None:  # dearer than any change of all pixels is never cut, so capping there changes no minimum
        weight = np.minimum(weight, 2 * above.max(axis=0, initial=0).sum())
    most = np.bincount(edges.first).max(initial=0) + np.bincount(edges.second).max(initial=0)  # edges of a pixel
    dearest = most * weight.max(initial=0) or above.max(initial=0)
    scale = 2.0 ** math.floor(math.log2(_DEAREST / max(dearest, 1e-200)))
    whole = np.rint(np.minimum(above * scale, HELD / 2)).astype(np.int64)
    return whole, np.rint(weight * (scale / 2)).astype(np.int64)


def _move(
    prices: Int64[np.ndarray, "labels n"],
    edges: Edges,
    half: Int64[np.ndarray, " edges"],
    labels: Int[np.ndarray, " n"],
    held: Bool[np.ndarray, " n"] | None,
    label: int,
    pairs: Solver,
) -> Bool[np.ndarray, " n"]:
    """The pixels that should change to ``label``, which is the best for all that may keep their label or take this one.

    A pair of other, different labels costs w unless both ends change. That is an edge of w / 2 and w / 2 off the
    price of changing either end, so the move remains a cut with edges that look the same from both ends.
    """
    first, second = labels.take(edges.first), labels.take(edges.second)
    apart = np.flatnonzero((first != second) & (first != label) & (second != label))
    relief = half.take(apart)
    capacity = 2 * half
    capacity[apart] = relief
    gain = prices.take(labels * labels.size + np.arange(labels.size)) - prices[label]
    gain += _sums(edges.first.take(apart), relief, labels.size).astype(np.int64)
    gain += _sums(edges.second.take(apart), relief, labels.size).astype(np.int64)
    if held is not None:
        gain[held] = -HELD
    has_it = labels == label
    gain[has_it] = HELD
    taken: Bool[np.ndarray, " n"] = pairs.cut(gain, capacity) & ~has_it
    return taken


def _sums(where: Int[np.ndarray, " n"], values: Num[np.ndarray, " n"], size: int) -> Float64[np.ndarray, " size"]:
    """The sum of the values that fall on each place."""
    counts = np.bincount(where, weights=values, minlength=size)
    return counts.astype(np.float64, copy=False)  # counts, where there is nothing to add


class MaximumFlow:
    """Minimum cuts by SciPy's maximum flow: what the source still reaches after it."""

    def __init__(self, size: int, first: Int32[np.ndarray, " pairs"], second: Int32[np.ndarray, " pairs"]) -> None:
        self.size, self.first, self.second = size, first, second

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int64[np.ndarray, " pairs"]) -> Bool[np.ndarray, " n"]:
        """See ``Solver``."""
        size, pixels = self.size, np.arange(self.size, dtype=np.int32)
        edges = _sums(self.first, capacity, size) + _sums(self.second, capacity, size)
        most = edges.astype(np.int64) + 1  # more than can flow on
        hang, weight = np.clip(gain, -most, most).astype(np.int32), capacity.astype(np.int32)
        source, sink = size, size + 1
        node = np.where(gain >= HELD, source, np.where(gain <= -HELD, sink, pixels)).astype(np.int32)
        first, second = node.take(self.first), node.take(self.second)
        tails = np.concatenate([np.where(hang > 0, np.int32(source), node), first, second])
        heads = np.concatenate([np.where(hang > 0, node, np.int32(sink)), second, first])
        limits = np.concatenate([np.abs(hang), weight, weight])
        some = np.flatnonzero((limits > 0) & (tails != heads))
        graph = csr_array((limits.take(some), (tails.take(some), heads.take(some))), shape=(size + 2, size + 2))
        residual = graph - maximum_flow(graph, source, sink, method="dinic").flow  # SciPy leaves zeros out of it
        reached = np.zeros(size + 2, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        side: Bool[np.ndarray, " n"] = reached[:size] | (gain >= HELD)
        return side
