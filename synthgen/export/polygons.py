"""Convert masks to polygons and run lengths exactly, including holes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

__all__ = ["compress_counts", "join_corners", "outlines", "run_lengths"]


def outlines(mask: Bool[np.ndarray, "H W"]) -> list[Int64[np.ndarray, "_ 2"]]:
    """A polygon for every part of a mask, as its corners (x, y), clockwise; together they cover exactly the mask.

    A part is connected across pixels' sides. Polygons follow the cracks between pixels: pixel (row, column) is the
    square from (column, row) to (column + 1, row + 1), so a polygon's area is that of its part. A hole is joined to the
    loop on its left by a slit of zero width, traversed in both directions: testing the centres of pixels by the
    even-odd or the nonzero rule gives exactly the mask.
    """
    if not mask.any():
        return []
    height, width = mask.shape
    padded = np.pad(mask, 1)
    middle = padded[1:-1, 1:-1]
    # A crack is a side of a mask pixel with no mask pixel beyond it. It starts at a lattice point and leads east,
    # south, west or north, with the pixel on its right.
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
        # where two pixels touch only at a corner, turning right follows the same pixel
        turn = np.where(there[right, end], right, np.where(there[heading, end], heading, left))
        starts.append(heading * points + start)
        following.append(turn * points + end)
    every = np.concatenate(starts)  # sorted
    successor = np.searchsorted(every, np.concatenate(following))
    every, successor = _slit(mask, every, successor)
    headings, passed = np.divmod(every, points)
    y, x = np.divmod(passed, width + 1)
    after = successor.tolist()
    visited = bytearray(len(every))
    found = []
    for first in range(len(starts[0])):  # each outline leads east somewhere
        if visited[first]:
            continue
        chain, crack = [], first
        while not visited[crack]:
            visited[crack] = 1
            chain.append(crack)
            crack = after[crack]
        turns = np.array(chain)[headings[chain] != np.roll(headings[chain], 1)]
        found.append(np.stack([x[turns], y[turns]], axis=1))
    return found


def _slit(
    mask: Bool[np.ndarray, "H W"], cracks: Int64[np.ndarray, " cracks"], after: Int64[np.ndarray, " cracks"]
) -> tuple[Int64[np.ndarray, " more"], Int64[np.ndarray, " more"]]:
    """Join the loop of cracks around each hole to the next loop on its left, with two additional cracks per hole.

    A crack's number is its heading times the number of lattice points, plus its start point; ``after`` is its
    successor. A slit runs west from a hole's upper left corner to the first lattice point that the mask does not
    surround. That point is on another loop: slits lead to loops further up, or further left on the same line, so they
    form no cycle.
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
    rows, index = np.unique(row, return_inverse=True)
    both = mask[rows - 1] & mask[rows]  # the pixels to the left of each lattice point from x = 1, above and below it
    last = np.maximum.accumulate(np.where(both, 0, np.arange(1, width)), axis=1)  # nearest point where not both are set
    left = last[index, right - 1]
    up = ~mask[row - 1, left - 1] | (left == 0)  # whether the loop at the left end continues north or west
    onward = np.searchsorted(cracks, np.where(up, 3, 2) * points + row * width + left)
    east = len(cracks) + np.arange(len(down))
    west = east + len(down)
    before = np.empty_like(after)
    before[after] = np.arange(len(after))
    joined = np.concatenate([after, down, onward])
    joined[before[onward]], joined[before[down]] = east, west
    return np.concatenate([cracks, row * width + left, 2 * points + row * width + right]), joined


def join_corners(polygons: Sequence[Int64[np.ndarray, "_ 2"]]) -> list[list[tuple[int, int]]]:
    """Merge polygons that meet at a corner into one, which passes that corner once for each of them."""
    rings = [[(x, y) for x, y in polygon.tolist()] for polygon in polygons]
    passing: dict[tuple[int, int], list[int]] = {}
    for number, ring in enumerate(rings):
        for corner in ring:
            passing.setdefault(corner, []).append(number)
    unused, found = set(range(len(rings))), []
    for number, ring in enumerate(rings):
        if number not in unused:
            continue
        unused.remove(number)
        path, stack = [], [iter(ring)]
        while stack:
            at = next(stack[-1], None)
            if at is None:
                stack.pop()
                continue
            path.append(at)
            for other in unused.intersection(passing[at]):  # at most one: four pixels meet at a corner
                unused.remove(other)
                start = rings[other].index(at) + 1
                stack.append(iter(rings[other][start:] + rings[other][:start]))
        found.append(path)
    return found


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """Numbers of pixels alternately outside and inside, column by column from the left, starting outside."""
    flat = mask.ravel(order="F")
    bounds = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))
    counts: list[int] = np.diff(bounds, prepend=0).tolist()
    return counts


def compress_counts(counts: Sequence[int]) -> str:
    """Run lengths as text in COCO's compressed format.

    From the fourth on, each number is stored as its difference from the one two before it. A character, counted from
    "0", has five bits, the lowest first; the sixth bit says that more follow, and the fifth of the last one is the
    sign. Source: the published format of the COCO API (cocodataset/cocoapi, common/maskApi.c, ``rleToString``).
    """
    text = []
    for index, count in enumerate(counts):
        rest = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)
