"""Images as bytes and arrays: numpy and Pillow only."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

__all__ = ["UNDECODABLE", "decode_rgb", "encode_jpeg", "encode_png", "resize"]

#: What Pillow raises on bytes that are damaged, no image, or an image too large for any use (over 179 million pixels).
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # and none whose reader is seldom used, or starts a program


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


def decode_rgb(data: bytes, *, upright: bool = False) -> UInt8[np.ndarray, "H W 3"]:
    """The RGB pixels of an image file's bytes (PNG, JPEG, WebP, BMP, GIF); ``upright``: turned as its EXIF says.

    Raises:
        OSError: the bytes are no image (``PIL.UnidentifiedImageError`` is one), or it is cut off. All that a broken or
            hostile image may raise is ``UNDECODABLE``.
    """
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        turned = ImageOps.exif_transpose(image) if upright else image
        return np.asarray(turned.convert("RGB"))


def resize(pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels at another ``size`` (height, width), with antialiasing; the same pixels where it is theirs."""
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
