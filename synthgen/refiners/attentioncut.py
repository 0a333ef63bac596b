"""The cheapest outline that still agrees with cross-attention, self-attention and colour."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from synthgen.graphcut import Edges, expand, grid_edges
from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners._words import otsu_level, resize, scaled

__all__ = ["AttentionCut"]

#: Half of the 8-neighbourhood; the other half is the same edge seen from its other end.
NEAR = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True, kw_only=True)
class AttentionCut:
    """TODO"""

    steps: int = 2
    temperature: float = 0.1
    floor: float = 1e-3
    seed: float = 0.85
    affinity: float = 0.3
    coherence: float = 0.5
    color: float = 0.5
    band: float = 1.5
    contrast: float = 0.5
    trust: float = 0.5
    palette: float = 0.0
    size: int = 128

    def refine(self, image: UInt8[np.ndarray, "H W 3"], maps: Maps) -> Bool[np.ndarray, "words H W"]:
        num_words = len(maps.weights)
        if not num_words:
            return np.zeros((0, *image.shape[:2]), dtype=bool)
        links = affinity_edges(maps)
        likely = self.probabilities(maps, links)
        coarse = self.cut_objects(image, likely, links, self.seeds(maps, links))
        shrink = min(1.0, self.size / max(image.shape[:2]))
        size = (max(1, round(image.shape[0] * shrink)), max(1, round(image.shape[1] * shrink)))
        labels = self.cut_borders(colors(image, size), likely, coarse)
        if size != image.shape[:2]:
            labels = resize(one_hot(labels, num_words + 1), (image.shape[0], image.shape[1])).argmax(axis=0)
        return labels == np.arange(1, num_words + 1)[:, None, None]

    def walk(self, maps, links):
        f = scaled(maps.weights)
        if self.steps:
            flat = f.reshape(len(f), -1)
            total = np.zeros(flat.shape[1])
            np.add.at(total, links.first, links.weight)
            np.add.at(total, links.second, links.weight)
            for _ in range(self.steps):
                near = np.zeros_like(flat)
                for k in range(len(flat)):
                    near[k] += np.bincount(links.first, links.weight * flat[k][links.second], flat.shape[1])
                    near[k] += np.bincount(links.second, links.weight * flat[k][links.first], flat.shape[1])
                flat = np.where(total > 0, 0.5 * flat + 0.5 * near / np.where(total > 0, total, 1), flat)
            f = scaled(flat.reshape(f.shape))
        return f

    def probabilities(self, maps: Maps, links: Edges):
        f = self.walk(maps, links)
        z = np.zeros((len(f) + 1, *f.shape[1:]))
        for k in range(len(f)):
            level = min(max(otsu_level(f[k]), 0.3), 0.6) if f[k].max() > 0 else 0.6
            z[k + 1] = (f[k] - level) / self.temperature
        return soft(z, self.floor)

    def seeds(self, maps, links):
        f = self.walk(maps, links)
        f0 = scaled(maps.weights)
        s = np.full(f.shape[1:], -1)
        s[(f <= 0.1).all(axis=0)] = 0
        best = f.argmax(axis=0)
        top = f.max(axis=0)
        fg = (top >= self.seed) & (np.take_along_axis(f0, best[None], 0)[0] >= 0.5)
        s[fg] = best[fg] + 1
        return s

    def cut_objects(self, image, likely, links, seeds):
        shape = likely.shape[1:]
        u = -np.log(likely)
        # contrast of mean colour
        c = colors(image, shape)
        near = contrast_edges(c)
        n2 = Edges(near.first, near.second, near.weight * self.color)
        dist = grid_edges(shape, [(o, np.full(shape, self.coherence / math.hypot(*o))) for o in NEAR])
        e = Edges(links.first, links.second, links.weight * self.affinity) + n2 + dist
        start = np.where(seeds >= 0, seeds, u.argmin(axis=0))
        return expand(u, e, free=seeds < 0, start=start)

    def cut_borders(self, c, likely, coarse):
        size = c.shape[:2]
        cell = math.sqrt(size[0] * size[1] / (coarse.size))
        cell = max(cell, 1.0)
        hot = resize(one_hot(coarse, len(likely)), size)
        start = hot.argmax(axis=0)
        r = max(1, round(self.band * cell))
        free = maximum_filter(start, 2 * r + 1) != minimum_filter(start, 2 * r + 1)
        if not free.any():
            return start
        blurred = np.stack([gaussian_filter(h, 0.25 * cell) for h in hot])
        p = self.trust * blurred + (1 - self.trust) * resize(likely, size)
        p = np.maximum(p, self.floor)
        u = -np.log(p / p.sum(axis=0))
        if self.palette:
            u = u + self.palette * palette(c, p)
        e = contrast_edges(c)
        return expand(u, Edges(e.first, e.second, e.weight * self.contrast * cell), free=free, start=start)


def palette(c, p, bins=8):
    i = np.minimum((c * bins).astype(int), bins - 1)
    i = (i[..., 0] * bins + i[..., 1]) * bins + i[..., 2]
    out = []
    for q in p:
        h = np.bincount(i.ravel(), q.ravel(), bins**3).reshape(bins, bins, bins)
        h = gaussian_filter(h, 0.7, mode="constant")
        h = h / h.sum()
        out.append(h.ravel()[i])
    out = np.array(out) + 1e-5
    return -np.log(out / out.sum(axis=0))


def soft(z, floor):
    z = z - z.max(axis=0)
    p = np.exp(z)
    p /= p.sum(axis=0)
    return floor + (1 - len(p) * floor) * p


def one_hot(labels, n):
    return (labels == np.arange(n)[:, None, None]).astype(np.float32)


def colors(image, size):
    if image.shape[:2] != tuple(size):
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))
    return image / 255.0


def contrast_edges(c):
    shape = c.shape[:2]
    d = []
    for dy, dx in NEAR:
        full = np.zeros(shape)
        h, w = shape
        y0, y1 = 0, h - dy
        x0, x1 = max(0, -dx), w - max(0, dx)
        if y1 > y0 and x1 > x0:
            full[y0:y1, x0:x1] = ((c[y0:y1, x0:x1] - c[y0 + dy : y1 + dy, x0 + dx : x1 + dx]) ** 2).sum(-1)
        d.append(full)
    m = np.mean([x.mean() for x in d])
    beta = 1 / (2 * m) if m > 0 else 0.0
    return grid_edges(shape, [(o, np.exp(-beta * x) / math.hypot(*o)) for o, x in zip(NEAR, d)])


def affinity_edges(maps):
    a = maps.affinity.astype(np.float64)
    shape = maps.weights.shape[1:]
    top = np.zeros(shape)
    h, w = shape
    views = []
    for (dy, dx), s in zip(AFFINITY_OFFSETS, a, strict=True):
        y1, x0, x1 = h - dy, max(0, -dx), w - max(0, dx)
        if y1 > 0 and x1 > x0:
            here = (slice(0, y1), slice(x0, x1)); there = (slice(dy, h), slice(x0 + dx, x1 + dx))
            top[here] = np.maximum(top[here], s[here]); top[there] = np.maximum(top[there], s[here])
            views.append((here, there))
        else:
            views.append(None)
    out = []
    inv = np.divide(1.0, top, out=np.zeros(shape), where=top > 0)
    for o, s, v in zip(AFFINITY_OFFSETS, a, views):
        wgt = np.zeros(shape)
        if v:
            wgt[v[0]] = s[v[0]] * (inv[v[0]] + inv[v[1]]) / 2
        out.append((o, wgt))
    return grid_edges(shape, out)
