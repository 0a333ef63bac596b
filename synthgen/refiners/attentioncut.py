"""A graph cut over cross-attention, self-attention and colour."""

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

#: Half of the 8-neighbourhood; the other half is the same edges in the other direction.
NEAR = ((0, 1), (1, 0), (1, 1), (1, -1))
#: Added to every cell of the maps that decide which word an object belongs to, in multiples of a map's maximum.
EPSILON = 1e-6
#: Pixels per side of a cell at which ``smoothness`` is the weight of an edge; the maximum on the first pixel grid.
REFERENCE_CELL = 8


@dataclass(frozen=True, kw_only=True)
class AttentionCut:
    """Label every pixel with one word or none, minimising disagreement with the attention plus boundary cost.

    DiffusionSeg (Ma et al., 2023) introduced a cut of this name; its energy could not be obtained, so this one is ours:

        E(l) = sum_i U_i(l_i) + sum_(i, j) w_ij [l_i != l_j]            in nats; label 0 is the background

    It is minimised first on the grid of the maps, which locates the object, then on pixels, which find its outline.

    Stage 1 (cells):

        F_v = a word's cross-attention scaled to [0, 1], then ``num_steps`` times (1 - spread) F + spread S F, scaled
        t_v = (1 - level) low_v + level high_v, the means of F_v below and above Otsu's threshold: calibrated per image
        G_v = F_v with ``object_steps`` steps and ``object_spread``: the word's attention, evened out over each object
        P_v = G_v^rivalry / sum_u G_u^rivalry * sigmoid((F_v - t_v) / softness)
        P_0 = 1 - sum_v P_v
        U   = -log P
        w   = affinity A_ij + [neighbours] color B_ij / distance

    F decides whether a cell belongs to a word, G to which word: an object whose parts attract different words goes to
    the word with the most attention on it, each map scaled to its own range. A_ij is the self-attention along
    ``AFFINITY_OFFSETS`` above uniform, divided by the largest of cell i, averaged with the same for j; S is A with rows
    that sum to 1; B_ij = exp(-beta |c_i - c_j|^2) with beta = 1 / (2 mean |c_i - c_j|^2) as in GrabCut. P is mixed with
    a uniform distribution so that no label falls below ``floor`` (0.5 / labels, if that is less). For every label, the
    background included, the cell with the strongest evidence is fixed, so no cut takes all or nothing.

    Stage 2 (pixels): the grid is the image's own; where a cell would be more than 8 pixels wide, coarser grids come
    first, each grid twice as fine as the one before. The first of them is cut ``cuts`` times, the others once. Only a
    band around the current outline is free, ``band`` cells to each side on the first grid, ``reach`` pixels on others:

        U   = -log P - palette T log Q,  Q_l = share of label l among nearby pixels of the same colour
        w   = smoothness (cell / 8 px) B_ij / distance

    log P is interpolated linearly between cell centres, and P then normalised to sum 1. Q comes from colour histograms,
    weighted with P in the first cut and with a mix of P and the current labels (``trust``) in later ones. Each window,
    WINDOWS on the image's long side, has its own, with its neighbours' blurred in and the whole image's added at the
    weight of one window's pixels; log Q is interpolated linearly between window centres. Bins lie along the principal
    axes of the image's colours. T in [0, 1] measures how well colours separate the labels: it is
    1 - mean_l H_l / log(labels), H_l the weighted mean of -log Q_l over label l, and 0 where that is negative. A
    connected part of a label without a pixel of that label before the cut is a stray of similar colour: its pixels keep
    their previous labels.

    Guarantees: with one word every minimum is exact; several words are solved together by alpha-expansion, each move of
    which is exact. A word whose map is flat gets an empty mask.

    Limits: an image longer than ``max_size`` is cut at that size and the outline enlarged, so it is no finer than that.
    High attention away from the object stays in the mask; dropping such masks is left to the ``masks`` stage.
    """

    solver: ClassVar[type[Solver] | None] = None  # None: the fastest available; the masks do not depend on it

    num_steps: int = 2  # propagation steps along self-attention
    spread: float = 0.2  # step size of the propagation, in [0, 1]
    level: float = 0.42  # threshold between the two Otsu class means: 0 = the low mean, 1 = the high mean
    softness: float = 0.08  # temperature of the sigmoid, in units of scaled attention
    object_steps: int = 8  # propagation steps of the map that decides which word an object belongs to
    object_spread: float = 0.7  # step size of that propagation, in [0, 1]
    rivalry: float = 8.0  # exponent of the competition between words; 0: equal shares
    floor: float = 1e-4  # lower bound on each label's probability, so an attention unary is at most -log(floor)
    affinity: float = 0.4  # weight (nats) of the self-attention edge between two maximally linked cells
    color: float = 0.4  # weight (nats) of the contrast edge between neighbouring cells of equal colour
    band: float = 2.5  # half-width of the free band on the first pixel grid, in cells of the maps
    palette: float = 6.0  # weight of the colour-histogram unary; 0: contrast edges only
    smoothness: float = 11.0  # weight (nats) of the contrast edge between equal neighbouring pixels, at 8 px per cell
    reach: int = 6  # half-width of the free band on finer grids, in their pixels
    trust: float = 0.8  # weight of the current labelling (against attention) when the histograms are refitted
    cuts: int = 3  # cuts on the first pixel grid; the histograms are refitted between them
    max_rounds: int = 1  # rounds of alpha-expansion on each pixel grid, at most
    max_size: int = 512  # longest side of the finest grid that is cut, in pixels

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
        """One mask per word; empty where a word's map is flat.

        Raises:
            ValueError: the maps have no cells, or hold NaN or infinity.
        """
        masks = np.zeros((len(maps.weights), *image.shape[:2]), dtype=bool)
        attention = scaled(maps.weights)
        nonflat = np.flatnonzero(attention.any(axis=(1, 2)))  # words
        if nonflat.size:
            edges = affinity_edges(maps.affinity)
            probs = self.probabilities(attention[nonflat], Links.of(edges))
            labels = self.cut_pixels(image, probs, self.cut_cells(image, probs, edges))
            for label, word in enumerate(nonflat, start=1):
                masks[word] = labels == label
        return masks

    def probabilities(
        self, attention: Float64[np.ndarray, "words h w"], links: Links
    ) -> Float64[np.ndarray, "labels h w"]:
        """The probability of each label by attention alone: P of the class docstring."""
        near = walk(attention, links, self.num_steps, self.spread)
        means = np.array([side_means(one) for one in near])
        levels = means @ (1 - self.level, self.level)
        whether = expit((near - levels[:, None, None]) / self.softness)
        share = whether if len(attention) == 1 else whether * self.rivals(attention, links)
        return self.above_floor(np.concatenate([1 - share.sum(axis=0, keepdims=True), share]))

    def rivals(self, attention: Float64[np.ndarray, "words h w"], links: Links) -> Float64[np.ndarray, "words h w"]:
        """The share of each word in each cell, sum 1: the first factor of P_v in the class docstring."""
        far = walk(attention, links, self.object_steps, self.object_spread) + EPSILON
        which: Float64[np.ndarray, "words h w"] = softmax(self.rivalry * np.log(far), axis=0)
        return which

    def above_floor(self, share: Float[np.ndarray, "labels h w"]) -> Float[np.ndarray, "labels h w"]:
        """Mix in a uniform distribution so that every label is at the floor or above."""
        floor = min(self.floor, 0.5 / len(share))
        above: Float[np.ndarray, "labels h w"] = floor + (1 - len(share) * floor) * share
        return above

    def cut_cells(
        self, image: UInt8[np.ndarray, "H W 3"], probs: Float64[np.ndarray, "labels h w"], affinity: Edges
    ) -> Int[np.ndarray, "h w"]:
        """Labels of the cells: stage 1 of the class docstring."""
        start = probs.argmax(axis=0)
        near = (
            (offset, self.color / math.hypot(*offset) * same) for offset, same in contrast(colors(image, start.shape))
        )
        edges = affinity.times(self.affinity) + grid_edges(start.shape, near)
        free = np.ones(start.shape, dtype=bool)
        for label in reversed(
            range(len(probs))
        ):  # the background last: its cell stays its own even if a word has it too
            rest = np.delete(probs, label, axis=0).max(axis=0)
            best = np.unravel_index(np.argmax(probs[label] - rest), start.shape)
            start[best], free[best] = label, False
        return expand(-np.log(probs), edges, free=free, start=start, solver=self.solver)

    def cut_pixels(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        probs: Float[np.ndarray, "labels h w"],
        cells: Int[np.ndarray, "h w"],
    ) -> Int[np.ndarray, "H W"]:
        """Labels of the pixels: stage 2 of the class docstring, on finer and finer grids."""
        size, count = (image.shape[0], image.shape[1]), len(probs)
        labels, share = cells, probs
        for number, grid in enumerate(pixel_grids(size, cells.shape, self.max_size)):
            before = labels, share
            labels, share = enlarged(labels, count, grid), self.above_floor(upsampled(probs, grid))
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
        """The weights of the colour histograms: P mixed with the current labels."""
        return self.above_floor((1 - self.trust) * share + self.trust * one_hot(labels, len(share)))

    def pixels(
        self, image: UInt8[np.ndarray, "h w 3"], share: Float32[np.ndarray, "labels h w"], cell: float
    ) -> Pixels:
        """What all cuts of a pixel grid share; ``cell`` is the side of a cell in pixels."""
        weight = self.smoothness * cell / REFERENCE_CELL
        near = [(offset, weight / math.hypot(*offset) * same) for offset, same in contrast(image)]
        return Pixels(Palette(image), -np.log(share), near)

    def cut_band(
        self,
        pixels: Pixels,
        start: Int[np.ndarray, "h w"],
        counted: Float32[np.ndarray, "labels h w"],
        reach: int,
    ) -> Int[np.ndarray, "h w"]:
        """One cut of a pixel grid, free in a band around the outline of ``start``, without strays."""
        free = self.band_of(start, reach)
        if not free.any():
            return start
        part = window(free, NEAR)
        unary = self.palette * pixels.palette.nll(counted, part) + pixels.nll[:, *part]
        before, free = start[part], free[part]
        edges = grid_edges(before.shape, ((offset, weight[part]) for offset, weight in pixels.near), free=free)
        found = expand(unary, edges, free=free, start=before, max_rounds=self.max_rounds, solver=self.solver)
        labels = start.copy()
        labels[part] = anchored(found, before, len(counted))
        return labels

    def band_of(self, labels: Int[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
        """The pixels that may change their label: those near another one."""
        return near_border(labels, reach)


class Pixels(NamedTuple):
    """What all cuts of one pixel grid share."""

    palette: Palette
    nll: Float32[np.ndarray, "labels h w"]  # -log P
    near: list[tuple[tuple[int, int], Float32[np.ndarray, "h w"]]]  # w, by offset


def contrast(image: UInt8[np.ndarray, "h w 3"]) -> list[tuple[tuple[int, int], Float32[np.ndarray, "h w"]]]:
    """Colour similarity of neighbours in (0, 1], by offset: exp(-beta |difference|^2), beta as in GrabCut."""
    shape = image.shape[:2]
    channels = image.transpose(2, 0, 1).astype(np.float32, order="C")  # whole numbers: squares and sums are exact
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


def upsampled(probs: Float[np.ndarray, "labels h w"], size: tuple[int, int]) -> Float32[np.ndarray, "labels H W"]:
    """Probabilities on a finer grid, sum 1: their logarithms are linear between cell centres."""
    share = np.exp(resize(np.log(probs), size))
    result: Float32[np.ndarray, "labels H W"] = share / share.sum(axis=0)
    return result


def near_border(labels: Int[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
    """Pixels with another label at most ``reach`` rows and columns away."""
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
    """Labels without strays: a part of a label that shares no pixel with that label of ``start`` is reset to ``start``.

    Parts are 8-connected.
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


def pixel_grids(size: tuple[int, int], cells: tuple[int, ...], max_size: int) -> list[tuple[int, int]]:
    """The pixel grids (height, width), each twice as fine as the one before.

    On the first a cell has at most REFERENCE_CELL pixels a side; the last is the image's own, or at ``max_size`` if the
    image is longer.
    """
    most = min(max_size, max(size))
    halvings = max(0, math.ceil(math.log2(most / max(cells) / REFERENCE_CELL)))
    sides = [most / 2**k for k in range(halvings, -1, -1)]
    return [(max(1, round(size[0] * side / max(size))), max(1, round(size[1] * side / max(size)))) for side in sides]


def enlarged(labels: Int[np.ndarray, "h w"], count: int, size: tuple[int, int]) -> Int[np.ndarray, "H W"]:
    """Labels on another grid; where several meet, the one with the largest share."""
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
