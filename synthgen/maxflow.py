"""Minimum cuts by one search tree, compiled by numba: the fast solver of ``graphcut``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numba import njit

__all__ = ["SearchTree"]

_ROOT, _ORPHAN = -1, -2  # in place of the arc to a pixel's parent

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled at its first call; kept for later processes where there is a folder that can be written."""
    try:
        fast: F = njit(cache=True, forceinline=True)(function)
    except RuntimeError:  # there is none
        fast = njit(forceinline=True)(function)
    return fast


class SearchTree:
    """Minimum cuts on the same pairs, one after another.

    The algorithm of Boykov and Kolmogorov (2004, section 3) with the source's tree alone: it grows from the pixels that
    hang on the source until it meets one that hangs on the sink. The path carries what it can; pixels that this cuts
    off look for another parent in the tree or leave it. When it can no longer grow, it is all that the source reaches.
    """

    def __init__(self, size: int, first: Int32[np.ndarray, " pairs"], second: Int32[np.ndarray, " pairs"]) -> None:
        self.arcs = _arcs(size, first, second)

    def cut(self, gain: Int64[np.ndarray, " n"], capacity: Int64[np.ndarray, " pairs"]) -> Bool[np.ndarray, " n"]:
        """See ``graphcut.Solver``."""
        side: Bool[np.ndarray, " n"] = _source_side(*self.arcs, gain.copy(), capacity)
        return side


@compiled
def _arcs(size: int, first: Any, second: Any) -> tuple[Any, Any, Any, Any]:
    """Two arcs a pair, those that leave a pixel side by side: where a pixel's begin; each one's head, return and pair.

    Unsigned, since numba asks of any other index whether it counts from the end.
    """
    begin = np.zeros(size + 1, dtype=np.uint32)
    for pair in range(len(first)):
        begin[first[pair] + 1] += 1
        begin[second[pair] + 1] += 1
    for pixel in range(size):
        begin[pixel + 1] += begin[pixel]
    room = begin.copy()
    head = np.empty(2 * len(first), dtype=np.uint32)
    back, pair_of = np.empty_like(head), np.empty_like(head)
    for pair in range(len(first)):
        here, there = first[pair], second[pair]
        out, home = room[here], room[there]
        room[here] += 1
        room[there] += 1
        head[out], back[out], pair_of[out] = there, home, pair
        head[home], back[home], pair_of[home] = here, out, pair
    return begin, head, back, pair_of


@compiled
def _source_side(begin: Any, head: Any, back: Any, pair_of: Any, excess: Any, capacity: Any) -> Any:
    """The pixels that the source still reaches when no more can flow.

    ``excess`` is what a pixel may yet take from the source, or where negative, give to the sink.
    """
    size = len(excess)
    left = capacity[pair_of]  # what each arc can still carry
    inside = excess > 0  # the tree
    parent = np.full(size, _ROOT, dtype=np.int32)  # the arc from a pixel to its parent
    orphans = np.empty(size, dtype=np.uint32)
    queue = np.empty(size, dtype=np.uint32)  # a ring of the pixels at which the tree may grow
    queued = inside.copy()
    front = waiting = 0
    for pixel in range(size):
        if queued[pixel]:
            queue[waiting] = pixel
            waiting += 1
    while waiting:
        pixel = queue[front]
        queued[pixel] = False
        front = front + 1 if front + 1 < size else 0
        waiting -= 1
        arc = begin[pixel]
        while arc < begin[pixel + 1] and inside[pixel]:
            other = head[arc]
            if left[arc] == 0 or inside[other]:
                arc += 1
            elif excess[other] < 0:
                count = _send(arc, head, back, left, parent, excess, orphans)
                waiting = _adopt(count, orphans, begin, head, back, left, inside, parent, queue, queued, front, waiting)
            else:
                inside[other] = True
                parent[other] = back[arc]
                waiting = _wait(other, queue, queued, front, waiting)
                arc += 1
    return inside


@compiled
def _wait(pixel: int, queue: Any, queued: Any, front: int, waiting: int) -> int:
    """Put a pixel at the end of the ring if it is not in it; how many are."""
    if queued[pixel]:
        return waiting
    place = front + waiting
    queue[place if place < len(queue) else place - len(queue)] = pixel
    queued[pixel] = True
    return waiting + 1


@compiled
def _send(last: int, head: Any, back: Any, left: Any, parent: Any, excess: Any, orphans: Any) -> int:
    """Send all that fits from the root over the arc ``last`` into the sink; how many pixels this cuts off."""
    start, end = head[back[last]], head[last]
    flow = min(left[last], -excess[end])
    root = start
    while parent[root] >= 0:
        flow = min(flow, left[back[parent[root]]])
        root = head[parent[root]]
    flow = min(flow, excess[root])
    excess[root] -= flow
    excess[end] += flow
    left[last] -= flow
    left[back[last]] += flow
    count = 0
    pixel = start
    while pixel != root:
        up = parent[pixel]
        left[back[up]] -= flow
        left[up] += flow
        if left[back[up]] == 0:
            parent[pixel] = _ORPHAN
            orphans[count] = pixel
            count += 1
        pixel = head[up]
    if excess[root] == 0:
        parent[root] = _ORPHAN
        orphans[count] = root
        count += 1
    return count


@compiled
def _adopt(
    count: int,
    orphans: Any,
    begin: Any,
    head: Any,
    back: Any,
    left: Any,
    inside: Any,
    parent: Any,
    queue: Any,
    queued: Any,
    front: int,
    waiting: int,
) -> int:
    """Each orphan finds another parent or leaves the tree, and then its children are orphans; how many pixels wait."""
    while count:
        count -= 1
        orphan = orphans[count]
        for arc in range(begin[orphan], begin[orphan + 1]):
            if inside[head[arc]] and left[back[arc]] > 0 and _is_rooted(head[arc], head, parent):
                parent[orphan] = arc
                break
        if parent[orphan] != _ORPHAN:
            continue
        inside[orphan] = False
        for arc in range(begin[orphan], begin[orphan + 1]):
            other = head[arc]
            if inside[other] and parent[other] == back[arc]:
                parent[other] = _ORPHAN
                orphans[count] = other
                count += 1
            if inside[other] and left[back[arc]] > 0:  # the tree may grow here again
                waiting = _wait(other, queue, queued, front, waiting)
    return waiting


@compiled
def _is_rooted(pixel: int, head: Any, parent: Any) -> bool:
    """Whether a pixel of the tree still hangs on the source."""
    while parent[pixel] >= 0:
        pixel = head[parent[pixel]]
    return bool(parent[pixel] == _ROOT)
