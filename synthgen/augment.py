"""Random crops, flips and colour changes; image and masks share one crop box and one flip."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageFilter

from synthgen.datasets import Sample

__all__ = ["Augment", "CenterCrop"]

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma weights of red, green and blue
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """A random resized crop to ``size`` pixels, a horizontal flip with probability ``flip``, and colour changes.

    The crop is MAE's: its area is ``scale`` of the image's and its aspect ratio (width / height) log-uniform in
    ``ratio``; images are resampled bicubically, labels with nearest neighbour. Colour jitter, grey and blur are those
    of MoCo v2 without the change of hue, and apply to the image only; the blur is Gaussian, 0.1 to 2 pixels of 224.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5  # probability
    keep_sides: bool = False  # never flip a sample whose text contains left or right
    jitter: float = 0.0  # largest relative change of brightness, contrast and saturation
    jitter_probability: float = 1.0
    grey: float = 0.0  # probability of conversion to grey
    blur: float = 0.0  # probability

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """One random view of ``sample``, drawn from ``rng``."""
        box = self.box(sample.image.shape[0], sample.image.shape[1], rng)
        mirror = rng.random() < self.flip and not (self.keep_sides and _SIDES.search(sample.text))
        view = _cut(sample, box, self.size, mirror)
        image = view.image
        if self.jitter and rng.random() < self.jitter_probability:
            image = _jitter(image, rng.uniform(1 - self.jitter, 1 + self.jitter, 3))
        if self.grey and rng.random() < self.grey:
            image = np.repeat((image.astype(np.float32) @ _GREY).round().astype(np.uint8)[:, :, None], 3, axis=2)
        if self.blur and rng.random() < self.blur:
            radius = ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * self.size / 224)
            image = np.asarray(Image.fromarray(image).filter(radius))
        return replace(view, image=image)

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """The crop box; after ten failed draws the largest centred box with an aspect ratio within ``ratio``."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return float(left), float(top), float(left + w), float(top + h)
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return float(left), float(top), float(left + w), float(top + h)


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The largest centred square, resized to ``size`` pixels: deterministic, for evaluation."""

    size: int

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """The view; ``rng`` is not used."""
        height, width = sample.image.shape[:2]
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return _cut(sample, (left, top, left + side, top + side), self.size, mirror=False)


def _cut(sample: Sample, box: Box, size: int, mirror: bool) -> Sample:
    image = _resample(sample.image, box, size, Image.Resampling.BICUBIC)
    labels = None if sample.label_map is None else _resample(sample.label_map, box, size, Image.Resampling.NEAREST)
    if mirror:
        image = np.ascontiguousarray(image[:, ::-1])
        labels = None if labels is None else np.ascontiguousarray(labels[:, ::-1])
    return replace(sample, image=image, label_map=labels)


def _resample(
    pixels: UInt8[np.ndarray, "H W *c"], box: Box, size: int, how: Image.Resampling
) -> UInt8[np.ndarray, "h w *c"]:
    resized: UInt8[np.ndarray, "h w *c"] = np.asarray(Image.fromarray(pixels).resize((size, size), how, box=box))
    return resized


def _jitter(image: UInt8[np.ndarray, "H W 3"], factors: Float64[np.ndarray, " 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Scale brightness, then contrast around the mean grey, then saturation around each pixel's grey."""
    brightness, contrast, saturation = factors
    x = image.astype(np.float32) * np.float32(brightness)
    middle = (x @ _GREY).mean()
    x = middle + (x - middle) * np.float32(contrast)
    luma = (x @ _GREY)[:, :, None]
    x = luma + (x - luma) * np.float32(saturation)
    changed: UInt8[np.ndarray, "H W 3"] = x.round().clip(0, 255).astype(np.uint8)
    return changed
