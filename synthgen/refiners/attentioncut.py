"""The cheapest outline that still agrees with cross-attention, self-attention and colour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter
from scipy.sparse import csr_array

from synthgen.graphcut import Edges, ends, expand, grid_edges
from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners._words import otsu_level, resize, scaled

__all__ = ["AttentionCut"]

#: Half of the 8-neighbourhood; the other half is the same edge seen from its other end.
NEAR = ((0, 1), (1, 0), (1, 1), (1, -1))
#: Colours are counted in this many bins a channel, blurred by PALETTE_BLUR bins, each label with UNSEEN of its own.
PALETTE_BINS, PALETTE_BLUR, UNSEEN = 8, 0.7, 1e-5
#: ``smoothness`` is the price of an edge where a cell of the maps is this many pixels wide.
USUAL_CELL = 8


@dataclass(frozen=True, kw_only=True)
class AttentionCut:
    """Give every pixel to one word or to none, so that disagreement with the attention plus boundary costs least.

    DiffusionSeg (Ma et al., 2023) names such a cut; its energy was not to be had, and this one is ours:

        E(l) = sum_i U_i(l_i) + sum_(i, j) w_ij [l_i != l_j]            prices in nats

    It is solved twice, with label 0 for no word. First on the maps' own grid, which finds the object:

        F_v = a word's cross-attention scaled to [0, 1], then ``num_steps`` times (1 - spread) F + spread S F, scaled
        P   = softmax over (0, z_1, z_2, ...),  z_v = (F_v - clip(level Otsu(F_v), min_level, max_level)) / softness
        U   = -log P
        w   = affinity A_ij + [neighbours] (coherence + color B_ij) / distance

    A is what self-attention along ``AFFINITY_OFFSETS`` has above uniform, over the most that i gives anyone, averaged
    with the same of j; S is A with rows that sum to 1; B_ij = exp(-beta |c_i - c_j|^2) with beta = 1 / (2 mean |c_i
    - c_j|^2) as in GrabCut. Each word keeps the cell that speaks most for it, and so does the background; hence no cut
    takes all or nothing. Then on the image's pixels, in a band around that outline, everything else held:

        U   = -log P - palette log Q,  Q_l = share of label l in a pixel's colour, counted over the image with weight P
        w   = smoothness (cell / 8 px) B_ij / distance

    One word: both minima are exact. Several are solved together by alpha-expansion, each move exact. Images longer
    than ``max_size`` are cut at that size and the outline is enlarged, so it is no finer than that. A word whose map
    is flat gets an empty mask. Attention that is high elsewhere stays: what is no object is the filter's to drop.
    """

    num_steps: int = 1  # steps of the walk along self-attention
    spread: float = 0.1  # share of a step that comes from other cells, in [0, 1]
    level: float = 0.5  # where a word and the background are as likely, as a share of Otsu's level
    min_level: float = 0.15  # bounds for that, in [0, 1]
    max_level: float = 0.6
    softness: float = 0.08  # difference of scaled attention that is worth one nat
    floor: float = 1e-3  # no label is less likely than this, nor dearer than its surprise
    affinity: float = 0.2  # nats for parting two cells of which each looks at the other most
    coherence: float = 0.1  # nats for parting two neighbouring cells, whatever their colours
    color: float = 0.2  # nats more where their colours are equal
    band: float = 3.0  # half the width of the band that is cut again, in cells of the maps
    palette: float = 2.0  # weight of the colours' own vote; 0 asks contrast alone
    smoothness: float = 15.0  # nats for parting two neighbouring pixels of equal colour, at 8 pixels a cell
    max_size: int = 128  # pixels on the long side of the finer cut

    def __post_init__(self) -> None:
        for name in ("num_steps", "level", "affinity", "coherence", "color", "palette", "smoothness", "band"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative or infinite, but is {getattr(self, name)}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread must be in [0, 1], not {self.spread}")
        if not 0 <= self.min_level <= self.max_level <= 1:
            raise ValueError(f"0 <= min_level <= max_level <= 1 must hold, not {self.min_level} and {self.max_level}")
        if not 1e-3 <= self.softness < math.inf:
            raise ValueError(f"softness must be at least 0.001, not {self.softness}")
        if not 0 < self.floor <= 0.01:
            raise ValueError(f"floor must be in (0, 0.01], not {self.floor}")
        if self.max_size < 8:
            raise ValueError(f"max_size must be at least 8 pixels, not {self.max_size}")

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        """One mask a word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        masks = np.zeros((len(maps.weights), *image.shape[:2]), dtype=bool)
        attention = scaled(maps.weights)
        told = np.flatnonzero(attention.any(axis=(1, 2)))  # the words whose maps are not flat
        if told.size:
            links = affinity_edges(maps.affinity)
            likely = self.probabilities(walk(attention[told], links, self.num_steps, self.spread))
            labels = self.cut_pixels(image, likely, self.cut_cells(image, likely, links))
            masks[told] = labels == np.arange(1, told.size + 1)[:, None, None]
        return masks

    def probabilities(self, attention: Float64[np.ndarray, "words h w"]) -> Float64[np.ndarray, "labels h w"]:
        """How likely each label is by attention alone: P of the class docstring, kept above the floor."""
        levels = np.clip([self.level * otsu_level(one) for one in attention], self.min_level, self.max_level)
        odds = np.concatenate([np.zeros_like(attention[:1]), (attention - levels[:, None, None]) / self.softness])
        share = np.exp(odds - odds.max(axis=0))
        return self.above_floor(share / share.sum(axis=0))

    def above_floor(self, share: Float[np.ndarray, "labels h w"]) -> Float64[np.ndarray, "labels h w"]:
        """Mix in as much of an even vote as keeps every label at the floor or above."""
        floor = min(self.floor, 0.5 / len(share))
        above: Float64[np.ndarray, "labels h w"] = floor + (1 - len(share) * floor) * share.astype(np.float64)
        return above

    def cut_cells(
        self, image: UInt8[np.ndarray, "H W 3"], likely: Float64[np.ndarray, "labels h w"], links: Edges
    ) -> Int[np.ndarray, "h w"]:
        """Labels of the maps' cells: the first of the two cuts."""
        near = (
            (offset, self.coherence + self.color * same) for offset, same in contrast(colors(image, likely[0].shape))
        )
        edges = links.times(self.affinity) + grid_edges(likely[0].shape, over_distance(near))
        start = likely.argmax(axis=0)
        free = np.ones(start.shape, dtype=bool)
        for label in reversed(range(len(likely))):  # the background last: it keeps its cell even from a word
            rest = np.delete(likely, label, axis=0).max(axis=0)
            best = np.unravel_index(np.argmax(likely[label] - rest), start.shape)
            start[best], free[best] = label, False
        return expand(-np.log(likely), edges, free=free, start=start)

    def cut_pixels(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        likely: Float64[np.ndarray, "labels h w"],
        cells: Int[np.ndarray, "h w"],
    ) -> Int[np.ndarray, "H W"]:
        """Labels of the image's pixels: the second cut, in the band around the outline of the first."""
        shrink = min(1.0, self.max_size / max(image.shape[:2]))
        size = (max(1, round(image.shape[0] * shrink)), max(1, round(image.shape[1] * shrink)))
        labels = resize(one_hot(cells, len(likely)), size).argmax(axis=0)
        cell = max(1.0, math.sqrt(labels.size / cells.size))  # pixels
        free = near_border(labels, max(1, round(self.band * cell)))
        if free.any():
            seen = colors(image, size)
            share = self.above_floor(resize(likely, size))
            price = -np.log(share) - self.palette * np.log(palette_share(seen, share))
            near = ((offset, self.smoothness * cell / USUAL_CELL * same) for offset, same in contrast(seen))
            labels = expand(price, grid_edges(size, over_distance(near)), free=free, start=labels)
        if size != image.shape[:2]:
            labels = resize(one_hot(labels, len(likely)), (image.shape[0], image.shape[1])).argmax(axis=0)
        return np.asarray(labels)


def affinity_edges(affinity: Float[np.ndarray, "edges h w"]) -> Edges:
    """Self-attention between cells in [0, 1): what is above uniform, over the most that an end gives anyone.

    Both ends are averaged. Attention that falls everywhere alike is 1 everywhere and links nothing.
    """
    given = affinity.astype(np.float64)
    shape = given.shape[1:]
    pairs = [ends(shape, offset) for offset in AFFINITY_OFFSETS]
    most = np.ones(shape)
    for attention, pair in zip(given, pairs, strict=True):
        for end in pair:
            most[end] = np.maximum(most[end], attention[pair[0]])
    above = np.maximum(given - 1, 0)
    for attention, (here, there) in zip(above, pairs, strict=True):
        attention[here] *= 0.5 / most[here] + 0.5 / most[there]
    return grid_edges(shape, zip(AFFINITY_OFFSETS, above, strict=True))


def walk(
    attention: Float64[np.ndarray, "words h w"], links: Edges, num_steps: int, spread: float
) -> Float64[np.ndarray, "words h w"]:
    """Let attention spread along self-attention. A cell without links keeps its own."""
    flat = attention.reshape(len(attention), -1).T
    size = len(flat)
    tails, heads = np.concatenate([links.first, links.second]), np.concatenate([links.second, links.first])
    matrix = csr_array((np.concatenate([links.weight, links.weight]), (tails, heads)), shape=(size, size))
    total = matrix.sum(axis=1)[:, None]
    for _ in range(num_steps):
        near = np.divide(matrix @ flat, total, out=flat.copy(), where=total > 0)
        flat = (1 - spread) * flat + spread * near
    return scaled(flat.T.reshape(attention.shape))


def contrast(
    seen: Float64[np.ndarray, "h w 3"],
) -> list[tuple[tuple[int, int], Float64[np.ndarray, "h w"]]]:
    """How alike neighbours are in colour, in (0, 1], by offset: exp(-beta |difference|^2), beta as in GrabCut."""
    shape = seen.shape[:2]
    differences, count = [], 0
    for offset in NEAR:
        here, there = ends(shape, offset)
        difference = np.zeros(shape)
        difference[here] = np.square(seen[here] - seen[there]).sum(axis=2)
        differences.append(difference)
        count += difference[here].size
    mean = sum(difference.sum() for difference in differences) / max(count, 1)
    beta = 1 / (2 * mean) if mean > 0 else 0.0  # an image of one colour has no contrast
    return [(offset, np.exp(-beta * difference)) for offset, difference in zip(NEAR, differences, strict=True)]


def palette_share(
    seen: Float64[np.ndarray, "h w 3"], share: Float64[np.ndarray, "labels h w"]
) -> Float64[np.ndarray, "labels h w"]:
    """The share of each label in a pixel's colour: histograms weighted by ``share``, each of sum 1, compared."""
    index = np.minimum((seen * PALETTE_BINS).astype(np.intp), PALETTE_BINS - 1)
    color = (index[..., 0] * PALETTE_BINS + index[..., 1]) * PALETTE_BINS + index[..., 2]
    bins = (PALETTE_BINS,) * 3
    votes = []
    for one in share:
        counts = np.bincount(color.ravel(), weights=one.ravel(), minlength=PALETTE_BINS**3).reshape(bins)
        smooth = gaussian_filter(counts, PALETTE_BLUR, mode="constant").ravel()
        votes.append((smooth / smooth.sum())[color] + UNSEEN)
    part: Float64[np.ndarray, "labels h w"] = np.stack(votes) / np.sum(votes, axis=0)
    return part


def over_distance(
    weights: Iterable[tuple[tuple[int, int], Float64[np.ndarray, "h w"]]],
) -> list[tuple[tuple[int, int], Float64[np.ndarray, "h w"]]]:
    return [(offset, weight / math.hypot(*offset)) for offset, weight in weights]


def near_border(labels: Int[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
    """Where another label is at most ``reach`` pixels away, rows and columns each."""
    span = 2 * reach + 1
    near: Bool[np.ndarray, "h w"] = maximum_filter(labels, span) != minimum_filter(labels, span)
    return near


def one_hot(labels: Int[np.ndarray, "h w"], count: int) -> Float32[np.ndarray, "count h w"]:
    hot: Float32[np.ndarray, "count h w"] = (labels == np.arange(count)[:, None, None]).astype(np.float32)
    return hot


def colors(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, ...]) -> Float64[np.ndarray, "h w 3"]:
    """The image on a grid of ``size`` (height, width), each cell the mean of its pixels, in [0, 1]."""
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))
    return image.astype(np.float64) / 255
