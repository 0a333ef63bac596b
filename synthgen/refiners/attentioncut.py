"""The cheapest outline that still agrees with cross-attention, self-attention and colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8
from PIL import Image
from scipy.ndimage import label as connected
from scipy.special import expit, softmax

from synthgen.graphcut import Edges, Solver, ends, expand, grid_edges, window
from synthgen.records import Maps
from synthgen.refiners._affinity import Links, affinity_edges, walk
from synthgen.refiners._palette import Palette
from synthgen.refiners._words import resize, scaled, side_means

__all__ = ["AttentionCut"]

#: Half of the 8-neighbourhood; the other half is the same edge seen from its other end.
NEAR = ((0, 1), (1, 0), (1, 1), (1, -1))
#: Every word looks at least so much at every cell, in multiples of its highest.
FAINT = 1e-6
#: Pixels in a cell's side where ``smoothness`` is the price of an edge, and at most on the first grid of pixels.
USUAL_CELL = 8


@dataclass(frozen=True, kw_only=True)
class AttentionCut:
    """Give every pixel to one word or to none, so that disagreement with the attention plus boundary costs least.

    DiffusionSeg (Ma et al., 2023) names such a cut; its energy was not to be had, and this one is ours:

        E(l) = sum_i U_i(l_i) + sum_(i, j) w_ij [l_i != l_j]            prices in nats

    It is solved on one grid after another, with label 0 for no word. First on the maps' own, which finds the object:

        F_v = a word's cross-attention scaled to [0, 1], then ``num_steps`` times (1 - spread) F + spread S F, scaled
        t_v = (1 - level) low_v + level high_v, the means of F_v below and above Otsu's level: calibrated per image
        G_v = F_v of ``object_steps`` steps with ``object_spread``: the word's attention, object by object
        P_v = G_v^rivalry / sum_u G_u^rivalry * sigmoid((F_v - t_v) / softness)
        P_0 = 1 - sum_v P_v
        U   = -log P
        w   = affinity A_ij + [neighbours] color B_ij / distance

    So F says whether a cell is a word's, and G which word's it can be: an object whose parts draw different words goes
    to the one that looks at it most, for all that this word looks at. A is what self-attention along
    ``AFFINITY_OFFSETS`` has above uniform, over the most that i gives anyone, averaged with the same of j; S is A with
    rows that sum to 1; B_ij = exp(-beta |c_i - c_j|^2) with beta = 1 / (2 mean |c_i - c_j|^2) as in GrabCut. Each word
    keeps the cell that speaks most for it, and so does the background; hence no cut takes all or nothing. Then on
    pixels: the image's own, and where a cell would be more than 8 of them wide first on coarser ones, each grid twice
    as fine as the one before. The first of these grids is cut ``cuts`` times, the others once. Free is a band around
    the outline so far, ``band`` cells to each side on the first and ``reach`` pixels on the others:

        U   = -log P - palette T log Q,  Q_l = share of label l in a pixel's colour thereabouts
        w   = smoothness (cell / 8 px) B_ij / distance

    Between the cells' centres log P is linear, and P then scaled to sum 1. Q is of histograms, counted with weight P in
    the first cut, and with P and the labels so far, mixed by ``trust``, in later ones: one in each window, WINDOWS on
    the image's long side, its neighbours' blurred in and as much of the whole image's as it has pixels; between the
    windows' centres log Q is linear. Bins lie along the principal axes of the image's own colours. T in [0, 1] says how
    well colours tell labels: 1 - mean_l H_l / log(labels), H_l the mean of -log Q_l over what label l counts, and 0
    where that is negative. One word: every minimum is exact. Several are solved together by alpha-expansion, each move
    exact. A connected part of a label that has no pixel of that label before the cut is a stray of like colour: its
    pixels stay what they were. Images longer than ``max_size`` are cut at that size and the outline is enlarged, so it
    is no finer than that. A word whose map is flat gets an empty mask. Attention that is high elsewhere stays: what is
    no object is the filter's to drop.
    """

    solver: ClassVar[type[Solver] | None] = None  # the fastest there is; it changes no mask

    num_steps: int = 2  # steps of the walk along self-attention
    spread: float = 0.2  # share of a step that comes from other cells, in [0, 1]
    level: float = 0.42  # where word and background are as likely, on the way from the low side's mean to the high's
    softness: float = 0.08  # difference of scaled attention that is worth one nat
    object_steps: int = 8  # steps of the walk that tells which word's an object is
    object_spread: float = 0.7  # share of such a step that comes from other cells, in [0, 1]
    rivalry: float = 8.0  # how much a word that looks at an object more than the others has of it
    floor: float = 1e-4  # no label is less likely than this, nor dearer than its surprise
    affinity: float = 0.4  # nats for parting two cells of which each looks at the other most
    color: float = 0.4  # nats for parting two neighbouring cells of equal colour
    band: float = 2.5  # half the width of the band on the first grid of pixels, in cells of the maps
    palette: float = 6.0  # weight of the colours' own vote where they tell all; 0 asks contrast alone
    smoothness: float = 11.0  # nats for parting two neighbouring pixels of equal colour, at 8 pixels a cell
    reach: int = 6  # half the width of the band on the grids after that, in their pixels
    trust: float = 0.8  # share of the labels so far in what the colours are counted by, after the first cut of pixels
    cuts: int = 3  # of the first grid of pixels, each with colours counted by what the one before gave
    max_rounds: int = 1  # of alpha-expansion, on each grid of pixels
    max_size: int = 128  # pixels on the long side of the finest cut

    def __post_init__(self) -> None:
        weights = ("affinity", "color", "palette", "smoothness", "band", "rivalry")
        for name in ("num_steps", "object_steps", *weights):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative or infinite, but is {getattr(self, name)}")
        for name in ("spread", "object_spread", "level", "trust"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not 1e-3 <= self.softness < math.inf:
            raise ValueError(f"softness must be at least 0.001, not {self.softness}")
        if not 0 < self.floor <= 0.01:
            raise ValueError(f"floor must be in (0, 0.01], not {self.floor}")
        for name in ("reach", "cuts", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
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
            edges = affinity_edges(maps.affinity)
            likely = self.probabilities(attention[told], Links.of(edges))
            labels = self.cut_pixels(image, likely, self.cut_cells(image, likely, edges))
            for label, word in enumerate(told, start=1):
                masks[word] = labels == label
        return masks

    def probabilities(
        self, attention: Float64[np.ndarray, "words h w"], links: Links
    ) -> Float64[np.ndarray, "labels h w"]:
        """How likely each label is by attention alone: P of the class docstring, kept above the floor."""
        near = walk(attention, links, self.num_steps, self.spread)
        means = np.array([side_means(one) for one in near])
        levels = means @ (1 - self.level, self.level)
        whether = expit((near - levels[:, None, None]) / self.softness)
        share = whether if len(attention) == 1 else whether * self.rivals(attention, links)
        return self.above_floor(np.concatenate([1 - share.sum(axis=0, keepdims=True), share]))

    def rivals(self, attention: Float64[np.ndarray, "words h w"], links: Links) -> Float64[np.ndarray, "words h w"]:
        """Which word's a cell can be, sum 1: G of the class docstring, compared."""
        far = walk(attention, links, self.object_steps, self.object_spread) + FAINT
        which: Float64[np.ndarray, "words h w"] = softmax(self.rivalry * np.log(far), axis=0)
        return which

    def above_floor(self, share: Float[np.ndarray, "labels h w"]) -> Float[np.ndarray, "labels h w"]:
        """Mix in as much of an even vote as keeps every label at the floor or above."""
        floor = min(self.floor, 0.5 / len(share))
        above: Float[np.ndarray, "labels h w"] = floor + (1 - len(share) * floor) * share
        return above

    def cut_cells(
        self, image: UInt8[np.ndarray, "H W 3"], likely: Float64[np.ndarray, "labels h w"], affinity: Edges
    ) -> Int[np.ndarray, "h w"]:
        """Labels of the maps' cells: the first of the two cuts."""
        start = likely.argmax(axis=0)
        near = (
            (offset, self.color / math.hypot(*offset) * same) for offset, same in contrast(colors(image, start.shape))
        )
        edges = affinity.times(self.affinity) + grid_edges(start.shape, near)
        free = np.ones(start.shape, dtype=bool)
        for label in reversed(range(len(likely))):  # the background last: it keeps its cell even from a word
            rest = np.delete(likely, label, axis=0).max(axis=0)
            best = np.unravel_index(np.argmax(likely[label] - rest), start.shape)
            start[best], free[best] = label, False
        return expand(-np.log(likely), edges, free=free, start=start, solver=self.solver)

    def cut_pixels(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        likely: Float[np.ndarray, "labels h w"],
        cells: Int[np.ndarray, "h w"],
    ) -> Int[np.ndarray, "H W"]:
        """Labels of the image's pixels: the second cut, on finer and finer grids, each near the outline so far."""
        size, count = (image.shape[0], image.shape[1]), len(likely)
        labels, share = cells, likely
        for number, grid in enumerate(finer(size, cells.shape, self.max_size)):
            before = labels, share
            labels, share = enlarged(labels, count, grid), self.above_floor(between(likely, grid))
            cell = math.sqrt(labels.size / cells.size)  # in pixels of this grid
            pixels = self.pixels(colors(image, grid), share, cell)
            if number:
                labels = self.cut_band(pixels, labels, resize(self.counted(*before), grid), self.reach)
            else:
                for again in range(self.cuts):
                    counted = self.counted(labels, share) if again else share
                    labels = self.cut_band(pixels, labels, counted, max(1, round(self.band * cell)))
        return enlarged(labels, count, size)

    def counted(
        self, labels: Int[np.ndarray, "h w"], share: Float[np.ndarray, "labels h w"]
    ) -> Float[np.ndarray, "labels h w"]:
        """The weights that colours are counted with: P and the labels so far, mixed."""
        return self.above_floor((1 - self.trust) * share + self.trust * one_hot(labels, len(share)))

    def pixels(self, seen: UInt8[np.ndarray, "h w 3"], share: Float32[np.ndarray, "labels h w"], cell: float) -> Pixels:
        """What is the same in every cut of a grid of pixels; a cell is ``cell`` of them."""
        price = self.smoothness * cell / USUAL_CELL
        near = [(offset, price / math.hypot(*offset) * same) for offset, same in contrast(seen)]
        return Pixels(Palette(seen), -np.log(share), near)

    def cut_band(
        self,
        pixels: Pixels,
        start: Int[np.ndarray, "h w"],
        counted: Float32[np.ndarray, "labels h w"],
        reach: int,
    ) -> Int[np.ndarray, "h w"]:
        """One cut of a grid of pixels, free in a band around the outline of ``start``, without strays."""
        free = self.band_of(start, reach)
        if not free.any():
            return start
        part = window(free, NEAR)
        prices = self.palette * pixels.palette.surprise(counted, part) + pixels.surprise[:, *part]
        before, free = start[part], free[part]
        edges = grid_edges(before.shape, ((offset, weight[part]) for offset, weight in pixels.near), free=free)
        found = expand(prices, edges, free=free, start=before, max_rounds=self.max_rounds, solver=self.solver)
        labels = start.copy()
        labels[part] = anchored(found, before, len(counted))
        return labels

    def band_of(self, labels: Int[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
        """Which pixels may change their label: those near another one."""
        return near_border(labels, reach)


class Pixels(NamedTuple):
    """What all cuts of one grid of pixels share."""

    palette: Palette
    surprise: Float32[np.ndarray, "labels h w"]  # -log P
    near: list[tuple[tuple[int, int], Float32[np.ndarray, "h w"]]]  # w, by offset


def contrast(seen: UInt8[np.ndarray, "h w 3"]) -> list[tuple[tuple[int, int], Float32[np.ndarray, "h w"]]]:
    """How alike neighbours are in colour, in (0, 1], by offset: exp(-beta |difference|^2), beta as in GrabCut."""
    shape = seen.shape[:2]
    channels = seen.transpose(2, 0, 1).astype(np.float32, order="C")  # whole numbers: squares and sums are exact
    differences, count = [], 0
    for offset in NEAR:
        here, there = ends(shape, offset)
        squares = np.square(channels[:, *here] - channels[:, *there])
        difference = np.zeros(shape, dtype=np.float32)
        difference[here] = squares.sum(axis=0)
        differences.append(difference)
        count += squares[0].size
    mean = sum(float(difference.sum(dtype=np.float64)) for difference in differences) / max(count, 1)
    beta = 1 / (2 * mean) if mean > 0 else 0.0  # an image of one colour has no contrast
    return [(offset, np.exp(-beta * difference)) for offset, difference in zip(NEAR, differences, strict=True)]


def between(likely: Float[np.ndarray, "labels h w"], size: tuple[int, int]) -> Float32[np.ndarray, "labels H W"]:
    """Shares on a finer grid, sum 1: their logarithms linear between the cells' centres."""
    share = np.exp(resize(np.log(likely), size))
    result: Float32[np.ndarray, "labels H W"] = share / share.sum(axis=0)
    return result


def near_border(labels: Int[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
    """Where another label is at most ``reach`` pixels away, rows and columns each."""
    near = np.zeros(labels.shape, dtype=bool)
    for offset in NEAR:
        here, there = ends(labels.shape, offset)
        differs = labels[here] != labels[there]
        near[here] |= differs
        near[there] |= differs
    wide = 1
    while wide < reach:  # reaching ``step`` further on both sides leaves no gap while that is at most 2 wide - 1
        step = min(2 * wide - 1, reach - wide)
        for axis in (0, 1):
            here, there = ends(labels.shape, (step, 0) if axis == 0 else (0, step))
            wider = near.copy()
            wider[here] |= near[there]
            wider[there] |= near[here]
            near = wider
        wide += step
    return near


def anchored(labels: Int[np.ndarray, "h w"], start: Int[np.ndarray, "h w"], count: int) -> Int[np.ndarray, "h w"]:
    """Labels without strays: where a part of a label shares no pixel with that label of ``start``, ``start`` stands.

    Parts hang together over sides and corners.
    """
    kept = labels.copy()
    for label in range(count):
        parts, number = connected(labels == label, np.ones((3, 3)))
        if number > 1:
            stray = np.ones(number + 1, dtype=bool)
            stray[0] = stray[parts[start == label]] = False
            np.copyto(kept, start, where=stray[parts])
    return kept


def one_hot(labels: Int[np.ndarray, "h w"], count: int) -> Float32[np.ndarray, "count h w"]:
    hot: Float32[np.ndarray, "count h w"] = (labels == np.arange(count)[:, None, None]).astype(np.float32)
    return hot


def colors(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"]:
    """The image on a grid of ``size`` (height, width), each cell the mean of its pixels."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))


def finer(size: tuple[int, int], cells: tuple[int, ...], max_size: int) -> list[tuple[int, int]]:
    """The grids of pixels (height, width), each twice as fine as the one before.

    The first has cells of at most USUAL_CELL pixels; the last is the image's own, or where that is longer, it at
    ``max_size``.
    """
    most = min(max_size, max(size))
    halvings = max(0, math.ceil(math.log2(most / max(cells) / USUAL_CELL)))
    sides = [most / 2**k for k in range(halvings, -1, -1)]
    return [(max(1, round(size[0] * side / max(size))), max(1, round(size[1] * side / max(size)))) for side in sides]


def enlarged(labels: Int[np.ndarray, "h w"], count: int, size: tuple[int, int]) -> Int[np.ndarray, "H W"]:
    """Labels on another grid; where they meet, the one with the larger share."""
    if labels.shape == size:
        return labels
    if (2 * labels.shape[0], 2 * labels.shape[1]) == size:  # each pixel has 9/16 of its own cell, or more
        return labels.repeat(2, axis=0).repeat(2, axis=1)
    largest, most = np.zeros(size, dtype=labels.dtype), resize((labels == 0).astype(np.float32)[None], size)[0]
    for label in range(1, count):  # one at a time: all of many words would be gigabytes
        share = resize((labels == label).astype(np.float32)[None], size)[0]
        np.copyto(largest, label, where=share > most)
        np.maximum(most, share, out=most)
    return largest
