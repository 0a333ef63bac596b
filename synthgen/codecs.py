"""Records to tar members and back: one pair of functions for each artifact.

=========  ==============================  ==============================================================
artifact   members of a sample             what is in them
=========  ==============================  ==============================================================
images     ``png``, ``json``               the image; prompt, words and their spans, label, seed, warnings, source
maps       ``maps.npz``                    ``weights`` (words h w) and ``affinity`` (edges h w), float16
masks      ``masks.npz``, ``json``         ``labels`` (H W) uint8: 0 background, k the k-th word; ``scores``; words,
                                           reasons, and what is known of each mask
=========  ==============================  ==============================================================

Nothing is pickled: arrays are read with ``allow_pickle=False``.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from synthgen.errors import CorruptShard
from synthgen.image import decode_rgb, encode_png
from synthgen.mask_shape import UNKNOWN, describe_masks
from synthgen.records import Generation, Maps, Prompt, Request, WordMasks

__all__ = [
    "decode_generation",
    "decode_image",
    "decode_maps",
    "decode_masks",
    "encode_image",
    "encode_maps",
    "encode_masks",
    "labels_to_masks",
    "masks_to_labels",
    "prompt_from_json",
    "prompt_to_json",
]

Members = Mapping[str, bytes]

#: What numpy, zipfile, zlib, json and Pillow raise on bytes that are damaged or missing.
_UNREADABLE = (KeyError, ValueError, OSError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error)


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """A prompt as plain data."""
    return {
        "prompt": prompt.text,
        "words": list(prompt.words),
        "spans": [list(span) for span in prompt.spans],
        "label": prompt.label or "",
    }


def prompt_from_json(value: Mapping[str, Any]) -> Prompt:
    """The inverse of :func:`prompt_to_json`."""
    spans = tuple((int(start), int(stop)) for start, stop in value["spans"])
    return Prompt(str(value["prompt"]), tuple(value["words"]), spans, value["label"] or None)


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
        CorruptShard: a member is missing or unreadable.
    """
    try:
        meta = json.loads(members["json"])
        request = Request(key, prompt_from_json(meta), int(meta["seed"]), str(meta.get("source", "")))
        return request, decode_rgb(members["png"]), tuple(meta["warnings"])
    except _UNREADABLE as error:
        raise _corrupt(key, "image", error) from None


def encode_maps(maps: Maps) -> dict[str, bytes]:
    """Weights and affinity; the words stand in the image's json."""
    return {"maps.npz": _npz(weights=maps.weights, affinity=maps.affinity)}


def decode_maps(key: str, members: Members, words: tuple[str, ...]) -> Maps:
    """The inverse of :func:`encode_maps`.

    Raises:
        CorruptShard: the member is missing, unreadable, or holds another number of words.
    """
    try:
        with np.load(io.BytesIO(members["maps.npz"]), allow_pickle=False) as arrays:
            maps = Maps(words, arrays["weights"], arrays["affinity"])
        if len(maps.weights) != len(words):
            raise ValueError(f"{len(maps.weights)} maps for {len(words)} words")
    except _UNREADABLE as error:
        raise _corrupt(key, "maps", error) from None
    return maps


def decode_generation(key: str, image: Members, maps: Members) -> Generation:
    """Image and maps of one sample together."""
    request, pixels, warnings = decode_image(key, image)
    return Generation(request, pixels, decode_maps(key, maps, request.prompt.words), warnings)


def encode_masks(masks: WordMasks) -> dict[str, bytes]:
    """Masks as one label image with scores; the json holds their words, their reasons and all that is known of them."""
    meta = {"words": list(masks.words), "dropped": list(masks.dropped), "masks": describe_masks(masks)}
    return {"masks.npz": _npz(labels=masks_to_labels(masks.values), scores=masks.scores), "json": _json(meta)}


def decode_masks(key: str, members: Members) -> WordMasks:
    """The inverse of :func:`encode_masks`; figures that nobody measured, as in older runs, are None.

    Raises:
        CorruptShard: a member is missing or unreadable.
    """
    try:
        meta = json.loads(members["json"])
        with np.load(io.BytesIO(members["masks.npz"]), allow_pickle=False) as arrays:
            values = labels_to_masks(arrays["labels"], len(meta["words"]))
            scores = arrays["scores"]
        measured = (_measured(meta.get("masks"), name) for name in ("confidence", "sharpness", "disagreement"))
        return WordMasks(tuple(meta["words"]), values, scores, tuple(meta["dropped"]), *measured)
    except _UNREADABLE as error:
        raise _corrupt(key, "masks", error) from None


def masks_to_labels(values: Bool[np.ndarray, "words H W"]) -> UInt8[np.ndarray, "H W"]:
    """One image of word numbers: 0 where no word is, k where the k-th is (from 1)."""
    labels = np.zeros(values.shape[1:], np.uint8)
    for number, mask in enumerate(values, start=1):
        labels[mask] = number
    return labels


def labels_to_masks(labels: UInt8[np.ndarray, "H W"], num_words: int) -> Bool[np.ndarray, "words H W"]:
    """The inverse of :func:`masks_to_labels`."""
    masks: Bool[np.ndarray, "words H W"] = labels[None] == np.arange(1, num_words + 1, dtype=np.uint8)[:, None, None]
    return masks


def _npz(**arrays: Shaped[np.ndarray, "..."]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # members carry a fixed date: the same bytes each time
    return buffer.getvalue()


def _measured(described: list[dict[str, Any]] | None, name: str) -> Float32[np.ndarray, " words"] | None:
    """A figure of each mask from its description."""
    if described is None or any(mask[name] == UNKNOWN for mask in described):
        return None
    return np.array([mask[name] for mask in described], np.float32)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _corrupt(key: str, what: str, error: Exception) -> CorruptShard:
    reason = f"member {error} is missing" if isinstance(error, KeyError) else str(error)
    return CorruptShard(
        f"the {what} of sample {key} cannot be read: {reason}; delete its tar and run the stage that made it again"
    )
