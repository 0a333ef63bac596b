"""WebDataset tars as samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from synthgen.captions import TEXT_KEYS
from synthgen.codecs import labels_to_masks
from synthgen.datasets.rows import Row, Rows
from synthgen.datasets.samples import IMAGES, ImageDataset, NamedBox, Sample, sample_errors
from synthgen.errors import CorruptFile
from synthgen.image import decode_labels, decode_rgb
from synthgen.records import WordMasks
from synthgen.stores import parse_location
from synthgen.untrusted import read_json

__all__ = ["ShardDataset"]


class ShardDataset(ImageDataset):
    """WebDataset tars by sample number; only an index of them is kept in memory.

    Members: ``jpg`` (or ``jpeg``, ``webp``, ``png``) is the image and the only one required; ``txt`` the text;
    ``mask.png`` the masks as one 8-bit image (0 background, k the k-th word); ``json`` has ``words`` (or ``classes``)
    and ``label`` (a text or a whole number), and ``text``, ``caption`` or ``prompt`` where there is no ``txt``; ``cls``
    is a class number, used if there is no ``label``. Without ``masks`` they are not decoded.

    Raises:
        MissingArtifact, CorruptFile: a tar is missing, or it or a sample in it cannot be read.
    """

    def __init__(self, paths: Sequence[str | Path], *, masks: bool = True) -> None:
        self.paths = [parse_location(path) for path in paths]
        self.masks = masks
        self._rows = Rows(self.paths)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        with self._open(index) as (row, meta):
            image = _image(row)
            if image is None:
                raise CorruptFile(f"sample {row.key} of {row.path} has no image (a member {', '.join(IMAGES)})")
            mask = self._mask(row, meta)
            text = str(self._text(row, meta)).strip()
            pixels = decode_rgb(self._rows.read(row, image))
            labels = None if mask is None else decode_labels(self._rows.read(row, mask))
            if labels is not None and labels.shape != pixels.shape[:2]:
                raise ValueError(f"its masks are {labels.shape[1]} x {labels.shape[0]} pixels and its image is not")
            return Sample(row.key, pixels, self._label(row, meta), text, _words(meta), labels)

    def mask_member(self, index: int) -> str | None:
        """The name of the member with the masks of a sample."""
        with self._open(index) as (row, meta):
            return self._mask(row, meta)

    def word_masks(self, index: int) -> WordMasks:
        """The masks of a sample, with scores of 0. The sample needs no image."""
        with self._open(index) as (row, meta):
            mask = self._mask(row, meta)
            if mask is None:
                raise CorruptFile(f"sample {row.key} of {row.path} has no masks (a member mask.png)")
            words, labels = _words(meta), decode_labels(self._rows.read(row, mask))
            return WordMasks(words, labels_to_masks(labels, len(words)), np.zeros(len(words), np.float32))

    def key(self, index: int) -> str:
        """The name of a sample in its tar."""
        return self._rows.key(index)

    def label(self, index: int) -> str | None:
        """The class of a sample: ``label`` of its json, else its ``cls``."""
        with self._open(index) as (row, meta):
            return self._label(row, meta)

    def has_masks(self) -> bool:
        """Whether the first sample comes with masks."""
        return len(self) > 0 and self[0].label_map is not None

    def captions(self, index: int) -> tuple[str, ...]:
        """``captions`` of the json, a list of texts; else the ``txt``, else the json's text, caption or prompt."""
        with self._open(index) as (row, meta):
            found = meta.get("captions") or [self._text(row, meta)]
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise ValueError("captions is not a list of texts")
            return tuple(text.strip() for text in found if text.strip())

    def words(self, index: int) -> tuple[str, ...]:
        """``words`` of the json."""
        with self._open(index) as (_, meta):
            return _words({"words": meta.get("words", ())})

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """``boxes`` of the json: a list of [name, left, top, width, height] in pixels."""
        with self._open(index, TypeError, OverflowError) as (_, meta):
            boxes = meta.get("boxes", ())
            return tuple((str(name), float(x), float(y), float(w), float(h)) for name, x, y, w, h in boxes)

    @contextmanager
    def _open(self, index: int, *errors: type[Exception]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """A sample and its json; in the block, errors about its content (and ``errors``) name the sample."""
        row = self._rows[index]
        with sample_errors(row.path, row.key, *errors):
            # programs that download and score images write NaN for a missing number
            meta = read_json(self._rows.read(row, "json"), finite=False) if "json" in row.members else {}
            if not isinstance(meta, dict):
                raise ValueError("its json is not an object")
            yield row, meta

    def _mask(self, row: Row, meta: Mapping[str, Any]) -> str | None:
        if not self.masks:
            return None
        if "mask.png" in row.members:
            return "mask.png"
        # some published sets have the masks as a png beside a jpg; words in the json tell them from a second image
        beside = "png" in row.members and _image(row) != "png"
        return "png" if beside and ("words" in meta or "classes" in meta) else None

    def _text(self, row: Row, meta: Mapping[str, Any]) -> Any:
        if "txt" in row.members:
            return self._rows.read(row, "txt").decode()
        return next((meta[name] for name in TEXT_KEYS if meta.get(name)), "")

    def _label(self, row: Row, meta: Mapping[str, Any]) -> str | None:
        label = meta.get("label", "")
        if isinstance(label, str | int) and not isinstance(label, bool) and label != "":
            return str(label)
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
        raise ValueError("its words are not a list")
    return tuple(str(word) for word in words)
