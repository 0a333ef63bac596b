"""Paint a rendering another colour: its own dominant material is found and tinted, shading and other parts stay."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOURS", "paint"]

COLOURS: dict[str, tuple[int, int, int]] = {  # what a well-lit piece of the painted material looks like, sRGB
    "red": (222, 28, 32),
    "orange": (250, 128, 8),
    "yellow": (250, 214, 18),
    "green": (34, 162, 50),
    "blue": (28, 84, 226),
    "purple": (134, 44, 196),
    "white": (244, 244, 244),
    "black": (38, 38, 42),
}
HUE_CORE, HUE_EDGE = 42.0, 62.0  # degrees from the dominant hue: all of the material, and none of it
CHROMA_NONE, CHROMA_ALL = 0.10, 0.28  # saturation below and above which a pixel is gray, and surely coloured
SMALLEST = 0.08  # below this mean of saturation times value an image is gray


def paint(rgba: NDArray[np.uint8], colour: str, *, hue: float | None = None) -> NDArray[np.uint8]:
    """Return ``rgba``, uint8 (h, w, 4) premultiplied, with its dominant coloured material painted ``colour``.

    ``hue``, in degrees, names the material where it is not the dominant one, as a bus may have more window than body.
    A pixel of the material is taken for its own colour times a shade plus a white highlight, in linear light; the
    shade then falls on the new colour. Gray parts and parts of other hues stay as they are, and so does an image
    without enough colour in it.
    """
    alpha = rgba[..., 3:].astype(np.float64) / 255
    straight = np.where(alpha > 0, rgba[..., :3] / 255 / np.maximum(alpha, 1 / 255), 0).clip(0, 1)
    hues, saturation, value = hsv(straight)
    weight = alpha[..., 0] * saturation * value
    away = np.abs((hues - (dominant(hues, weight) if hue is None else hue) + 180) % 360 - 180)
    part = ramp(away, HUE_EDGE, HUE_CORE) * ramp(saturation, CHROMA_NONE, CHROMA_ALL)
    if weight.sum() <= SMALLEST * alpha.sum() or not (part * weight).any():
        return rgba.copy()
    light = linear(straight)
    base = material(light, part * weight)
    shade, gloss = unmix(light, base)
    target = linear(np.array(COLOURS[colour]) / 255)
    painted = shade[..., None] * target + gloss[..., None] * (1 - target) * (0.35 + 0.65 * target.max())
    mixed = encoded((light + part[..., None] * (painted - light)).clip(0, 1))
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


def dominant(hue: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """The hue, in degrees, around which the most weight lies."""
    bins = np.bincount(hue.astype(np.int64).ravel() % 360, weight.ravel(), minlength=360)
    distance = np.minimum(np.arange(360), 360 - np.arange(360))
    kernel = np.exp(-0.5 * (distance / 14) ** 2)
    smooth = np.fft.irfft(np.fft.rfft(bins) * np.fft.rfft(kernel), 360)
    return float(smooth.argmax()) + 0.5


def material(light: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The linear colour, (3,), of a well-lit piece of the material: the mean of its brighter half."""
    luminance = light.max(axis=2)
    order = np.argsort(luminance, axis=None)
    place = np.cumsum(weight.ravel()[order])
    cut = luminance.ravel()[order][np.searchsorted(place, 0.5 * place[-1])]
    chosen = weight * (luminance >= cut)
    base: NDArray[np.float64] = (light * chosen[..., None]).sum((0, 1)) / chosen.sum()
    return base


def unmix(light: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least-squares ``shade`` and ``gloss``, (h, w) each and not negative, of light = shade · base + gloss."""
    b1, b2 = base.sum(), float(base @ base)
    y1, y2 = light.sum(axis=2), light @ base
    scale = 3 * b2 - b1 * b1
    shade, gloss = (3 * y2 - b1 * y1) / scale, (b2 * y1 - b1 * y2) / scale
    shade, gloss = np.where(gloss < 0, y2 / b2, shade), np.maximum(gloss, 0)
    return shade.clip(0, 1.4), gloss.clip(0, 1)


def ramp(x: NDArray[np.float64], none: float, full: float) -> NDArray[np.float64]:
    """0 at ``none``, 1 at ``full``, straight between."""
    return ((x - none) / (full - none)).clip(0, 1)


def linear(srgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light of sRGB values in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def encoded(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sRGB values, in [0, 1], of linear light."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
