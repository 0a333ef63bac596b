"""Exact minimum cuts on a pixel grid, and alpha-expansion for more than two labels.

A labelling ``l`` of the pixels costs

    E(l) = sum_i unary[l_i, i] + sum_(i, j) weight_ij * [l_i != l_j]

with every cost in one unit (nats, if the unaries are negative log-probabilities) and no negative weight. With two
labels the minimum is exact: it is a minimum s-t cut (Greig, Porteous and Seheult, 1989). More labels use
alpha-expansion (Boykov, Veksler and Zabih, 2001), in which each move is such a cut; once no move lowers the energy, and
if no unary is negative, the result costs at most twice the minimum.

Costs are rounded once, to integer multiples of a small unit; everything after that is exact. Of all minimum cuts the
solvers return the one with the smallest source side, which does not depend on the maximum flow found. So they agree on
every pixel: SciPy's maximum flow and, if numba is installed, a compiled one.
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

#: A rectangular part of a grid: rows, columns.
Slices = tuple[slice, slice]

#: SciPy's flows are int32: the edges of a pixel sum to about this many units, so that twice the sum is below 2^31.
_MAX_UNITS = 2.0**29
#: Lower costs count as zero, so that the scale of float32 costs stays finite.
_MIN_PRICE = 2.0**-90
#: Gain, in units, of a pixel whose side is fixed: more than the sum of its edges.
FIXED_GAIN = 2**40


@runtime_checkable
class Solver(Protocol):
    """Solves minimum cuts on a grid with a fixed set of pixel pairs; pixels are numbered row by row."""

    def __init__(self, shape: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> None: ...

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int32[np.ndarray, "offsets n"]) -> Bool[np.ndarray, " n"]:
        """The pixels on the source's side of the minimum cut; the smallest set if there are several.

        Args:
            gain: what pixel i saves on that side: its edge from the source or, if negative, to the sink.
            capacity: the cost of separating each pair, laid out as ``Edges.weight``.
        """
        ...

    def move(
        self,
        prices: Int64[np.ndarray, "labels n"],
        half: Int32[np.ndarray, "offsets n"],
        labels: Int[np.ndarray, " n"],
        label: int,
    ) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, "offsets n"]]:
        """``gain`` and ``capacity`` of the cut that decides which pixels change to ``label``.

        A pair with two different other labels costs w unless both ends change. That equals an edge of w / 2 and w / 2
        less for changing either end, so the move is still a cut with symmetric edges.
        """
        ...


@functools.cache
def fastest() -> type[Solver]:
    """The compiled solver if numba is installed and supports this NumPy, else SciPy's; both give the same cut."""
    try:
        from synthgen.maxflow import SearchTree
    except ImportError:
        return MaximumFlow
    return SearchTree


@dataclass(frozen=True, slots=True)
class Edges:
    """Pairs of pixels, and the cost of giving the two different labels.

    ``weight[k, y, x]`` is the cost for (y, x) and the pixel at ``offsets[k]`` (rows, columns) from it; 0 means that
    there is no pair. ``grid_edges`` sets it to 0 where that pixel is outside the grid.
    """

    offsets: tuple[tuple[int, int], ...]
    weight: Float[np.ndarray, "offsets h w"]

    def __add__(self, other: Edges) -> Edges:
        """The union of both sets; the costs of a pair that is in both add up."""
        return Edges(self.offsets + other.offsets, np.concatenate([self.weight, other.weight]))

    def times(self, factor: float) -> Edges:
        """The same pairs at ``factor`` times the cost; ``factor`` must not be negative."""
        return replace(self, weight=self.weight * factor)

    def within(self, part: Slices) -> Edges:
        """The pairs inside a part of the grid, on a grid of that size."""
        weights = self.weight[:, *part]
        return grid_edges(weights.shape[1:], zip(self.offsets, weights, strict=True))

    def pairs(
        self,
    ) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
        """First pixel, second pixel and cost of every pair; pixels are numbered row by row."""
        where = np.flatnonzero(self.weight)
        offset, first = np.divmod(where, self.weight[0].size) if where.size else (where, where)
        return first, first + _steps(self.weight.shape[1:], self.offsets)[offset], self.weight.take(where)


@functools.lru_cache(maxsize=1024)
def ends(shape: tuple[int, int], offset: tuple[int, int]) -> tuple[Slices, Slices]:
    """Windows of the first and second pixels of all pairs ``offset`` (rows, columns) apart; empty if none fits."""
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
    """The pairs of pixels an offset apart: ``weight[y, x]`` is the cost for (y, x) and (y + dy, x + dx).

    Pairs that leave the grid or cost nothing are omitted and, if ``free`` is given, those without a free pixel.

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
    """Each offset as a difference of pixel numbers, counted row by row."""
    return np.array([dy * shape[1] + dx for dy, dx in offsets], dtype=np.int64)


def energy(unaries: Float[np.ndarray, "labels *grid"], edges: Edges, labels: Int[np.ndarray, "*grid"]) -> float:
    """The cost of a labelling, by the formula in this module's docstring."""
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
    """A low-energy labelling by alpha-expansion: each label in turn takes the pixels that lower the energy most.

    Stops when no label can take any, or after ``max_rounds`` rounds. Two labels need one cut, exact up to rounding:
    costs become multiples of a power of two that is at most 2^-28 of the largest edge times the most edges of a pixel,
    and edges multiples of twice that. Of equal cuts it takes the smallest, so the result depends on the arguments alone
    and not on the order in which a solver works.

    Args:
        unaries: the cost of each label at each pixel, finite.
        edges: the cost of each pair whose labels differ.
        free: the pixels to decide, all by default; the others keep their label in ``start``.
        start: the initial labels, by default each pixel's cheapest.
        max_rounds: rounds over all labels.
        solver: the solver of the cuts, by default the fastest; the result is the same with any.

    Raises:
        ValueError: a cost is not finite.
    """
    labels = (np.argmin(unaries, axis=0) if start is None else start).astype(np.intp)
    if free is None or free.all():
        return _solve(unaries, edges, labels, free, max_rounds, solver)
    part = window(free, edges.offsets)
    labels[part] = _solve(unaries[:, *part], edges.within(part), labels[part], free[part], max_rounds, solver)
    return labels


def window(free: Bool[np.ndarray, "h w"], offsets: Sequence[tuple[int, int]]) -> Slices:
    """The part of the grid that contains all free pixels and the other ends of their pairs."""
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
    """One cut for two labels, else alpha-expansion; the pairs are set up once and each cut only changes costs."""
    if not np.all(np.isfinite(prices)):
        raise ValueError("the price of a pixel must be finite")
    shape, count = labels.shape, len(prices)
    if count < 2 or not labels.size:
        return labels
    whole, half = _rounded(prices.reshape(count, -1), edges, cap=free is None)
    fixed = None if free is None else ~free.ravel()
    pairs = (solver or fastest())(shape, edges.offsets)
    labels = labels.flatten()
    if count == 2:
        gain = whole[0] - whole[1]
        if fixed is not None:
            np.copyto(gain, np.where(labels == 1, FIXED_GAIN, -FIXED_GAIN), where=fixed)
        return pairs.cut(gain, 2 * half).astype(labels.dtype).reshape(shape)
    unchanged = 0  # moves in a row that cannot change a pixel; 1 after a move that did, as its repetition would not
    for label in [*range(1, count), 0] * max_rounds:
        gain, capacity = pairs.move(whole, half, labels, label)
        has_it = labels == label
        if fixed is not None:
            np.copyto(gain, -FIXED_GAIN, where=fixed)
        np.copyto(gain, FIXED_GAIN, where=has_it)
        taken = pairs.cut(gain, capacity) & ~has_it
        np.copyto(labels, label, where=taken)
        unchanged = 1 if taken.any() else unchanged + 1
        if unchanged == count:
            break
    return labels.reshape(shape)


def _rounded(
    prices: Float[np.ndarray, "labels n"], edges: Edges, *, cap: bool
) -> tuple[Int64[np.ndarray, "labels n"], Int32[np.ndarray, "offsets n"]]:
    """Unary costs above each pixel's minimum, and half of each edge's cost, as integers; nothing is rounded later.

    The unit is a power of two, so that integer costs keep their ties. With ``cap`` edges are limited to a cost at which
    they are never cut: more than any change of all pixels. That is valid only if all pixels are free.
    """
    above = prices - prices.min(axis=0)
    weight: Any = edges.weight.reshape(len(edges.offsets), prices.shape[1])
    if cap:
        weight = np.minimum(weight, 2 * float(above.max(axis=0).sum(dtype=np.float64)))
    dearest = _most_edges(edges) * float(weight.max(initial=0)) or float(above.max())
    scale = 2.0 ** math.floor(math.log2(_MAX_UNITS / max(dearest, _MIN_PRICE)))
    whole = np.rint(np.minimum(above * scale, FIXED_GAIN / 2)).astype(np.int64)
    return whole, np.rint(weight * (scale / 2)).astype(np.int32)


def _most_edges(edges: Edges) -> int:
    """An upper bound on the edges of any pixel: the most that start at one plus the most that end at one."""
    present = edges.weight > 0
    ending = np.zeros(present.shape[1:], dtype=np.int16)
    for offset, begins in zip(edges.offsets, present, strict=True):
        here, there = ends(ending.shape, offset)
        ending[there] += begins[here]
    return int(present.sum(axis=0, dtype=np.int16).max(initial=0) + ending.max(initial=0))


class MaximumFlow:
    """Minimum cuts by SciPy's maximum flow: the pixels that the source reaches in its residual graph."""

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
        most = edges.astype(np.int64) + 1  # more than can leave the pixel
        terminal = np.clip(gain, -most, most).astype(np.int32)
        source, sink = size, size + 1
        node = np.where(gain >= FIXED_GAIN, source, np.where(gain <= -FIXED_GAIN, sink, pixels)).astype(np.int32)
        first, second = node.take(self.first), node.take(self.second)
        tails = np.concatenate([np.where(terminal > 0, np.int32(source), node), first, second])
        heads = np.concatenate([np.where(terminal > 0, node, np.int32(sink)), second, first])
        limits = np.concatenate([np.abs(terminal), weight, weight])
        some = np.flatnonzero((limits > 0) & ((tails < size) | (heads < size)))  # skips edges between fixed pixels
        graph = csr_array((limits.take(some), (tails.take(some), heads.take(some))), shape=(size + 2, size + 2))
        residual = graph - maximum_flow(graph, source, sink, method="dinic").flow  # SciPy does not store zeros in it
        reached = np.zeros(size + 2, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        side: Bool[np.ndarray, " n"] = reached[:size] | (gain >= FIXED_GAIN)
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
    """The sum of the values at each index."""
    counts = np.bincount(where, weights=values, minlength=size)
    return counts.astype(np.float64, copy=False)  # bincount gives integers if there are no values
