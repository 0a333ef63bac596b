"""Minimum cuts by one search tree, compiled by numba: the fast solver of ``graphcut``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64
from numba import njit

from synthgen.graphcut import FIXED_GAIN

__all__ = ["SearchTree"]

_ROOT, _ORPHAN = 254, 255  # instead of the arc to a pixel's parent

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, **options: bool) -> F:
    """Compile at the first call, with an on-disk cache if numba finds a folder that it can write to."""
    try:
        fast: F = njit(cache=True, forceinline=True, **options)(function)
    except RuntimeError:  # no such folder
        fast = njit(forceinline=True, **options)(function)
    return fast


def no_refcount(function: F) -> F:
    """Compile without reference counting, which took more than half of the time.

    The function must not create arrays; its caller keeps the ones it gets alive.
    """
    return compiled(function, **_uncounted())


def _nothing() -> None:
    pass


@functools.cache
def _uncounted() -> dict[str, bool]:
    """The private option that turns reference counting off; empty if this numba rejects it when compiling."""
    try:
        compiled(_nothing, _nrt=False)()
    except KeyError:
        return {}
    return {"_nrt": False}


class SearchTree:
    """Solves minimum cuts on one grid by incremental breadth-first search from the source (Goldberg et al., 2011).

    Trees grow one level at a time from the pixels with an edge from the source, until they meet a pixel with an edge to
    the sink. That path is augmented; pixels that it disconnects look for another parent, as near the source as
    possible, or leave the tree. So every augmenting path is a shortest one. When the trees can no longer grow, they
    contain all pixels that the source reaches.
    """

    def __init__(self, shape: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> None:
        self.offsets = np.array([dy * shape[1] + dx for dy, dx in offsets], dtype=np.int64)

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int32[np.ndarray, "offsets n"]) -> Bool[np.ndarray, " n"]:
        """See ``graphcut.Solver``."""
        side: Bool[np.ndarray, " n"] = _source_side(self.offsets, gain, capacity)
        return side

    def move(
        self,
        prices: Int64[np.ndarray, "labels n"],
        half: Int32[np.ndarray, "offsets n"],
        labels: Int[np.ndarray, " n"],
        label: int,
    ) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, "offsets n"]]:
        """See ``graphcut.Solver``."""
        gain, capacity = _move(self.offsets, prices, half, labels, label)
        return gain, capacity


class _Trees(NamedTuple):
    """The trees on the grid, with a margin of the longest offset before its first pixel and after its last.

    Pixels and arcs are unsigned, because numba checks whether any other index counts from the end.
    """

    step: Any  # from a pixel to the target of each of its arcs
    back: Any  # the reverse of each arc
    residual: Any  # the residual capacity of each arc of each pixel
    excess: Any  # what a pixel can still take from the source or, if negative, pass to the sink
    level: Any  # 1 for the roots, which have an edge from the source; else the parent's plus 1; 0 outside the trees
    parent: Any  # the arc to a pixel's parent
    queue: Any  # the pixels from which a tree may grow: one row for even levels, one for odd ones
    count: Any  # the length of each row
    queue_level: Any  # the level at which a pixel was last queued
    orphans: Any  # the last orphan of each level, or 0, which lies in the margin
    older: Any  # the orphan of the same level before this one, or 0


@compiled
def _source_side(offsets: Any, gain: Any, capacity: Any) -> Any:
    """The pixels that the source reaches in the residual graph of a maximum flow."""
    num_offsets, size = capacity.shape
    margin = max(1, np.abs(offsets).max()) if num_offsets else 1
    trees = _initial_trees(offsets, gain, capacity, margin)
    reached = 1
    while trees.count[reached & 1]:
        _grow(trees, reached)
        trees.count[reached & 1] = 0
        reached += 1
    return (trees.level[margin : margin + size] > 0) | (gain >= FIXED_GAIN)


@compiled
def _initial_trees(offsets: Any, gain: Any, capacity: Any, margin: int) -> Any:
    """Trees of one root each; a pair is two arcs, and the arcs of a pixel are contiguous.

    A pixel whose side is fixed is in no tree: its pairs are added to the excess of their other ends.
    """
    num_offsets, size = capacity.shape
    room = size + 2 * margin
    step = np.concatenate((offsets, -offsets)).astype(np.uint64)
    back = ((np.arange(2 * num_offsets) + num_offsets) % max(2 * num_offsets, 1)).astype(np.uint8)
    residual = np.zeros((room, 2 * num_offsets), dtype=np.int32)
    excess = np.zeros(room, dtype=np.int64)
    excess[margin : margin + size] = gain
    fixed = np.abs(excess) >= FIXED_GAIN
    for k in range(num_offsets):
        residual[margin : margin + size, k] = capacity[k]
        residual[margin + offsets[k] : margin + offsets[k] + size, num_offsets + k] = capacity[k]
    for pixel in np.flatnonzero(fixed).astype(np.uint64):
        sign = 1 if excess[pixel] > 0 else -1
        for arc in range(len(step)):
            if residual[pixel, arc]:
                other = pixel + step[arc]
                excess[other] += residual[pixel, arc] * sign
                residual[pixel, arc] = residual[other, back[arc]] = 0
    level = ((excess > 0) & ~fixed).astype(np.int32)
    parent = np.full(room, _ROOT, dtype=np.uint8)
    queue = np.empty((2, room), dtype=np.uint64)
    roots = np.flatnonzero(level)
    queue[1, : len(roots)] = roots
    count = np.array([0, len(roots)])
    orphans, older = np.zeros(room + 2, dtype=np.uint64), np.zeros(room, dtype=np.uint64)
    return _Trees(step, back, residual, excess, level, parent, queue, count, level.copy(), orphans, older)


@no_refcount
def _grow(trees: Any, reached: int) -> None:
    """Grow by one level from the pixels of level ``reached``, including those that get there meanwhile."""
    turn, num_arcs = 0, np.uint64(len(trees.step))
    while turn < trees.count[reached & 1]:
        pixel = trees.queue[reached & 1, turn]
        turn += 1
        arc = np.uint64(0)
        while arc < num_arcs and trees.level[pixel] == reached:
            other = pixel + trees.step[arc]
            if trees.residual[pixel, arc] == 0 or trees.level[other] > 0:
                arc += np.uint64(1)
            elif trees.excess[other] < 0:
                _adopt(trees, _send(trees, pixel, arc), reached)
            else:
                trees.level[other] = reached + 1
                trees.parent[other] = trees.back[arc]
                _wait(trees, other)
                arc += np.uint64(1)


@no_refcount
def _wait(trees: Any, pixel: Any) -> None:
    """Queue a pixel, to grow from it when its level is processed.

    A pixel that left the tree may return at the same level before that; it is not queued twice. It never returns at a
    lower level, because levels only rise.
    """
    level = trees.level[pixel]
    if trees.queue_level[pixel] != level:
        trees.queue_level[pixel] = level
        parity = level & 1
        trees.queue[parity, trees.count[parity]] = pixel
        trees.count[parity] += 1


@no_refcount
def _send(trees: Any, start: Any, last: Any) -> Any:
    """Augment the path from the root of ``start`` over its arc ``last`` to the sink; the orphans' lowest level."""
    step, back, residual, excess, parent = trees.step, trees.back, trees.residual, trees.excess, trees.parent
    end = start + step[last]
    flow = min(np.int64(residual[start, last]), -excess[end])
    pixel = start
    while parent[pixel] != _ROOT:
        arc = parent[pixel]
        pixel += step[arc]
        flow = min(flow, np.int64(residual[pixel, back[arc]]))
    flow = min(flow, excess[pixel])
    excess[pixel] -= flow
    excess[end] += flow
    residual[start, last] -= flow
    residual[end, back[last]] += flow
    lowest: Any = np.int64(trees.level[start]) + 1
    pixel = start
    while parent[pixel] != _ROOT:
        arc, child = parent[pixel], pixel
        pixel += step[arc]
        residual[child, arc] += flow
        residual[pixel, back[arc]] -= flow
        if residual[pixel, back[arc]] == 0:
            lowest = np.int64(trees.level[child])
            _orphan(trees, child)
    if excess[pixel] == 0:
        lowest = 1
        _orphan(trees, pixel)
    return lowest


@no_refcount
def _orphan(trees: Any, pixel: Any) -> None:
    """Record that a pixel has lost its parent."""
    level = trees.level[pixel]
    trees.parent[pixel] = _ORPHAN
    trees.older[pixel] = trees.orphans[level]
    trees.orphans[level] = pixel


@no_refcount
def _adopt(trees: Any, lowest: int, reached: int) -> None:
    """Give each orphan, from level ``lowest`` on, another parent at the level before its own.

    If there is none, it moves to one level after the nearest pixel with an arc to it, or leaves the tree if no such
    pixel has a level up to ``reached``; its children then become orphans.
    """
    step, back, residual, level, parent = trees.step, trees.back, trees.residual, trees.level, trees.parent
    own = lowest
    while own <= reached + 1:
        orphan = trees.orphans[own]
        if orphan == 0:
            own += 1
            continue
        trees.orphans[own] = trees.older[orphan]
        best = np.int64(reached + 1) << 8
        for arc in range(np.uint64(len(step))):  # the first arc to the lowest level, without a branch to mispredict
            other = orphan + step[arc]
            carries = np.int64(level[other] > 0) * np.int64(residual[other, back[arc]] > 0)
            best = min(best, (np.int64(level[other]) << 8) + np.int64(arc) + ((1 - carries) << 50))
        nearest: Any = best >> 8
        if nearest <= reached:
            parent[orphan] = best & 255
        if nearest == own - 1:
            continue
        for arc in range(np.uint64(len(step))):
            other = orphan + step[arc]
            if parent[other] == back[arc] and level[other] == own + 1:
                _orphan(trees, other)
        if nearest > reached:
            level[orphan] = 0
            continue
        level[orphan] = nearest + 1
        _orphan(trees, orphan)
        if nearest + 1 >= reached:
            _wait(trees, orphan)


@compiled
def _move(offsets: Any, prices: Any, half: Any, labels: Any, label: int) -> tuple[Any, Any]:
    """The same result as ``graphcut.MaximumFlow.move``, computed pair by pair."""
    gain = np.empty(labels.size, dtype=np.int64)
    for pixel in range(labels.size):
        gain[pixel] = prices[labels[pixel], pixel] - prices[label, pixel]
    capacity = 2 * half
    for k in range(len(offsets)):
        for pixel in range(labels.size):
            if half[k, pixel] and labels[pixel] != label:
                other = pixel + offsets[k]
                if labels[other] != label and labels[other] != labels[pixel]:
                    capacity[k, pixel] = half[k, pixel]
                    gain[pixel] += half[k, pixel]
                    gain[other] += half[k, pixel]
    return gain, capacity
