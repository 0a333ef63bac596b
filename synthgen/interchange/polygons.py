"""Masks as polygons and as run lengths: exact, holes too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

__all__ = ["compress_counts", "join_corners", "outlines", "run_lengths"]


def outlines(mask: Bool[np.ndarray, "H W"]) -> list[Int64[np.ndarray, "_ 2"]]:
    """A polygon for every part of a mask, as the corners (x, y) that it passes, clockwise; together they are the mask.

    A part is connected over pixels' sides. Polygons run on the cracks between pixels: pixel (row, column) is the square
    from (column, row) to (column + 1, row + 1), so a polygon's area is that of its part. A hole is joined to what lies
    left of it by a slit without width, passed once there and once back: asking whether pixels' centres are inside, by
    the even-odd or by the nonzero rule, gives the mask again exactly.
    """
    if not mask.any():
        return []
    height, width = mask.shape
    padded = np.pad(mask, 1)
    middle = padded[1:-1, 1:-1]
    # A crack is the side of a pixel of the mask that has none beyond it. It starts at a lattice point and leads east,
    # south, west or north, the pixel on its right.
    cracks = np.zeros((4, height + 1, width + 1), bool)
    cracks[0, :-1, :-1] = middle & ~padded[:-2, 1:-1]
    cracks[1, :-1, 1:] = middle & ~padded[1:-1, 2:]
    cracks[2, 1:, 1:] = middle & ~padded[2:, 1:-1]
    cracks[3, 1:, :-1] = middle & ~padded[1:-1, :-2]
    points = (height + 1) * (width + 1)
    there = cracks.reshape(4, points)
    starts, following = [], []
    for heading, step in enumerate((1, width + 1, -1, -width - 1)):
        start = np.flatnonzero(there[heading])
        end, right, left = start + step, (heading + 1) % 4, (heading - 1) % 4
        # where two pixels touch at a corner only, the right turn stays at the same pixel
        turn = np.where(there[right, end], right, np.where(there[heading, end], heading, left))
        starts.append(heading * points + start)
        following.append(turn * points + end)
    every = np.concatenate(starts)  # sorted
    successor = np.searchsorted(every, np.concatenate(following))
    every, successor = _slit(mask, every, successor)
    headings, passed = np.divmod(every, points)
    y, x = np.divmod(passed, width + 1)
    after = successor.tolist()
    seen = bytearray(len(every))
    found = []
    for first in range(len(starts[0])):  # each outline leads east somewhere
        if seen[first]:
            continue
        chain, crack = [], first
        while not seen[crack]:
            seen[crack] = 1
            chain.append(crack)
            crack = after[crack]
        turns = np.array(chain)[headings[chain] != np.roll(headings[chain], 1)]
        found.append(np.stack([x[turns], y[turns]], axis=1))
    return found


def _slit(
    mask: Bool[np.ndarray, "H W"], cracks: Int64[np.ndarray, " cracks"], after: Int64[np.ndarray, " cracks"]
) -> tuple[Int64[np.ndarray, " more"], Int64[np.ndarray, " more"]]:
    """Join the loop of cracks around each hole to the next loop on its left, by two cracks more for each hole.

    A crack is a number, its heading times the lattice points and where it starts; ``after`` says which comes next. A
    slit leaves from a hole's upper left corner and goes west to the first lattice point that the mask does not
    surround. That one is of another loop: slits go up, or to the left on one line, so that they lead around nothing.
    """
    width, points = mask.shape[1] + 1, (mask.shape[0] + 1) * (mask.shape[1] + 1)
    headings, passed = np.divmod(cracks, points)
    y, x = np.divmod(passed, width)
    links = csr_array((np.ones(len(cracks), bool), (np.arange(len(cracks)), after)), shape=(len(cracks), len(cracks)))
    num_loops, loop = connected_components(links, directed=False)
    areas = np.bincount(loop, weights=x * y[after] - x[after] * y, minlength=num_loops)  # twice; below 0 around a hole
    south = np.flatnonzero(headings == 1)
    loops, first = np.unique(loop[south], return_index=True)  # cracks are sorted: from the upper left corner
    down = south[first[areas[loops] < 0]]
    row, right = y[down], x[down]
    ends = ~(mask[row - 1] & mask[row]) & (np.arange(width - 1) < right[:, None])  # pixels left of it, not both there
    left = np.where(ends, np.arange(1, width), 0).max(axis=1, initial=0)
    up = ~mask[row - 1, left - 1] | (left == 0)  # where the loop that is met goes on, north or west
    onward = np.searchsorted(cracks, np.where(up, 3, 2) * points + row * width + left)
    east = len(cracks) + np.arange(len(down))
    west = east + len(down)
    before = np.empty_like(after)
    before[after] = np.arange(len(after))
    joined = np.concatenate([after, down, onward])
    joined[before[onward]], joined[before[down]] = east, west
    return np.concatenate([cracks, row * width + left, 2 * points + row * width + right]), joined


def join_corners(polygons: Sequence[Int64[np.ndarray, "_ 2"]]) -> list[list[tuple[int, int]]]:
    """Polygons that meet at a corner as one, which passes the corner once for each."""
    rings = [[(x, y) for x, y in polygon.tolist()] for polygon in polygons]
    passing: dict[tuple[int, int], list[int]] = {}
    for number, ring in enumerate(rings):
        for corner in ring:
            passing.setdefault(corner, []).append(number)
    left, found = set(range(len(rings))), []
    for number, ring in enumerate(rings):
        if number not in left:
            continue
        left.remove(number)
        path, stack = [], [iter(ring)]
        while stack:
            at = next(stack[-1], None)
            if at is None:
                stack.pop()
                continue
            path.append(at)
            for other in left.intersection(passing[at]):  # one at most: four pixels meet at a corner
                left.remove(other)
                start = rings[other].index(at) + 1
                stack.append(iter(rings[other][start:] + rings[other][:start]))
        found.append(path)
    return found


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """How many pixels in turn are outside and inside, down the columns from the left; the first number is outside."""
    flat = mask.ravel(order="F")
    bounds = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))
    counts: list[int] = np.diff(bounds, prepend=0).tolist()
    return counts


def compress_counts(counts: Sequence[int]) -> str:
    """Run lengths as the text that COCO calls compressed.

    From the fourth on a number is less the one two before it. Five bits make a character from "0" on, the lowest
    first; the sixth says that more follow, and the last one's fifth is the sign. Source: the published format of the
    COCO API (cocodataset/cocoapi, common/maskApi.c, ``rleToString``).
    """
    text = []
    for index, count in enumerate(counts):
        left = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            bits, left = left & 31, left >> 5
            more = left != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)
