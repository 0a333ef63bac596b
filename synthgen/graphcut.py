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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64, Num
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

__all__ = ["Edges", "MaximumFlow", "Slices", "Solver", "ends", "energy", "expand", "fastest", "grid_edges", "window"]

#: A window of a grid.
Slices = tuple[slice, slice]

#: SciPy's flows are int32: all edges of a pixel together stay near this many units, and twice as much below 2^31.
_DEAREST = 2.0**29
#: What costs less than this costs nothing; so the units of float32 prices stay finite.
_CHEAPEST = 2.0**-90
#: A pixel that is certain hangs on its side by this many units, more than all of its edges are worth.
HELD = 2**40


@runtime_checkable
class Solver(Protocol):
    """A grid and which of its pixels are pairs, for one minimum cut after another. Pixels count row by row."""

    def __init__(self, shape: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> None: ...

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int32[np.ndarray, "offsets n"]) -> Bool[np.ndarray, " n"]:
        """The pixels on the source's side: the least of the cheapest sets.

        Args:
            gain: what pixel i saves on that side; it hangs on the source by as much, or where negative on the sink.
            capacity: the price of each pair that is parted, as ``Edges.weight`` has it.
        """
        ...

    def move(
        self,
        prices: Int64[np.ndarray, "labels n"],
        half: Int32[np.ndarray, "offsets n"],
        labels: Int[np.ndarray, " n"],
        label: int,
    ) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, "offsets n"]]:
        """``gain`` and ``capacity`` of the cut that gives ``label`` to the pixels that should change to it.

        A pair of other, different labels costs w unless both ends change. That is an edge of w / 2 and w / 2 off the
        price of changing either end, so the move remains a cut with edges that look the same from both ends.
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
    """Pairs of pixels, and the price of giving the two different labels.

    ``weight[k, y, x]`` prices (y, x) with the pixel ``offsets[k]`` (rows, columns) from it. Where it is 0 there is no
    pair, and so it is where that pixel is not on the grid: ``grid_edges`` sees to it.
    """

    offsets: tuple[tuple[int, int], ...]
    weight: Float[np.ndarray, "offsets h w"]

    def __add__(self, other: Edges) -> Edges:
        """Both sets; the prices of a pair that is in both add up."""
        return Edges(self.offsets + other.offsets, np.concatenate([self.weight, other.weight]))

    def times(self, factor: float) -> Edges:
        """The same pairs at ``factor`` times the price, which must not be negative."""
        return replace(self, weight=self.weight * factor)

    def within(self, part: Slices) -> Edges:
        """The pairs that lie in a part of the grid, on a grid of that size."""
        seen = self.weight[:, *part]
        return grid_edges(seen.shape[1:], zip(self.offsets, seen, strict=True))

    def pairs(
        self,
    ) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
        """One end, the other, and the price, of all pairs that there are; pixels count row by row."""
        where = np.flatnonzero(self.weight)
        offset, first = np.divmod(where, self.weight[0].size) if where.size else (where, where)
        return first, first + _steps(self.weight.shape[1:], self.offsets)[offset], self.weight.take(where)


@functools.lru_cache(maxsize=1024)
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
    offsets, weights = [], []
    for offset, weight in neighbours:
        here, there = ends(shape, offset)
        price = np.zeros_like(weight)
        price[here] = weight[here] if free is None else weight[here] * (free[here] | free[there])
        offsets.append(offset)
        weights.append(price)
    prices = np.stack(weights) if weights else np.zeros((0, *shape))
    if not (prices.min(initial=0) >= 0 and prices.max(initial=0) < math.inf):
        raise ValueError("the price of an edge must be finite and not negative")
    return Edges(tuple(offsets), prices)


def _steps(shape: tuple[int, ...], offsets: Sequence[tuple[int, int]]) -> Int64[np.ndarray, " offsets"]:
    """How far each offset leads in pixels that count row by row."""
    return np.array([dy * shape[1] + dx for dy, dx in offsets], dtype=np.int64)


def energy(unaries: Float[np.ndarray, "labels *grid"], edges: Edges, labels: Int[np.ndarray, "*grid"]) -> float:
    """What a labelling costs: the formula of this module."""
    flat = labels.ravel()
    own = unaries.reshape(len(unaries), -1)[flat, np.arange(flat.size)].sum(dtype=np.float64)
    first, second, weight = edges.pairs()
    return float(own + weight[flat[first] != flat[second]].sum(dtype=np.float64))


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

    Stops when no label can take any, or after ``max_rounds`` rounds. Two labels are one cut, and exact up to rounding:
    prices are multiples of a power of two of at most 2^-28 of the dearest edge times the most edges of a pixel, those
    of edges of twice as much. Of cuts that cost the same it is the one inside all others, so the result depends on the
    arguments alone and not on the order in which a solver works.

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
    labels = (np.argmin(unaries, axis=0) if start is None else start).astype(np.intp)
    if free is None or free.all():
        return _solve(unaries, edges, labels, free, max_rounds, solver)
    part = window(free, edges.offsets)
    labels[part] = _solve(unaries[:, *part], edges.within(part), labels[part], free[part], max_rounds, solver)
    return labels


def window(free: Bool[np.ndarray, "h w"], offsets: Sequence[tuple[int, int]]) -> Slices:
    """The part of the grid that holds all free pixels and the other ends of their pairs."""
    spans = []
    for axis in (0, 1):
        lines = np.flatnonzero(free.any(axis=1 - axis))
        far = max((abs(offset[axis]) for offset in offsets), default=0)
        spans.append(slice(max(lines[0] - far, 0), lines[-1] + far + 1) if lines.size else slice(0, 0))
    return spans[0], spans[1]


def _solve(
    prices: Float[np.ndarray, "labels h w"],
    edges: Edges,
    labels: Int[np.ndarray, "h w"],
    free: Bool[np.ndarray, "h w"] | None,
    max_rounds: int,
    solver: type[Solver] | None,
) -> Int[np.ndarray, "h w"]:
    """One cut for two labels, else alpha-expansion. The pairs are made ready once; a cut writes prices alone."""
    if not np.all(np.isfinite(prices)):
        raise ValueError("the price of a pixel must be finite")
    shape, count = labels.shape, len(prices)
    if count < 2 or not labels.size:
        return labels
    whole, half = _rounded(prices.reshape(count, -1), edges, cap=free is None)
    held = None if free is None else ~free.ravel()
    pairs = (solver or fastest())(shape, edges.offsets)
    labels = labels.flatten()
    if count == 2:
        gain = whole[0] - whole[1]
        if held is not None:
            np.copyto(gain, np.where(labels == 1, HELD, -HELD), where=held)
        return pairs.cut(gain, 2 * half).astype(labels.dtype).reshape(shape)
    stuck = 0  # moves in a row that took no pixel; the last one that did counts, for the same again would take none
    for label in [*range(1, count), 0] * max_rounds:
        gain, capacity = pairs.move(whole, half, labels, label)
        has_it = labels == label
        if held is not None:
            np.copyto(gain, -HELD, where=held)
        np.copyto(gain, HELD, where=has_it)
        taken = pairs.cut(gain, capacity) & ~has_it
        np.copyto(labels, label, where=taken)
        stuck = 1 if taken.any() else stuck + 1
        if stuck == count:
            break
    return labels.reshape(shape)


def _rounded(
    prices: Float[np.ndarray, "labels n"], edges: Edges, *, cap: bool
) -> tuple[Int64[np.ndarray, "labels n"], Int32[np.ndarray, "offsets n"]]:
    """Prices above each pixel's least, and half of each edge's price, in one small unit; nothing is rounded after this.

    The unit is a power of two, so that whole prices keep their ties. Where all pixels are free, edges may be capped:
    one that is dearer than any change of all pixels is never cut.
    """
    above = prices - prices.min(axis=0)
    weight: Any = edges.weight.reshape(len(edges.offsets), prices.shape[1])
    if cap:
        weight = np.minimum(weight, 2 * float(above.max(axis=0).sum(dtype=np.float64)))
    dearest = _most_edges(edges) * float(weight.max(initial=0)) or float(above.max())
    scale = 2.0 ** math.floor(math.log2(_DEAREST / max(dearest, _CHEAPEST)))
    whole = np.rint(np.minimum(above * scale, HELD / 2)).astype(np.int64)
    return whole, np.rint(weight * (scale / 2)).astype(np.int32)


def _most_edges(edges: Edges) -> int:
    """An upper bound on the edges of any pixel: the most that begin at one, and the most that end at one."""
    there_is = edges.weight > 0
    ending = np.zeros(there_is.shape[1:], dtype=np.int16)
    for offset, begins in zip(edges.offsets, there_is, strict=True):
        here, there = ends(ending.shape, offset)
        ending[there] += begins[here]
    return int(there_is.sum(axis=0, dtype=np.int16).max(initial=0) + ending.max(initial=0))


class MaximumFlow:
    """Minimum cuts by SciPy's maximum flow: what the source still reaches after it."""

    def __init__(self, shape: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> None:
        pixels = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
        pairs = [(pixels[here].ravel(), pixels[there].ravel()) for here, there in (ends(shape, one) for one in offsets)]
        none = pixels[:0, 0]
        self.first = np.concatenate([none, *(first for first, _ in pairs)])
        self.second = np.concatenate([none, *(second for _, second in pairs)])
        self.place = np.concatenate([none, *(first + k * pixels.size for k, (first, _) in enumerate(pairs))])

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int32[np.ndarray, "offsets n"]) -> Bool[np.ndarray, " n"]:
        """See ``Solver``."""
        size, pixels = gain.size, np.arange(gain.size, dtype=np.int32)
        weight = capacity.take(self.place)
        edges = _sums(self.first, weight, size) + _sums(self.second, weight, size)
        most = edges.astype(np.int64) + 1  # more than can flow on
        hang = np.clip(gain, -most, most).astype(np.int32)
        source, sink = size, size + 1
        node = np.where(gain >= HELD, source, np.where(gain <= -HELD, sink, pixels)).astype(np.int32)
        first, second = node.take(self.first), node.take(self.second)
        tails = np.concatenate([np.where(hang > 0, np.int32(source), node), first, second])
        heads = np.concatenate([np.where(hang > 0, node, np.int32(sink)), second, first])
        limits = np.concatenate([np.abs(hang), weight, weight])
        some = np.flatnonzero((limits > 0) & ((tails < size) | (heads < size)))  # none where both ends are certain
        graph = csr_array((limits.take(some), (tails.take(some), heads.take(some))), shape=(size + 2, size + 2))
        residual = graph - maximum_flow(graph, source, sink, method="dinic").flow  # SciPy leaves zeros out of it
        reached = np.zeros(size + 2, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        side: Bool[np.ndarray, " n"] = reached[:size] | (gain >= HELD)
        return side

    def move(
        self,
        prices: Int64[np.ndarray, "labels n"],
        half: Int32[np.ndarray, "offsets n"],
        labels: Int[np.ndarray, " n"],
        label: int,
    ) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, "offsets n"]]:
        """See ``Solver``."""
        first, second, size = labels.take(self.first), labels.take(self.second), labels.size
        apart = np.flatnonzero((first != second) & (first != label) & (second != label))
        place = self.place.take(apart)
        relief = half.take(place)
        capacity = 2 * half
        capacity.put(place, relief)
        gain = prices.take(labels * size + np.arange(size)) - prices[label]
        gain += _sums(self.first.take(apart), relief, size).astype(np.int64)
        gain += _sums(self.second.take(apart), relief, size).astype(np.int64)
        return gain, capacity


def _sums(where: Int[np.ndarray, " n"], values: Num[np.ndarray, " n"], size: int) -> Float64[np.ndarray, " size"]:
    """The sum of the values that fall on each place."""
    counts = np.bincount(where, weights=values, minlength=size)
    return counts.astype(np.float64, copy=False)  # counts, where there is nothing to add
