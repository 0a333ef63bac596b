"""Recolour a rendering: tint its dominant coloured material and keep the shading and everything else."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOURS", "paint"]

COLOURS: dict[str, tuple[int, int, int]] = {  # of a well-lit part of the painted material, sRGB
    "red": (222, 28, 32),
    "orange": (250, 128, 8),
    "yellow": (250, 214, 18),
    "green": (34, 162, 50),
    "blue": (28, 84, 226),
    "purple": (134, 44, 196),
    "white": (244, 244, 244),
    "black": (38, 38, 42),
}
HUE_INSIDE, HUE_OUTSIDE = 42.0, 62.0  # degrees from the material's hue: fully part of it, and not at all
SATURATION_INSIDE, SATURATION_OUTSIDE = 0.28, 0.10  # fully part of a coloured material, and not at all
MIN_COLOUR = 0.08  # mean of saturation times value; an image below it counts as grey


def paint(rgba: NDArray[np.uint8], colour: str, *, hue: float | None = None) -> NDArray[np.uint8]:
    """Return ``rgba``, uint8 (h, w, 4) premultiplied, with its dominant coloured material in ``colour``.

    ``hue``, in degrees, selects another material: a bus may show more window than body. In linear light, each pixel of
    the material is modelled as a shade of the material's colour plus a white highlight, and that shade is applied to
    the new colour. Grey parts and parts of other hues are unchanged, and so is an image without enough colour.
    """
    alpha = rgba[..., 3:].astype(np.float64) / 255
    straight = np.where(alpha > 0, rgba[..., :3] / 255 / np.maximum(alpha, 1 / 255), 0).clip(0, 1)
    hues, saturation, value = hsv(straight)
    weight = alpha[..., 0] * saturation * value
    distance = np.abs((hues - (dominant_hue(hues, weight) if hue is None else hue) + 180) % 360 - 180)
    part = ramp(distance, HUE_OUTSIDE, HUE_INSIDE) * ramp(saturation, SATURATION_OUTSIDE, SATURATION_INSIDE)
    if weight.sum() <= MIN_COLOUR * alpha.sum() or not (part * weight).any():
        return rgba.copy()
    light = to_linear(straight)
    shade, highlight = unmix(light, material_colour(light, part * weight))
    target = to_linear(np.array(COLOURS[colour]) / 255)
    painted = shade[..., None] * target + highlight[..., None] * (1 - target) * (0.35 + 0.65 * target.max())
    mixed = to_srgb((light + part[..., None] * (painted - light)).clip(0, 1))
    out = np.concatenate([mixed * alpha, alpha], axis=2)
    result: NDArray[np.uint8] = np.minimum((out * 255).round(), rgba[..., 3:]).astype(np.uint8)
    return result


def hsv(rgb: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Hue in degrees, saturation and value in [0, 1], each (h, w), of rgb (h, w, 3) in [0, 1]."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value, chroma = rgb.max(axis=2), np.ptp(rgb, axis=2)
    safe = np.maximum(chroma, 1e-9)
    hue = np.where(value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return hue * 60, chroma / np.maximum(value, 1e-9), value


def dominant_hue(hue: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """The hue, in degrees, with the most weight around it."""
    bins = np.bincount(hue.astype(np.int64).ravel() % 360, weight.ravel(), minlength=360)
    distance = np.minimum(np.arange(360), 360 - np.arange(360))
    kernel = np.exp(-0.5 * (distance / 14) ** 2)
    smooth = np.fft.irfft(np.fft.rfft(bins) * np.fft.rfft(kernel), 360)
    return float(smooth.argmax()) + 0.5


def material_colour(light: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The linear colour, (3,), of well-lit parts of the material: the mean of its brighter half."""
    luminance = light.max(axis=2)
    order = np.argsort(luminance, axis=None)
    cumulative = np.cumsum(weight.ravel()[order])
    median = luminance.ravel()[order][np.searchsorted(cumulative, 0.5 * cumulative[-1])]
    bright = weight * (luminance >= median)
    colour: NDArray[np.float64] = (light * bright[..., None]).sum((0, 1)) / bright.sum()
    return colour


def unmix(light: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least-squares ``shade`` and ``highlight``, (h, w), not negative, of light = shade · base + highlight."""
    b1, b2 = base.sum(), float(base @ base)
    y1, y2 = light.sum(axis=2), light @ base
    scale = 3 * b2 - b1 * b1
    shade, highlight = (3 * y2 - b1 * y1) / scale, (b2 * y1 - b1 * y2) / scale
    shade, highlight = np.where(highlight < 0, y2 / b2, shade), np.maximum(highlight, 0)
    return shade.clip(0, 1.4), highlight.clip(0, 1)


def ramp(x: NDArray[np.float64], zero: float, one: float) -> NDArray[np.float64]:
    """Rise linearly from 0 at ``zero`` to 1 at ``one``, constant beyond."""
    return ((x - zero) / (one - zero)).clip(0, 1)


def to_linear(srgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light of sRGB values in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sRGB values of linear light in [0, 1]."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
