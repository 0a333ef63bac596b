"""The cheapest outline that still agrees with cross-attention, self-attention and colour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from synthgen.graphcut import Edges, ends, expand, grid_edges
from synthgen.records import Maps
from synthgen.refiners._affinity import affinity_edges, walk
from synthgen.refiners._words import resize, scaled, side_means

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

    It is solved on one grid after another, with label 0 for no word. First on the maps' own, which finds the object:

        F_v = a word's cross-attention scaled to [0, 1], then ``num_steps`` times (1 - spread) F + spread S F, scaled
        t_v = (1 - level) low_v + level high_v, the means of F_v below and above Otsu's level: calibrated per image
        P   = softmax over (0, z_1, z_2, ...),  z_v = (F_v - clip(t_v, min_level, max_level)) / softness
        U   = -log P
        w   = affinity A_ij + [neighbours] (coherence + color B_ij) / distance

    A is what self-attention along ``AFFINITY_OFFSETS`` has above uniform, over the most that i gives anyone, averaged
    with the same of j; S is A with rows that sum to 1; B_ij = exp(-beta |c_i - c_j|^2) with beta = 1 / (2 mean |c_i
    - c_j|^2) as in GrabCut. Each word keeps the cell that speaks most for it, and so does the background; hence no cut
    takes all or nothing. Then on pixels, each grid twice as fine as the one before, up to the image's own; free is a
    band around the outline so far, ``band`` cells to each side on the first of these grids and ``reach`` pixels later:

        U   = -log P - palette log Q,  Q_l = share of label l in a pixel's colour
        w   = smoothness (cell / 8 px) B_ij / distance

    Q is counted over the image with weight P, and later with P and the labels so far, mixed by ``trust``. One word:
    every minimum is exact. Several are solved together by alpha-expansion, each move exact. Images longer than
    ``max_size`` are cut at that size and the outline is enlarged, so it is no finer than that. A word whose map is flat
    gets an empty mask. Attention that is high elsewhere stays: what is no object is the filter's to drop.
    """

    num_steps: int = 2  # steps of the walk along self-attention
    spread: float = 0.2  # share of a step that comes from other cells, in [0, 1]
    level: float = 0.35  # where word and background are as likely, on the way from the low side's mean to the high's
    min_level: float = 0.15  # bounds for that, in [0, 1]
    max_level: float = 0.5
    softness: float = 0.08  # difference of scaled attention that is worth one nat
    floor: float = 1e-3  # no label is less likely than this, nor dearer than its surprise
    affinity: float = 0.4  # nats for parting two cells of which each looks at the other most
    coherence: float = 0.05  # nats for parting two neighbouring cells, whatever their colours
    color: float = 0.4  # nats more where their colours are equal
    band: float = 3.0  # half the width of the band on the first grid of pixels, in cells of the maps
    palette: float = 2.0  # weight of the colours' own vote; 0 asks contrast alone
    smoothness: float = 6.5  # nats for parting two neighbouring pixels of equal colour, at 8 pixels a cell
    reach: int = 6  # half the width of the band on the finer grids after the first, in their pixels
    trust: float = 0.3  # share of the labels so far in what the colours are counted by, on those grids
    max_rounds: int = 2  # of alpha-expansion, on each grid of pixels
    max_size: int = 128  # pixels on the long side of the finest cut

    def __post_init__(self) -> None:
        for name in ("num_steps", "affinity", "coherence", "color", "palette", "smoothness", "band"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative or infinite, but is {getattr(self, name)}")
        for name in ("spread", "level", "trust"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.min_level <= self.max_level <= 1:
            raise ValueError(f"0 <= min_level <= max_level <= 1 must hold, not {self.min_level} and {self.max_level}")
        if not 1e-3 <= self.softness < math.inf:
            raise ValueError(f"softness must be at least 0.001, not {self.softness}")
        if not 0 < self.floor <= 0.01:
            raise ValueError(f"floor must be in (0, 0.01], not {self.floor}")
        if self.reach < 1 or self.max_rounds < 1:
            raise ValueError(f"reach and max_rounds must be 1 or more, not {self.reach} and {self.max_rounds}")
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
        means = np.array([side_means(one) for one in attention])
        levels = np.clip(means @ (1 - self.level, self.level), self.min_level, self.max_level)
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
        """Labels of the image's pixels: the second cut, on finer and finer grids, each near the outline so far."""
        labels, model = cells, likely
        for size in finer((image.shape[0], image.shape[1]), cells.shape, self.max_size):
            labels = enlarged(labels, len(likely), size)
            cell = math.sqrt(labels.size / cells.size)  # in pixels of this grid
            reach = round(self.band * cell) if model is likely else self.reach
            share = self.above_floor(resize(likely, size))
            labels = self.cut_band(colors(image, size), share, resize(model, size), labels, cell, max(1, reach))
            model = self.above_floor((1 - self.trust) * share + self.trust * one_hot(labels, len(likely)))
        return enlarged(labels, len(likely), (image.shape[0], image.shape[1]))

    def cut_band(
        self,
        seen: Float64[np.ndarray, "h w 3"],
        share: Float64[np.ndarray, "labels h w"],
        model: Float[np.ndarray, "labels h w"],
        labels: Int[np.ndarray, "h w"],
        cell: float,
        reach: int,
    ) -> Int[np.ndarray, "h w"]:
        """Labels of one grid's pixels, those further than ``reach`` from the outline as they are."""
        free = near_border(labels, reach)
        if not free.any():
            return labels
        prices, edges = self.energy_of(seen, share, model, cell)
        return expand(prices, edges, free=free, start=labels, max_rounds=self.max_rounds)

    def energy_of(
        self,
        seen: Float64[np.ndarray, "h w 3"],
        share: Float64[np.ndarray, "labels h w"],
        model: Float[np.ndarray, "labels h w"],
        cell: float,
    ) -> tuple[Float64[np.ndarray, "labels h w"], Edges]:
        """U and w of a grid of pixels, whose colours are counted with weight ``model``; a cell is ``cell`` of them."""
        prices = -np.log(share) - self.palette * np.log(palette_share(seen, model))
        near = ((offset, self.smoothness * cell / USUAL_CELL * same) for offset, same in contrast(seen))
        return prices, grid_edges(share[0].shape, over_distance(near))


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
    seen: Float64[np.ndarray, "h w 3"], share: Float[np.ndarray, "labels h w"]
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


def finer(size: tuple[int, int], cells: tuple[int, ...], max_size: int) -> list[tuple[int, int]]:
    """The grids between the maps' and the image's (height, width), each twice as fine as the one before.

    The last is the image's own, or where that is longer, it at ``max_size``.
    """
    most = min(max_size, max(size))
    halvings = max(0, math.ceil(math.log2(most / max(cells))) - 1)
    sides = [most / 2**k for k in range(halvings, -1, -1)]
    return [(max(1, round(size[0] * side / max(size))), max(1, round(size[1] * side / max(size)))) for side in sides]


def enlarged(labels: Int[np.ndarray, "h w"], count: int, size: tuple[int, int]) -> Int[np.ndarray, "H W"]:
    """Labels on another grid; where they meet, the one with the larger share."""
    if labels.shape == size:
        return labels
    return np.asarray(resize(one_hot(labels, count), size).argmax(axis=0))
