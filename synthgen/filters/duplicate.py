"""Images that look like an earlier one."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image
from scipy.fft import dctn

from synthgen.config import check_range
from synthgen.filters import Candidate, Filter, Measure

__all__ = ["Duplicate"]

BITS = 64  # of a hash


@dataclass(frozen=True, kw_only=True)
class Duplicate(Filter):
    """Reject images whose perceptual hash is that of an earlier kept image, but for a few bits.

    The hash is pHash (Zauner, 2010): 8 x 8 low frequencies of a cosine transform of the brightness, each above or below
    their median. It survives scaling, compression and small changes of colour, and does not see colour itself. Of
    images that are alike the one with the first key is kept, so images that are added later change no decision.
    """

    max_distance: int = 4  # bits of 64 that may differ, at most 7

    def __post_init__(self) -> None:
        check_range(ge=0, le=7, max_distance=self.max_distance)

    def open(self, device: str) -> Measure:
        """The function that returns the hash of each image, in hexadecimal."""

        def measure(candidates: Sequence[Candidate]) -> list[str]:
            return [f"{perceptual_hash(candidate.image):016x}" for candidate in candidates]

        return measure

    def reject(self, figures: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Those within ``max_distance`` bits of one that is kept."""
        keys, hashes = list[str](), array("Q")
        for key, figure in figures:
            keys.append(key)
            hashes.append(int(figure, 16))
        rejected = {}
        for row, original in earlier_kept(np.array(hashes, np.uint64), self.max_distance).items():
            bits = (hashes[row] ^ hashes[original]).bit_count()
            rejected[keys[row]] = f"it looks like {keys[original]}: {bits} of {BITS} bits of their hashes differ"
        return rejected


def perceptual_hash(image: UInt8[np.ndarray, "H W 3"]) -> int:
    """pHash of an image: 64 bits."""
    small = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(small, np.float64))[:8, :8]
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def earlier_kept(hashes: UInt64[np.ndarray, " n"], max_distance: int) -> dict[int, int]:
    """For each hash that is not kept, the first kept one before it within ``max_distance`` bits.

    Two hashes that differ in at most d bits are equal in one of d + 1 parts, so a hash is compared only with kept ones
    that have an equal part.
    """
    parts = np.array_split(np.arange(BITS, dtype=np.uint64), max_distance + 1)
    masks = [int(np.bitwise_or.reduce(np.uint64(1) << bits)) for bits in parts]
    kept: dict[tuple[int, int], tuple[array[int], array[int]]] = {}  # part and its value → kept hashes, their rows
    sources: dict[int, int] = {}  # hash → the kept row that stands for it
    replaced: dict[int, int] = {}
    for row, value in enumerate(hashes.tolist()):
        if value not in sources:
            equal = [kept.setdefault((mask, value & mask), (array("Q"), array("Q"))) for mask in masks]
            near = [found for others, rows in equal if (found := _first_near(value, others, rows, max_distance)) >= 0]
            sources[value] = min(near, default=row)
            if not near:
                for others, rows in equal:
                    others.append(value)
                    rows.append(row)
        if sources[value] != row:
            replaced[row] = sources[value]
    return replaced


def _first_near(value: int, others: array[int], rows: array[int], max_distance: int) -> int:
    """The first row whose hash is near ``value``, or -1."""
    distances = np.bitwise_count(np.frombuffer(others, np.uint64) ^ np.uint64(value)) if others else np.zeros(0)
    near = np.flatnonzero(distances <= max_distance)
    return rows[near[0]] if near.size else -1
