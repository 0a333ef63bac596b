"""Records to tar members and back: one pair of functions for each artifact.

=========  ==============================  ==============================================================
artifact   members of a sample             what is in them
=========  ==============================  ==============================================================
images     ``png``, ``json``               the image; prompt, words and their spans, label, seed, warnings, source
maps       ``maps.npz``                    ``weights`` (words h w) and ``affinity`` (edges h w), float16
masks      ``masks.npz``, ``json``         ``labels`` (H W) uint8: 0 background, k the k-th word; ``scores``; words,
                                           reasons, and what is known of each mask
=========  ==============================  ==============================================================

Nothing is pickled, and nothing that is read is believed: types, shapes and sizes are checked before arrays are made.
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

#: What numpy, zipfile, zlib, json and Pillow raise on bytes that are damaged or missing.
_UNREADABLE = (LookupError, ValueError, TypeError, OSError, EOFError, SyntaxError, OverflowError, zlib.error,
               zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error)  # fmt: skip
_MEASURED = ("confidence", "sharpness", "disagreement")
_MAX_ARRAY = 2**27  # bytes; 255 maps on a grid of 512 x 512 are a little less
_MAX_MASKS = 2**30  # pixels of all masks of one image together


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
        KeyError, ValueError, TypeError: ``value`` is not what that makes.
    """
    text, words, label = value["prompt"], _texts(value["words"], "words"), value["label"] or None
    spans = tuple((operator.index(start), operator.index(stop)) for start, stop in value["spans"])
    if not isinstance(text, str) or not isinstance(label, str | None):
        raise ValueError("its prompt or its label is no text")
    return Prompt(text, words, spans, label)


def encode_image(generation: Generation) -> dict[str, bytes]:
    """The image and what it was made from."""
    request = generation.request
    meta = {**prompt_to_json(request.prompt), "seed": request.seed, "warnings": list(generation.warnings)}
    if request.source:
        meta["source"] = request.source
    return {"png": encode_png(generation.image), "json": _json(meta)}


def decode_image(key: str, members: Members) -> tuple[Request, UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
    """The request that an image answers, the image, and its warnings.

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
    """Weights and affinity; the words stand in the image's json."""
    return {"maps.npz": _npz(weights=maps.weights, affinity=maps.affinity)}


def decode_maps(key: str, members: Members, words: tuple[str, ...]) -> Maps:
    """The inverse of :func:`encode_maps`.

    Raises:
        CorruptFile: the member is missing, unreadable, or holds another number of words.
    """
    try:
        arrays = read_npz(members["maps.npz"], weights=(np.float16, 3), affinity=(np.float16, 3))
        weights, affinity = arrays["weights"], arrays["affinity"]
        if len(weights) != len(words):
            raise ValueError(f"{len(weights)} maps for {len(words)} words")
        if weights.shape[1:] != affinity.shape[1:]:
            raise ValueError(f"its weights lie on another grid {weights.shape[1:]} than its affinity")
        maps = Maps(words, weights, affinity)
    except _UNREADABLE as error:
        raise _corrupt(key, "maps", error) from None
    return maps


def decode_generation(key: str, image: Members, maps: Members) -> Generation:
    """Image and maps of one sample together."""
    request, pixels, warnings = decode_image(key, image)
    return Generation(request, pixels, decode_maps(key, maps, request.prompt.words), warnings)


def encode_masks(masks: WordMasks) -> dict[str, bytes]:
    """Masks as one label image with scores; the json holds their words, their reasons and all that is known of them.

    Raises:
        ConfigError: nobody would read so many again (see :func:`check_masks`).
    """
    check_masks(len(masks.values), masks.values.shape[1:])
    meta = {"words": list(masks.words), "dropped": list(masks.dropped), "masks": describe_masks(masks)}
    return {"masks.npz": _npz(labels=masks_to_labels(masks.values), scores=masks.scores), "json": _json(meta)}


def decode_masks(key: str, members: Members) -> WordMasks:
    """The inverse of :func:`encode_masks`; figures that nobody measured, as in older runs, are None.

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
        measured = [_measured(meta.get("masks"), name, len(words)) for name in _MEASURED]
        return WordMasks(words, labels_to_masks(labels, len(words)), scores, dropped, *measured)
    except _UNREADABLE as error:
        raise _corrupt(key, "masks", error) from None


def check_masks(num_words: int, size: tuple[int, ...], key: str = "") -> None:
    """See that so many masks of ``size`` (height, width) can be read again once they are written.

    Raises:
        ConfigError: there are more words than 8 bits can tell apart, or more pixels of them than memory should hold.
    """
    if told := _too_many(num_words, size):
        where = f"sample {key}: " if key else ""
        raise ConfigError(
            f"{where}{told}; in a new run keep images smaller (of attend with a lower max_side), or mark fewer words"
        )


def _too_many(num_words: int, size: tuple[int, ...]) -> str:
    """Why so many masks are not read, or ""."""
    if num_words <= MAX_WORDS and num_words * math.prod(size) <= _MAX_MASKS:
        return ""
    return f"{num_words} masks of {size[1]} x {size[0]} pixels are more than are read"


def masks_to_labels(values: Bool[np.ndarray, "words H W"]) -> UInt8[np.ndarray, "H W"]:
    """One image of word numbers: 0 where no word is, k where the k-th is (from 1)."""
    labels = np.zeros(values.shape[1:], np.uint8)
    for number, mask in enumerate(values, start=1):
        labels[mask] = number
    return labels


def labels_to_masks(labels: UInt8[np.ndarray, "H W"], num_words: int) -> Bool[np.ndarray, "words H W"]:
    """The inverse of :func:`masks_to_labels`.

    Raises:
        ValueError: there are more words than 8 bits can tell apart, or more pixels of them than memory should hold.
    """
    if told := _too_many(num_words, labels.shape):
        raise ValueError(told)
    masks: Bool[np.ndarray, "words H W"] = labels[None] == np.arange(1, num_words + 1, dtype=np.uint8)[:, None, None]
    return masks


def read_npz(data: bytes, **wanted: tuple[type[np.generic], int]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays of an npz by name, each of the type and the number of axes that are wanted.

    A header's shape is held against the bytes that are there before an array is made, so that no header can ask for
    more memory than ``_MAX_ARRAY``; ``numpy.load`` believes it.

    Raises:
        ValueError, KeyError, or what ``zipfile`` and ``zlib`` raise: it is damaged, or holds something else.
    """
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name, (kind, axes) in wanted.items():
            entry = archive.getinfo(f"{name}.npy")
            if entry.file_size > _MAX_ARRAY or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is larger than {_MAX_ARRAY:,} bytes, or packed as numpy does not")
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is of another version of numpy's format")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                body = file.read(entry.file_size)
            if dtype != kind or len(shape) != axes or min(shape) < 0:
                raise ValueError(f"{name} is {dtype} of {len(shape)} axes, not {np.dtype(kind)} of {axes}")
            if math.prod(shape) * dtype.itemsize != len(body):
                raise ValueError(f"{name} says that it is of shape {shape}, and has {len(body)} bytes")
            array = np.frombuffer(body, dtype)
            found[name] = np.array(
                array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
            )  # may be written to
    return found


def _npz(**arrays: Shaped[np.ndarray, "..."]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # members carry a fixed date: the same bytes each time
    return buffer.getvalue()


def _measured(described: Any, name: str, num_words: int) -> Float32[np.ndarray, " words"] | None:
    """A figure of each mask from its description."""
    if described is None:
        return None
    if not isinstance(described, list) or len(described) != num_words:
        raise ValueError(f"its masks are not {num_words} descriptions")
    figures = [mask[name] for mask in described]
    return None if UNKNOWN in figures else np.array([float(figure) for figure in figures], np.float32)


def decode_meta(key: str, members: Members) -> dict[str, Any]:
    """The json of a sample as it is, for those who want nothing but a word of it.

    Raises:
        CorruptFile: it is missing, or no JSON object; or its ``words``, where it has any, are no list of texts.
    """
    try:
        meta = _object(members["json"])
        _texts(meta.get("words", []), "words")
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
        raise ValueError(f"its {name} are no list of texts")
    return tuple(value)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _corrupt(key: str, what: str, error: Exception) -> CorruptFile:
    reason = f"member {error} is missing" if isinstance(error, KeyError) else one_line(error)
    return CorruptFile(
        f"the {what} of sample {key} cannot be read: {reason}; delete its tar and run the stage that made it again"
    )
