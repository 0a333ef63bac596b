"""Images that look like an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def reject(self, figures: Mapping[str, str]) -> dict[str, str]:
        """Those within ``max_distance`` bits of one that is kept."""
        keys, hashes = list(figures), np.array([int(figure, 16) for figure in figures.values()], np.uint64)
        rejected = {}
        for row, original in earlier_kept(hashes, self.max_distance).items():
            bits = int(hashes[row] ^ hashes[original]).bit_count()
            rejected[keys[row]] = f"it looks like {keys[original]}: {bits} of {BITS} bits of their hashes differ"
        return rejected


def perceptual_hash(image: UInt8[np.ndarray, "H W 3"]) -> int:
    """pHash of an image: 64 bits."""
    small = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(small, np.float64))[:8, :8]
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def earlier_kept(hashes: UInt64[np.ndarray, " n"], max_distance: int) -> dict[int, int]:
    """For each hash that is not kept, the first kept one before it within ``max_distance`` bits.

    Two hashes that differ in at most d bits are equal in one of d + 1 parts, so only hashes with an equal part are
    compared.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    near: dict[int, set[int]] = {}  # rows of first occurrences → those of earlier ones that are near
    for bits in np.array_split(np.arange(BITS, dtype=np.uint64), max_distance + 1):
        parts = unique & np.bitwise_or.reduce(np.uint64(1) << bits)
        order = np.lexsort((first, parts))  # equal parts side by side, and among them the first row first
        for group in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
            for count in range(1, len(group)):
                before = group[:count]
                close = np.bitwise_count(unique[before] ^ unique[group[count]]) <= max_distance
                if close.any():
                    near.setdefault(int(first[group[count]]), set()).update(first[before[close]].tolist())
    replaced: dict[int, int] = {}
    for row in sorted(near):
        if kept := near[row] - replaced.keys():
            replaced[row] = min(kept)
    for row, original in enumerate(first[inverse].tolist()):  # equal hashes
        if row != original:
            replaced[row] = replaced.get(original, original)
    return replaced
