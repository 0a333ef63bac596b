"""Images one by one, from shards or folders: random access, each sample decoded when it is asked for."""

from __future__ import annotations

import bisect
import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from torch.utils.data import Dataset

from synthgen.captions import TABLES, TEXT_KEYS, read_beside, read_listing
from synthgen.codecs import labels_to_masks
from synthgen.errors import ConfigError, CorruptShard, MissingArtifact, PromptError
from synthgen.image import UNDECODABLE, decode_labels, decode_rgb
from synthgen.records import WordMasks
from synthgen.stores import located, open_here, stays_remote
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import Member, index_tar, read_member
from synthgen.untrusted import MOST_BYTES, read_file, read_json

__all__ = [
    "CaptionedFolder",
    "FolderDataset",
    "ImageDataset",
    "JoinedDataset",
    "LazyMasks",
    "Sample",
    "ShardDataset",
    "open_captioned",
    "open_dataset",
    "open_masks",
    "source_inputs",
]

IMAGES = ("jpg", "jpeg", "webp", "png")  # the first of these is a sample's image
NamedBox = tuple[str, float, float, float, float]  # name, left, top, width, height, in pixels of the stored image
_OPEN_TARS = 64  # files that one process keeps open


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded row of a shard or folder."""

    key: str
    image: UInt8[np.ndarray, "H W 3"]
    label: str | None = None  # class name, or its number where there is no name
    text: str = ""
    words: tuple[str, ...] = ()
    labels: UInt8[np.ndarray, "H W"] | None = None  # 0 background, k the k-th word; None where there are no masks


class ImageDataset(Dataset[Sample], ABC):
    """What the two kinds of source share: a length, samples by number, and labels without decoding an image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of a sample; reads nothing."""

    @abstractmethod
    def label(self, index: int) -> str | None:
        """The class of a sample; reads no pixels."""

    @abstractmethod
    def has_masks(self) -> bool:
        """Whether the first sample comes with masks."""

    def captions(self, index: int) -> tuple[str, ...]:
        """What is said of a sample: nothing, one text or several; reads no pixels."""
        return ()

    def marked(self, index: int) -> tuple[str, ...]:
        """The words of the caption that are listed beside it; none where none are. Reads no pixels."""
        return ()

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """Boxes that a sample gives itself, beside its masks; reads no pixels."""
        return ()


class ShardDataset(ImageDataset):
    """WebDataset tars by sample number. They are indexed once; each worker opens a file when it first needs it.

    Tars in a store come into the local cache. Where it cannot hold all of them, it holds the first ones; samples of
    the others are asked for one by one, a request each, so that their order costs nothing.

    Members: ``jpg`` (or ``jpeg``, ``webp``, ``png``) is the image, ``txt`` the text, ``mask.png`` the masks as one
    8-bit image (0 background, k the k-th word), ``json`` holds ``words`` (or ``classes``) and ``label``, and ``cls`` a
    class number, which counts where ``label`` is missing. Only the image must be there. Without ``masks`` they are not
    decoded.

    Raises:
        MissingArtifact, CorruptShard: a tar is not there, cannot be read, or a sample in it cannot; says which.
    """

    def __init__(self, paths: Sequence[str | Path], *, masks: bool = True) -> None:
        self.paths = [located(path) for path in paths]
        self.masks = masks
        self._remote = stays_remote(self.paths)
        indexed = {path: _index(path) for path in sorted(self.paths, key=lambda path: path not in self._remote)}
        self._tars = [indexed[path] for path in self.paths]
        self._ends = np.cumsum([len(tar) for tar in self._tars]).tolist()
        self._files: dict[Path, BinaryIO] = {}
        self._held: tuple[Path, int, bytes] | None = None  # a remote sample: its tar, where it begins, and its bytes
        self._owner = os.getpid()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_held": None}

    def __getitem__(self, index: int) -> Sample:
        path, key, members = self._row(index)
        image = next((name for name in IMAGES if name in members), None)
        if image is None:
            raise CorruptShard(f"sample {key} of {path} has no image (a member {', '.join(IMAGES)})")
        try:
            meta = self._meta(path, members)
            mask = self._mask(members, image, meta)
            text = self._read(path, members, "txt").decode() if "txt" in members else str(meta.get("prompt", ""))
            pixels = decode_rgb(self._read(path, members, image))
            labels = None if mask is None else _decode_labels(self._read(path, members, mask), pixels.shape[:2])
            words = _words(meta)
        except UNDECODABLE as error:
            raise _unreadable(path, key, error) from None
        return Sample(key, pixels, self._label(path, key, members, meta), text.strip(), words, labels)

    def mask_member(self, index: int) -> str | None:
        """The member that holds the masks of a sample."""
        path, key, members = self._row(index)
        image = next((name for name in IMAGES if name in members), None)
        try:
            return self._mask(members, image, self._meta(path, members))
        except (OSError, ValueError) as error:
            raise _unreadable(path, key, error) from None

    def word_masks(self, index: int) -> WordMasks:
        """The masks of a sample alone (scores are 0). Its image need not be there."""
        path, key, members = self._row(index)
        mask = self.mask_member(index)
        if mask is None:
            raise CorruptShard(f"sample {key} of {path} has no masks (a member mask.png)")
        try:
            meta = self._meta(path, members)
            words, labels = _words(meta), _decode_labels(self._read(path, members, mask))
            return WordMasks(words, labels_to_masks(labels, len(words)), np.zeros(len(words), np.float32))
        except UNDECODABLE as error:
            raise _unreadable(path, key, error) from None

    def key(self, index: int) -> str:
        """The name of a sample in its tar."""
        return self._row(index)[1]

    def label(self, index: int) -> str | None:
        """The class of a sample: ``label`` of its json, else its ``cls``."""
        path, key, members = self._row(index)
        try:
            return self._label(path, key, members, self._meta(path, members))
        except (OSError, ValueError) as error:
            raise _unreadable(path, key, error) from None

    def has_masks(self) -> bool:
        """Whether the first sample comes with masks."""
        return len(self) > 0 and self[0].labels is not None

    def captions(self, index: int) -> tuple[str, ...]:
        """``captions`` of the json, a list of texts; else the ``txt``, else the json's text, caption or prompt."""
        path, key, members = self._row(index)
        try:
            meta = self._meta(path, members)
            found = meta.get("captions", ())
            if not found:
                said = next((meta[name] for name in TEXT_KEYS if meta.get(name)), "")
                found = [self._read(path, members, "txt").decode() if "txt" in members else said]
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise ValueError("captions is not a list of texts")
        except (OSError, ValueError) as error:
            raise _unreadable(path, key, error) from None
        return tuple(text.strip() for text in found if text.strip())

    def marked(self, index: int) -> tuple[str, ...]:
        """``words`` of the json."""
        path, key, members = self._row(index)
        try:
            return _words({"words": self._meta(path, members).get("words", ())})
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable(path, key, error) from None

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """``boxes`` of the json: a list of [name, left, top, width, height] in pixels."""
        path, key, members = self._row(index)
        try:
            given = self._meta(path, members).get("boxes", ())
            return tuple((str(name), float(x), float(y), float(w), float(h)) for name, x, y, w, h in given)
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise _unreadable(path, key, error) from None

    def _mask(self, members: dict[str, Member], image: str | None, meta: dict[str, Any]) -> str | None:
        if not self.masks:
            return None
        if "mask.png" in members:
            return "mask.png"
        # some published sets keep the masks beside a jpg as a plain png; only the json can tell that from a picture
        return "png" if image != "png" and "png" in members and ("words" in meta or "classes" in meta) else None

    def _row(self, index: int) -> tuple[Path, str, dict[str, Member]]:
        tar = bisect.bisect_right(self._ends, index)
        key, members = self._tars[tar][index - (self._ends[tar - 1] if tar else 0)]
        return self.paths[tar], key, members

    def _read(self, path: Path, members: dict[str, Member], name: str) -> bytes:
        if path in self._remote:
            return self._read_remote(self._remote[path], members, name)
        if self._owner != os.getpid():  # a forked worker must not share file positions with its parent
            self._files, self._owner = {}, os.getpid()
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _OPEN_TARS:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[path] = open_here(path)  # kept open for the next sample
        return read_member(file, members[name])

    def _read_remote(self, path: RemotePath, members: dict[str, Member], name: str) -> bytes:
        """A member of a sample; all of the sample comes with it, because the others are mostly asked for next."""
        start = min(member.offset for member in members.values())
        if self._held is None or self._held[:2] != (path, start):
            end = max(member.offset + member.size for member in members.values())
            if end - start > MOST_BYTES:
                raise ValueError(f"it has {end - start:,} bytes; {MOST_BYTES:,} are the most")
            self._held = path, start, path.read_range(start, end)
        offset = members[name].offset - start
        return self._held[2][offset : offset + members[name].size]

    def _meta(self, path: Path, members: dict[str, Member]) -> dict[str, Any]:
        value = read_json(self._read(path, members, "json")) if "json" in members else {}
        if not isinstance(value, dict):
            raise ValueError("its json is not an object")
        return value

    def _label(self, path: Path, key: str, members: dict[str, Member], meta: dict[str, Any]) -> str | None:
        if isinstance(meta.get("label"), str) and meta["label"]:
            return str(meta["label"])
        if "cls" not in members:
            return None
        try:
            return str(int(self._read(path, members, "cls")))
        except ValueError:
            raise CorruptShard(f"the cls of sample {key} of {path} is not a whole number") from None


class FolderDataset(ImageDataset):
    """Images in a folder; the name of a subfolder is the class. The key is the path in the folder, without its ending.

    Images are turned upright as their EXIF says. What is called with a dot in front, file or folder, is left out.

    Raises:
        MissingArtifact: there are no images in it.
        CorruptShard: an image cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = located(path)
        endings = {*(f".{name}" for name in IMAGES), ".bmp"}
        files = (file for file in self.path.rglob("*") if file.suffix.lower() in endings)
        self._files = sorted(file for file in files if not _hidden(file.relative_to(self.path)))
        if not self._files:
            raise MissingArtifact(f"there are neither tars nor images in {self.path}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        file = self._files[index]
        key = self.key(index)
        try:
            return Sample(key, decode_rgb(read_file(file), upright=True), self.label(index))
        except UNDECODABLE as error:
            raise _unreadable(file, key, error) from None

    def key(self, index: int) -> str:
        """The path in the folder, without its ending."""
        return self._files[index].relative_to(self.path).with_suffix("").as_posix()

    def label(self, index: int) -> str | None:
        """The name of the first folder on the way to the image."""
        folders = self._files[index].relative_to(self.path).parts[:-1]
        return folders[0] if folders else None

    def has_masks(self) -> bool:
        """Image folders have none."""
        return False


class CaptionedFolder(FolderDataset):
    """Images in a folder with what is said of them.

    That is what ``metadata``, a file, lists (see :func:`~synthgen.captions.read_listing`); then only images that it
    lists count, and those that it lists and are not there do not. Without it: ``metadata.jsonl`` or ``metadata.csv`` in
    the folder or in folders in it, and for an image that these do not name, the ``.txt`` beside it.

    Raises:
        MissingArtifact: there are no images, or none that ``metadata`` lists.
        PromptError: captions cannot be read, or a table in the folder names an image that is not there.
    """

    def __init__(self, path: str | Path, metadata: str | Path = "") -> None:
        super().__init__(path)
        by_name = {file.relative_to(self.path).as_posix(): file for file in self._files}
        if metadata:
            listed = read_listing(located(metadata), self.path)
            self._files = [file for name, file in by_name.items() if name in listed]
            if not self._files:
                raise MissingArtifact(f"no image of {self.path} is listed in {metadata}; its file names are relative")
            self.said = [listed[name] for name in by_name if name in listed]
            return
        listed = {}
        tables = (file for name in TABLES for file in self.path.rglob(name))
        for table in sorted(file for file in tables if not _hidden(file.relative_to(self.path))):
            found = read_listing(table, self.path)
            if absent := next((name for name in found if name not in by_name), None):
                raise PromptError(f"{table} names {absent!r}, and there is no such image in {self.path}")
            listed |= found
        self.said = [listed[name] if name in listed else read_beside(file) for name, file in by_name.items()]

    def captions(self, index: int) -> tuple[str, ...]:
        """What is said of an image; the first counts."""
        return self.said[index].texts

    def marked(self, index: int) -> tuple[str, ...]:
        """The words that a table lists."""
        return self.said[index].words

    def label(self, index: int) -> str | None:
        """The label that a table gives, else the name of the first folder on the way to the image."""
        return self.said[index].label or super().label(index)


class JoinedDataset(ImageDataset):
    """Several datasets one after another."""

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        part, row = self._place(index)
        return part[row]

    def key(self, index: int) -> str:
        """The name of a sample in its part; two parts may share one."""
        part, row = self._place(index)
        return part.key(row)

    def label(self, index: int) -> str | None:
        """The class of a sample."""
        part, row = self._place(index)
        return part.label(row)

    def has_masks(self) -> bool:
        """Whether every part has masks."""
        return all(part.has_masks() for part in self.parts)

    def captions(self, index: int) -> tuple[str, ...]:
        """What is said of a sample."""
        part, row = self._place(index)
        return part.captions(row)

    def marked(self, index: int) -> tuple[str, ...]:
        """The words of the caption that are listed beside it."""
        part, row = self._place(index)
        return part.marked(row)

    def boxes(self, index: int) -> tuple[NamedBox, ...]:
        """Boxes that a sample gives itself."""
        part, row = self._place(index)
        return part.boxes(row)

    def _place(self, index: int) -> tuple[ImageDataset, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


class LazyMasks(Mapping[str, WordMasks]):
    """Masks by key, each decoded when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], WordMasks]]) -> None:
        self._readers = readers

    def __getitem__(self, key: str) -> WordMasks:
        return self._readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def open_masks(source: str | Path) -> LazyMasks:
    """The masks of all samples of ``source`` that have some, by key; images need not be there.

    Raises:
        ConfigError: ``source`` holds no tars, or no masks.
    """
    tars = _tars(source)
    shards = ShardDataset(tars)
    found = {shards.key(i): partial(shards.word_masks, i) for i in range(len(shards)) if shards.mask_member(i)}
    if not found:
        raise ConfigError(f"{source} holds no masks; they are read from tars with members mask.png and json (words)")
    return LazyMasks(found)


def open_dataset(*sources: str | Path, masks: bool = True) -> ImageDataset:
    """The samples of all ``sources``: a tar, a pattern of tars (``shards/*.tar``), a folder of tars or of images.

    Raises:
        MissingArtifact: a source is not there or holds nothing.
        CorruptShard: a tar cannot be read.
    """
    parts: list[ImageDataset] = []
    for source in sources:
        tars = _tars(source)
        parts.append(ShardDataset(tars, masks=masks) if tars else FolderDataset(source))
        if not len(parts[-1]):
            raise MissingArtifact(f"there are no samples in {source}")
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def open_captioned(source: str | Path, metadata: str | Path = "") -> ImageDataset:
    """The samples of one source with what is said of them; ``metadata`` lists that of the images of a folder.

    Raises:
        MissingArtifact, CorruptShard, PromptError: as for :func:`open_dataset` and :class:`CaptionedFolder`.
        ConfigError: ``metadata`` is given for tars.
    """
    tars = _tars(source)
    if tars and metadata:
        raise ConfigError(f"{source} holds tars, which have their captions in them; leave --metadata out")
    samples: ImageDataset = ShardDataset(tars, masks=False) if tars else CaptionedFolder(source, metadata)
    if not len(samples):
        raise MissingArtifact(f"there are no samples in {source}")
    return samples


def source_inputs(*sources: str | Path) -> dict[str, str]:
    """Name and size of each file of ``sources``, as a stage's :meth:`~synthgen.stages.Stage.inputs` wants them.

    Sizes and not hashes, so that a stage starts at once on a thousand shards.
    """
    found = {}
    for source in sources:
        files = _tars(source) or sorted(file for file in located(source).rglob("*") if file.is_file())
        found[str(source)] = " ".join(f"{file.name}:{file.stat().st_size}" for file in files)
    return found


def _tars(source: str | Path) -> list[Path]:
    path = located(source)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path]
    found: list[Path]
    if isinstance(path, RemotePath):
        found = sorted(path.parent.glob(path.name))
    else:
        found = sorted(Path(name) for name in glob.glob(str(source)))  # noqa: PTH207 - the pattern may be absolute
    if found:
        return found
    raise MissingArtifact(f"there is no {source}; give a tar, a pattern such as 'shards/*.tar', or a folder")


def _index(path: Path) -> list[tuple[str, dict[str, Member]]]:
    if path.suffix != ".tar":
        raise ConfigError(f"{path} is not a tar; give a tar, a pattern such as 'shards/*.tar', or a folder of images")
    if not path.is_file():
        raise MissingArtifact(f"there is no file {path}")
    status = path.stat()
    return _indexed(path, status.st_size, status.st_mtime_ns)


@cache
def _indexed(path: Path, size: int, changed: int) -> list[tuple[str, dict[str, Member]]]:
    return index_tar(path)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _words(meta: dict[str, Any]) -> tuple[str, ...]:
    words = meta.get("words", meta.get("classes", ()))
    if not isinstance(words, list | tuple):
        raise ValueError("its words are no list")
    return tuple(str(word) for word in words)


def _decode_labels(data: bytes, shape: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "H W"]:
    labels = decode_labels(data)
    if shape is not None and labels.shape != shape:
        raise ValueError(f"its masks are {labels.shape[1]} x {labels.shape[0]} pixels and its image is not")
    return labels


def _unreadable(path: Path, key: str, error: Exception) -> CorruptShard:
    reason = " ".join(str(error).split()) or type(error).__name__
    return CorruptShard(f"sample {key} of {path} cannot be read: {reason}; delete the file, or make it again")
