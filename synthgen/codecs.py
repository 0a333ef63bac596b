"""Encode records as tar members and decode them: one pair of functions for each artifact.

=========  ==============================  ==============================================================
artifact   members of a sample             content
=========  ==============================  ==============================================================
images     ``png``, ``json``               the image; prompt, words and their spans, label, seed, warnings, source
maps       ``maps.npz``                    ``weights`` (words h w) and ``affinity`` (edges h w), float16
masks      ``masks.npz``, ``json``         ``labels`` (H W) uint8: 0 background, k the k-th word; ``scores``; words,
                                           reasons, and a description of each mask
=========  ==============================  ==============================================================

Nothing is pickled, and no input is trusted: types, shapes and sizes are checked before arrays are allocated.
"""

from __future__ import annotations

import io
import json
import math
import operator
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from synthgen.errors import ConfigError, CorruptFile, one_line
from synthgen.image import decode_rgb, encode_png
from synthgen.mask_shape import UNKNOWN, describe_masks
from synthgen.records import Generation, Maps, Prompt, Request, WordMasks
from synthgen.untrusted import MAX_WORDS, read_json

__all__ = [
    "check_masks",
    "decode_generation",
    "decode_image",
    "decode_maps",
    "decode_masks",
    "decode_meta",
    "encode_image",
    "encode_maps",
    "encode_masks",
    "labels_to_masks",
    "masks_to_labels",
    "prompt_from_json",
    "prompt_to_json",
    "read_npz",
]

Members = Mapping[str, bytes]

#: The errors of numpy, zipfile, zlib, json and Pillow on damaged or missing bytes.
_UNREADABLE = (LookupError, ValueError, TypeError, OSError, EOFError, SyntaxError, OverflowError, zlib.error,
               zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error)  # fmt: skip
_MEASURED = ("confidence", "sharpness", "disagreement")
_MAX_ARRAY = 2**27  # bytes; 255 maps on a grid of 512 x 512 are slightly fewer
_MAX_MASKS = 2**30  # pixels, over all masks of an image


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """A prompt as plain data."""
    return {
        "prompt": prompt.text,
        "words": list(prompt.words),
        "spans": [list(span) for span in prompt.spans],
        "label": prompt.label or "",
    }


def prompt_from_json(value: Mapping[str, Any]) -> Prompt:
    """The inverse of :func:`prompt_to_json`.

    Raises:
        KeyError, ValueError, TypeError: ``value`` is not a mapping made by that function.
    """
    text, words, label = value["prompt"], _texts(value["words"], "words"), value["label"] or None
    spans = tuple((operator.index(start), operator.index(stop)) for start, stop in value["spans"])
    if not isinstance(text, str) or not isinstance(label, str | None):
        raise ValueError("its prompt or label is not a text")
    return Prompt(text, words, spans, label)


def encode_image(generation: Generation) -> dict[str, bytes]:
    """The image as PNG, and its prompt, seed, warnings, source and words that were cut off as JSON."""
    request = generation.request
    meta = {**prompt_to_json(request.prompt), "seed": request.seed, "warnings": list(generation.warnings)}
    if request.source:
        meta["source"] = request.source
    if generation.words_cut_off:
        meta["words_cut_off"] = list(generation.words_cut_off)
    return {"png": encode_png(generation.image), "json": _json(meta)}


def decode_image(key: str, members: Members) -> tuple[Request, UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
    """The request that an image was generated for, the image, and its warnings.

    Raises:
        CorruptFile: a member is missing or unreadable.
    """
    try:
        meta = _object(members["json"])
        request = Request(key, prompt_from_json(meta), operator.index(meta["seed"]), str(meta.get("source", "")))
        if not 0 <= request.seed < 2**64:
            raise ValueError("its seed is not from 0 to 2**64 - 1")
        return request, decode_rgb(members["png"]), _texts(meta["warnings"], "warnings")
    except _UNREADABLE as error:
        raise _corrupt(key, "image", error) from None


def encode_maps(maps: Maps) -> dict[str, bytes]:
    """Weights and affinity; the words are in the image's json."""
    return {"maps.npz": _npz(weights=maps.weights, affinity=maps.affinity)}


def decode_maps(key: str, members: Members, words: tuple[str, ...]) -> Maps:
    """The inverse of :func:`encode_maps`.

    Raises:
        CorruptFile: the member is missing, unreadable, or has another number of words.
    """
    try:
        arrays = read_npz(members["maps.npz"], weights=(np.float16, 3), affinity=(np.float16, 3))
        weights, affinity = arrays["weights"], arrays["affinity"]
        if len(weights) != len(words):
            raise ValueError(f"{len(weights)} maps for {len(words)} words")
        if weights.shape[1:] != affinity.shape[1:]:
            raise ValueError(f"its weights have the grid {weights.shape[1:]}, its affinity {affinity.shape[1:]}")
        maps = Maps(words, weights, affinity)
    except _UNREADABLE as error:
        raise _corrupt(key, "maps", error) from None
    return maps


def decode_generation(key: str, image: Members, maps: Members) -> Generation:
    """The image and the maps of one sample as a ``Generation``.

    Raises:
        CorruptFile: a member is missing or unreadable.
    """
    request, pixels, warnings = decode_image(key, image)
    cut_off = decode_meta(key, image)["words_cut_off"]
    return Generation(request, pixels, decode_maps(key, maps, request.prompt.words), warnings, words_cut_off=cut_off)


def encode_masks(masks: WordMasks) -> dict[str, bytes]:
    """Masks as one label image with scores; the json holds their words, reasons and descriptions.

    Raises:
        ConfigError: the masks are too many or too large to be read again (see :func:`check_masks`).
    """
    check_masks(len(masks.values), masks.values.shape[1:])
    meta = {"words": list(masks.words), "dropped": list(masks.dropped), "masks": describe_masks(masks)}
    return {"masks.npz": _npz(labels=masks_to_labels(masks.values), scores=masks.scores), "json": _json(meta)}


def decode_masks(key: str, members: Members) -> WordMasks:
    """The inverse of :func:`encode_masks`.

    Raises:
        CorruptFile: a member is missing or unreadable.
    """
    try:
        meta = _object(members["json"])
        words, dropped = _texts(meta["words"], "words"), _texts(meta["dropped"], "dropped")
        arrays = read_npz(members["masks.npz"], labels=(np.uint8, 2), scores=(np.float32, 1))
        labels, scores = arrays["labels"], arrays["scores"]
        if len(scores) != len(words) or len(dropped) not in (0, len(words)):
            raise ValueError(f"{len(scores)} scores and {len(dropped)} reasons for {len(words)} words")
        values = labels_to_masks(labels, len(words))
        measured = [_measured(meta["masks"], name, len(words)) for name in _MEASURED]
        return WordMasks(words, values, scores, dropped, *measured)
    except _UNREADABLE as error:
        raise _corrupt(key, "masks", error) from None


def check_masks(num_words: int, size: tuple[int, ...], key: str = "") -> None:
    """Check that ``num_words`` masks of ``size`` (height, width) can be read again once they are written.

    Raises:
        ConfigError: there are more words than 8 bits can number, or more than ``_MAX_MASKS`` pixels in all masks.
    """
    if problem := _too_many(num_words, size):
        where = f"sample {key}: " if key else ""
        raise ConfigError(
            f"{where}{problem}; in a new run keep images smaller (of attend with a lower max_side), or mark fewer words"
        )


def _too_many(num_words: int, size: tuple[int, ...]) -> str:
    """Why the masks exceed the limits, or an empty text if they do not."""
    if num_words <= MAX_WORDS and num_words * math.prod(size) <= _MAX_MASKS:
        return ""
    return f"{num_words} masks of {size[1]} x {size[0]} pixels are more than are read"


def masks_to_labels(values: Bool[np.ndarray, "words H W"]) -> UInt8[np.ndarray, "H W"]:
    """One image of word numbers: 0 where there is no mask, k in the mask of the k-th word (from 1)."""
    labels = np.zeros(values.shape[1:], np.uint8)
    for number, mask in enumerate(values, start=1):
        labels[mask] = number
    return labels


def labels_to_masks(labels: UInt8[np.ndarray, "H W"], num_words: int) -> Bool[np.ndarray, "words H W"]:
    """The inverse of :func:`masks_to_labels`.

    Raises:
        ValueError: there are more words than 8 bits can number, or more than ``_MAX_MASKS`` pixels in all masks.
    """
    if problem := _too_many(num_words, labels.shape):
        raise ValueError(problem)
    masks: Bool[np.ndarray, "words H W"] = labels[None] == np.arange(1, num_words + 1, dtype=np.uint8)[:, None, None]
    return masks


def read_npz(data: bytes, **wanted: tuple[type[np.generic], int]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays of an npz by name, each with the type and the number of axes given in ``wanted``.

    A header's shape is compared with the length of the data before an array is allocated, so that no header can ask
    for more memory than ``_MAX_ARRAY``; ``numpy.load`` trusts it.

    Raises:
        ValueError, KeyError, or an error of ``zipfile`` or ``zlib``: the file is damaged, or has other arrays.
    """
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name, (kind, axes) in wanted.items():
            entry = archive.getinfo(f"{name}.npy")
            if entry.file_size > _MAX_ARRAY or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is larger than {_MAX_ARRAY:,} bytes, or compressed as numpy never does")
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is in another version of numpy's format")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                body = file.read(entry.file_size)
            if dtype != kind or len(shape) != axes or min(shape) < 0:
                raise ValueError(f"{name} is {dtype} with {len(shape)} axes, not {np.dtype(kind)} with {axes}")
            if math.prod(shape) * dtype.itemsize != len(body):
                raise ValueError(f"{name} says that its shape is {shape}, but has {len(body)} bytes")
            array = np.frombuffer(body, dtype)
            found[name] = np.array(array.reshape(shape[::-1]).T if fortran else array.reshape(shape))  # a writable copy
    return found


def _npz(**arrays: Shaped[np.ndarray, "..."]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # members have a fixed date: the same bytes each time
    return buffer.getvalue()


def _measured(described: Any, name: str, num_words: int) -> Float32[np.ndarray, " words"] | None:
    """A measure of each mask from its description; None if it was not measured."""
    if not isinstance(described, list) or len(described) != num_words:
        raise ValueError(f"its masks are not {num_words} descriptions")
    values = [mask[name] for mask in described]
    return None if UNKNOWN in values else np.array([float(value) for value in values], np.float32)


def decode_meta(key: str, members: Members) -> dict[str, Any]:
    """The json of a sample as plain data, for callers that need only a few of its values; ``words`` always exists.

    Raises:
        CorruptFile: it is missing or not a JSON object, or its words are not a list of texts.
    """
    try:
        meta = _object(members["json"])
        for name in ("words", "words_cut_off"):
            meta[name] = _texts(meta.get(name, []), name)
        return meta
    except _UNREADABLE as error:
        raise _corrupt(key, "json", error) from None


def _object(data: bytes) -> dict[str, Any]:
    value = read_json(data)
    if not isinstance(value, dict):
        raise ValueError("its json is not an object")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"its {name} are not a list of texts")
    return tuple(value)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _corrupt(key: str, what: str, error: Exception) -> CorruptFile:
    reason = f"member {error} is missing" if isinstance(error, KeyError) else one_line(error)
    return CorruptFile(
        f"the {what} of sample {key} cannot be read: {reason}; delete its tar and run the stage that made it again"
    )
