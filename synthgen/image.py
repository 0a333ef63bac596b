"""Encode, decode and resize images, with numpy and Pillow only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from synthgen.errors import one_line

__all__ = ["MAX_PIXELS", "UNDECODABLE", "decode_labels", "decode_rgb", "encode_jpeg", "encode_png", "resize"]

MAX_PIXELS = 2**26  # of an image; a larger one is a decompression bomb, or too large for any network
#: The errors of image readers on bytes that are damaged, not an image, or an image of more than ``MAX_PIXELS``.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # no formats whose readers are rarely used, or start a program


def encode_png(pixels: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]) -> bytes:
    """Pixels as a PNG: RGB, or 8-bit grey if there is no channel axis."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def encode_jpeg(pixels: UInt8[np.ndarray, "H W 3"], quality: int = 95) -> bytes:
    """Pixels as a JPEG without chroma subsampling, which would blur the edges of small images."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_rgb(data: bytes, *, upright: bool = False) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file (PNG, JPEG, WebP, BMP, GIF) to RGB pixels; ``upright`` applies its EXIF orientation.

    16-bit values keep their upper 8 bits, also in grey images, where Pillow alone would clip all but the darkest to
    white.

    Raises:
        OSError: the bytes are not an image or are truncated, the image has more than ``MAX_PIXELS``, or its pixels are
            32-bit numbers; other errors of Pillow are raised as OSError too.
    """
    with _opened(data, _FORMATS) as image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # I: before Pillow 11
        if image.mode in ("I", "F") and not deep:
            raise OSError("its pixels are 32-bit numbers of unknown range; save it with 8 bits")
        turned = ImageOps.exif_transpose(image) if upright else image
        if deep:
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        return np.asarray(turned.convert("RGB"))


def decode_labels(data: bytes) -> UInt8[np.ndarray, "H W"]:
    """The pixel values of a PNG with 8-bit grey, with a palette (its indices), or with 1 bit (0 and 255).

    Raises:
        OSError: the image has another mode, or as for :func:`decode_rgb`.
    """
    with _opened(data, ("PNG",)) as image:
        if image.mode not in ("L", "P", "1"):
            raise OSError(f"its masks have the mode {image.mode}; save them with 8-bit grey or a palette")
        return np.asarray(image if image.mode != "1" else image.convert("L"), np.uint8)


@contextmanager
def _opened(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open an image by its header; its pixels are decoded inside the block."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"it has {image.width} x {image.height} pixels; {MAX_PIXELS:,} are the most")
            yield image
    except UnidentifiedImageError:
        raise OSError("cannot identify image file: it is damaged, or its format is not supported") from None
    except OSError:
        raise
    except Exception as error:  # on malicious bytes Pillow may raise any type
        raise OSError(one_line(error)) from None


def resize(pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels at another ``size`` (height, width), bicubic with antialiasing; unchanged if that is their size."""
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
