"""Images as bytes and arrays: numpy and Pillow only."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ["decode_rgb", "encode_jpeg", "encode_png", "resize"]


def encode_png(pixels: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]) -> bytes:
    """Pixels as a PNG: RGB, or 8-bit grey where there is no channel axis."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def encode_jpeg(pixels: UInt8[np.ndarray, "H W 3"], quality: int = 95) -> bytes:
    """Pixels as a JPEG without chroma subsampling (small images would lose their edges to it)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_rgb(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The RGB pixels of an image file's bytes (PNG, JPEG, WebP).

    Raises:
        OSError: the bytes are no image (``PIL.UnidentifiedImageError`` is one), or it is cut off.
    """
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def resize(pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels at another ``size`` (height, width), with antialiasing; the same pixels where it is theirs."""
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
