"""Minimum cuts by one search tree, compiled by numba: the fast solver of ``graphcut``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64
from numba import njit

from synthgen.graphcut import HELD

__all__ = ["SearchTree"]

_ROOT, _ORPHAN = 254, 255  # in place of the arc to a pixel's parent

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, **options: bool) -> F:
    """Compiled at its first call; kept for later processes where there is a folder that can be written."""
    try:
        fast: F = njit(cache=True, forceinline=True, **options)(function)
    except RuntimeError:  # there is none
        fast = njit(forceinline=True, **options)(function)
    return fast


def borrowing(function: F) -> F:
    """Compiled without the counting of references, which took more than half of the time.

    It must make no array; its caller holds those that it is given.
    """
    return compiled(function, **_uncounted())


def _nothing() -> None:
    pass


@functools.cache
def _uncounted() -> dict[str, bool]:
    """The option for it, which is private: none where this numba does not know it, as it says when it compiles."""
    try:
        compiled(_nothing, _nrt=False)()
    except KeyError:
        return {}
    return {"_nrt": False}


class SearchTree:
    """Minimum cuts of the same grid, one after another.

    The source's trees grow from the pixels that hang on it, all by one level at a time, until they meet a pixel that
    hangs on the sink. The path carries what it can; pixels that this cuts off look for another parent, as near the
    source as there is, or leave. When the trees can no longer grow, they are all that the source reaches. So every path
    is a shortest one, as in incremental breadth-first search (Goldberg et al., 2011), on the source's side alone.
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
    """The grid, with a margin as wide as the longest offset before its first pixel and after its last, and the trees.

    Pixels and arcs are unsigned, since numba asks of any other index whether it counts from the end.
    """

    step: Any  # from a pixel to the one that each of its arcs leads to
    back: Any  # which arc leads back
    left: Any  # what each arc of each pixel can still carry
    excess: Any  # what a pixel may yet take from the source, or where negative, give to the sink
    level: Any  # 1 for the roots, which hang on the source, then one more than the parent's; 0 outside
    parent: Any  # the arc to a pixel's parent
    waiting: Any  # the pixels from which a tree may grow: those of an even level, and those of an odd one
    count: Any  # of these
    noted: Any  # the level at which a pixel was put there last
    orphans: Any  # the last orphan of each level, or 0, which lies in the margin
    older: Any  # the orphan of the same level before this one, or 0


@compiled
def _source_side(offsets: Any, gain: Any, capacity: Any) -> Any:
    """The pixels that the source still reaches when no more can flow."""
    num_offsets, size = capacity.shape
    margin = max(1, np.abs(offsets).max()) if num_offsets else 1
    trees = _planted(offsets, gain, capacity, margin)
    reached = 1
    while trees.count[reached & 1]:
        _grow(trees, reached)
        trees.count[reached & 1] = 0
        reached += 1
    return (trees.level[margin : margin + size] > 0) | (gain >= HELD)


@compiled
def _planted(offsets: Any, gain: Any, capacity: Any, margin: int) -> Any:
    """Trees of a root each: two arcs for each pair, all of a pixel side by side.

    A pixel that is certain is in no tree: what its pairs cost is the excess of their other ends.
    """
    num_offsets, size = capacity.shape
    room = size + 2 * margin
    step = np.concatenate((offsets, -offsets)).astype(np.uint64)
    back = ((np.arange(2 * num_offsets) + num_offsets) % max(2 * num_offsets, 1)).astype(np.uint8)
    left = np.zeros((room, 2 * num_offsets), dtype=np.int32)
    excess = np.zeros(room, dtype=np.int64)
    excess[margin : margin + size] = gain
    certain = np.abs(excess) >= HELD
    for k in range(num_offsets):
        left[margin : margin + size, k] = capacity[k]
        left[margin + offsets[k] : margin + offsets[k] + size, num_offsets + k] = capacity[k]
    for pixel in np.flatnonzero(certain).astype(np.uint64):
        sign = 1 if excess[pixel] > 0 else -1
        for arc in range(len(step)):
            if left[pixel, arc]:
                other = pixel + step[arc]
                excess[other] += left[pixel, arc] * sign
                left[pixel, arc] = left[other, back[arc]] = 0
    level = ((excess > 0) & ~certain).astype(np.int32)
    parent = np.full(room, _ROOT, dtype=np.uint8)
    waiting = np.empty((2, room), dtype=np.uint64)
    roots = np.flatnonzero(level)
    waiting[1, : len(roots)] = roots
    count = np.array([0, len(roots)])
    orphans, older = np.zeros(room + 2, dtype=np.uint64), np.zeros(room, dtype=np.uint64)
    return _Trees(step, back, left, excess, level, parent, waiting, count, level.copy(), orphans, older)


@borrowing
def _grow(trees: Any, reached: int) -> None:
    """By one level, from the pixels of the level ``reached``; those that come to it meanwhile are among them."""
    turn, num_arcs = 0, np.uint64(len(trees.step))
    while turn < trees.count[reached & 1]:
        pixel = trees.waiting[reached & 1, turn]
        turn += 1
        arc = np.uint64(0)
        while arc < num_arcs and trees.level[pixel] == reached:
            other = pixel + trees.step[arc]
            if trees.left[pixel, arc] == 0 or trees.level[other] > 0:
                arc += np.uint64(1)
            elif trees.excess[other] < 0:
                _adopt(trees, _send(trees, pixel, arc), reached)
            else:
                trees.level[other] = reached + 1
                trees.parent[other] = trees.back[arc]
                _wait(trees, other)
                arc += np.uint64(1)


@borrowing
def _wait(trees: Any, pixel: Any) -> None:
    """Grow from this pixel when its level's turn comes.

    One that left may be back at the same level before its turn; it is not put there twice. Below that it never comes
    again, for levels only rise.
    """
    level = trees.level[pixel]
    if trees.noted[pixel] != level:
        trees.noted[pixel] = level
        parity = level & 1
        trees.waiting[parity, trees.count[parity]] = pixel
        trees.count[parity] += 1


@borrowing
def _send(trees: Any, start: Any, last: Any) -> Any:
    """Send all that fits from the root of ``start`` over its arc ``last`` into the sink; the orphans' lowest level."""
    step, back, left, excess, parent = trees.step, trees.back, trees.left, trees.excess, trees.parent
    end = start + step[last]
    flow = min(np.int64(left[start, last]), -excess[end])
    pixel = start
    while parent[pixel] != _ROOT:
        arc = parent[pixel]
        pixel += step[arc]
        flow = min(flow, np.int64(left[pixel, back[arc]]))
    flow = min(flow, excess[pixel])
    excess[pixel] -= flow
    excess[end] += flow
    left[start, last] -= flow
    left[end, back[last]] += flow
    lowest: Any = np.int64(trees.level[start]) + 1
    pixel = start
    while parent[pixel] != _ROOT:
        arc, child = parent[pixel], pixel
        pixel += step[arc]
        left[child, arc] += flow
        left[pixel, back[arc]] -= flow
        if left[pixel, back[arc]] == 0:
            lowest = np.int64(trees.level[child])
            _orphan(trees, child)
    if excess[pixel] == 0:
        lowest = 1
        _orphan(trees, pixel)
    return lowest


@borrowing
def _orphan(trees: Any, pixel: Any) -> None:
    """Note that a pixel has lost its parent."""
    level = trees.level[pixel]
    trees.parent[pixel] = _ORPHAN
    trees.older[pixel] = trees.orphans[level]
    trees.orphans[level] = pixel


@borrowing
def _adopt(trees: Any, lowest: int, reached: int) -> None:
    """Each orphan, from the ``lowest`` level on, finds another parent of the level before its own.

    Where there is none it comes later, one level behind the nearest pixel that can carry to it, or leaves where that is
    of no level up to ``reached``; and its children are orphans.
    """
    step, back, left, level, parent = trees.step, trees.back, trees.left, trees.level, trees.parent
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
            carries = np.int64(level[other] > 0) * np.int64(left[other, back[arc]] > 0)
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
    """What ``graphcut.MaximumFlow.move`` gives, pair by pair."""
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
