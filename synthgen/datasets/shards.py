"""WebDataset tars as samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from synthgen.captions import TEXT_KEYS
from synthgen.codecs import labels_to_masks
from synthgen.datasets.rows import Row, Rows
from synthgen.datasets.samples import IMAGES, ImageDataset, NamedBox, Sample, telling
from synthgen.errors import CorruptFile
from synthgen.image import decode_labels, decode_rgb
from synthgen.records import WordMasks
from synthgen.stores import parse_location
from synthgen.untrusted import read_json

__all__ = ["ShardDataset"]


class ShardDataset(ImageDataset):
    """WebDataset tars by sample number; see :class:`~synthgen.datasets.rows.Rows` for what is kept of them.

    Members: ``jpg`` (or ``jpeg``, ``webp``, ``png``) is the image, ``txt`` the text, ``mask.png`` the masks as one
    8-bit image (0 background, k the k-th word), ``json`` holds ``words`` (or ``classes``) and ``label``, and ``cls`` a
    class number, which counts where ``label`` is missing. Only the image must be there. Without ``masks`` they are not
    decoded.

    Raises:
        MissingArtifact, CorruptFile: a tar is not there, cannot be read, or a sample in it cannot; says which.
    """

    def __init__(self, paths: Sequence[str | Path], *, masks: bool = True) -> None:
        self.paths = [parse_location(path) for path in paths]
        self.masks = masks
        self._rows = Rows(self.paths)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        image = _image(row)
        if image is None:
            raise CorruptFile(f"sample {row.key} of {row.path} has no image (a member {', '.join(IMAGES)})")
        with telling(row.path, row.key):
            meta = self._meta(row)
            mask = self._mask(row, meta)
            text = self._rows.read(row, "txt").decode() if "txt" in row.members else str(meta.get("prompt", ""))
            pixels = decode_rgb(self._rows.read(row, image))
            labels = None if mask is None else _decode_labels(self._rows.read(row, mask), pixels.shape[:2])
            return Sample(row.key, pixels, self._label(row, meta), text.strip(), _words(meta), labels)

    def mask_member(self, index: int) -> str | None:
        """The member that holds the masks of a sample."""
        row = self._rows[index]
        with telling(row.path, row.key):
            return self._mask(row, self._meta(row))

    def word_masks(self, index: int) -> WordMasks:
        """The masks of a sample alone (scores are 0). Its image need not be there."""
        row, mask = self._rows[index], self.mask_member(index)
        if mask is None:
            raise CorruptFile(f"sample {row.key} of {row.path} has no masks (a member mask.png)")
        with telling(row.path, row.key):
            words, labels = _words(self._meta(row)), _decode_labels(self._rows.read(row, mask))
            return WordMasks(words, labels_to_masks(labels, len(words)), np.zeros(len(words), np.float32))

    def key(self, index: int) -> str:
        """The name of a sample in its tar."""
        return self._rows.key(index)

    def label(self, index: int) -> str | None:
        """The class of a sample: ``label`` of its json, else its ``cls``."""
        row = self._rows[index]
        with telling(row.path, row.key):
            return self._label(row, self._meta(row))

    def has_masks(self) -> bool:
        """Whether the first sample comes with masks."""
        return len(self) > 0 and self[0].label_map is not None

    def captions(self, index: int) -> tuple[str, ...]:
        """``captions`` of the json, a list of texts; else the ``txt``, else the json's text, caption or prompt."""
        row = self._rows[index]
        with telling(row.path, row.key):
            meta = self._meta(row)
            found = meta.get("captions", ())
            if not found:
                text = next((meta[name] for name in TEXT_KEYS if meta.get(name)), "")
                found = [self._rows.read(row, "txt").decode() if "txt" in row.members else text]
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise ValueError("captions is not a list of texts")
            return tuple(text.strip() for text in found if text.strip())

    def marked(self, index: int) -> tuple[str, ...]:
        """``words`` of the json."""
        row = self._rows[index]
        with telling(row.path, row.key):
            return _words({"words": self._meta(row).get("words", ())})

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """``boxes`` of the json: a list of [name, left, top, width, height] in pixels."""
        row = self._rows[index]
        with telling(row.path, row.key, TypeError, OverflowError):
            given = self._meta(row).get("boxes", ())
            return tuple((str(name), float(x), float(y), float(w), float(h)) for name, x, y, w, h in given)

    def _mask(self, row: Row, meta: Mapping[str, Any]) -> str | None:
        if not self.masks:
            return None
        if "mask.png" in row.members:
            return "mask.png"
        # some published sets keep the masks beside a jpg as a plain png; only the json can tell that from a picture
        beside = "png" in row.members and _image(row) != "png"
        return "png" if beside and ("words" in meta or "classes" in meta) else None

    def _meta(self, row: Row) -> dict[str, Any]:
        # what downloads and scores pictures writes NaN where it has no number
        value = read_json(self._rows.read(row, "json"), finite=False) if "json" in row.members else {}
        if not isinstance(value, dict):
            raise ValueError("its json is not an object")
        return value

    def _label(self, row: Row, meta: Mapping[str, Any]) -> str | None:
        if isinstance(meta.get("label"), str) and meta["label"]:
            return str(meta["label"])
        if "cls" not in row.members:
            return None
        try:
            return str(int(self._rows.read(row, "cls")))
        except ValueError:
            raise CorruptFile(f"the cls of sample {row.key} of {row.path} is not a whole number") from None


def _image(row: Row) -> str | None:
    return next((name for name in IMAGES if name in row.members), None)


def _words(meta: Mapping[str, Any]) -> tuple[str, ...]:
    words = meta.get("words", meta.get("classes", ()))
    if not isinstance(words, list | tuple):
        raise ValueError("its words are no list")
    return tuple(str(word) for word in words)


def _decode_labels(data: bytes, shape: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "H W"]:
    labels = decode_labels(data)
    if shape is not None and labels.shape != shape:
        raise ValueError(f"its masks are {labels.shape[1]} x {labels.shape[0]} pixels and its image is not")
    return labels
