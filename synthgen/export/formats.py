"""The export formats: the files that each writes per sample, and its summary files."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml
from jaxtyping import Bool, UInt8
from PIL import Image

from synthgen import codecs
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact
from synthgen.export.polygons import compress_counts, join_corners, outlines, run_lengths
from synthgen.image import encode_jpeg, encode_png
from synthgen.mask_shape import box, describe_masks, split
from synthgen.records import Prompt, WordMasks
from synthgen.run import Run
from synthgen.stages._layout import split_of
from synthgen.stages.shards import Shards, source_of
from synthgen.stores import open_binary
from synthgen.stores.tar import write_bytes, write_chunks

__all__ = ["WRITERS", "Export", "Sample", "Writer"]

_IMAGE_FORMATS: dict[str, Literal["png", "jpg"]] = {"coco": "png", "yolo": "jpg", "labels": "png"}


@dataclass(frozen=True)
class Export:
    """Settings of an export."""

    format: Literal["coco", "yolo", "labels"]
    image_format: Literal["png", "jpg"] | None = None  # None: jpg for yolo, else png (the run's own, unchanged)
    quality: int = 95  # of jpg, 1 to 100
    rle: bool = False  # coco: masks as compressed run lengths instead of polygons
    instances: bool = True  # coco, yolo: one annotation per separate object of a mask; False: one per mask
    val_ratio: float | None = None  # yolo: share of the samples in val; None: that of the run's shards
    filtered: bool = True  # leave out the samples that the filter stage rejected; without that stage, none

    def __post_init__(self) -> None:
        if self.format not in _IMAGE_FORMATS:
            raise ValueError(f"format must be coco, yolo or labels, not {self.format!r}")
        if self.image_format not in (None, "png", "jpg"):
            raise ValueError(f"image_format must be png or jpg, not {self.image_format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, not {self.quality}")
        if self.rle and self.format != "coco":
            raise ValueError(f"rle is a form of coco's masks; {self.format} has none")
        if not self.instances and self.format == "labels":
            raise ValueError("instances separates the objects of coco and yolo; labels has classes only")
        if self.val_ratio is not None and self.format != "yolo":
            raise ValueError(f"val_ratio splits yolo's samples; {self.format} has no split")
        if self.val_ratio is not None and not 0 <= self.val_ratio < 1:
            raise ValueError(f"val_ratio must be at least 0 and below 1, not {self.val_ratio}")

    def complete(self, run: Run) -> Export:
        """These settings, with the default image format and the split of the run's shards (or its default) set."""
        settings = replace(self, image_format=self.image_format or _IMAGE_FORMATS[self.format])
        if settings.format == "yolo" and settings.val_ratio is None:
            shards = run.artifacts().get("shards", {}).get("settings", {})
            settings = replace(settings, val_ratio=float(shards.get("val_ratio", Shards.val_ratio)))
        return settings


@dataclass(frozen=True)
class Sample:
    """A sample to export."""

    key: str
    prompt: Prompt
    png: bytes
    pixels: UInt8[np.ndarray, "H W 3"]
    masks: WordMasks


class Writer(ABC):
    """Writes the samples of each unit, then the summary files."""

    summaries: ClassVar[tuple[str, ...]]  # the files that :meth:`finish` writes

    def __init__(self, run: Run, settings: Export, folder: Path, names: Sequence[str]) -> None:
        self.run, self.settings, self.folder, self.names = run, settings, folder, names
        self.numbers = {name: number for number, name in enumerate(names)}

    @property
    def is_finished(self) -> bool:
        """Whether all summary files exist."""
        return all((self.folder / name).is_file() for name in self.summaries)

    def has_unit(self, unit: int, keys: Iterable[str]) -> bool:
        """Whether all files of the samples of a unit exist."""
        return all(path.is_file() for key in keys for path in self.files(key))

    def write(self, unit: int, samples: Iterable[Sample]) -> None:
        """Write the files of a unit that do not exist yet."""
        for sample in samples:
            self.add(sample)

    @abstractmethod
    def files(self, key: str) -> tuple[Path, ...]:
        """The files of a sample, its image first."""

    @abstractmethod
    def add(self, sample: Sample) -> None:
        """Write the files of a sample that do not exist yet."""

    @abstractmethod
    def finish(self, units: Sequence[int]) -> None:
        """Write the summary files for these units."""

    def tidy(self) -> None:
        """Delete the files that were kept for resuming; called when the summary files exist."""

    def objects(self, mask: Bool[np.ndarray, "H W"]) -> list[Bool[np.ndarray, "H W"]]:
        """The parts of one word's mask that get an annotation each; none if it is empty."""
        return split(mask) if self.settings.instances else [mask] * bool(mask.any())

    def image(self, sample: Sample) -> bytes:
        """The image as a file of the chosen format; a PNG is the run's own."""
        png = self.settings.image_format == "png"
        return sample.png if png else encode_jpeg(sample.pixels, self.settings.quality)


class Coco(Writer):
    """https://cocodataset.org/#format-data, with ``caption`` on images, ``score`` and ``confidence`` on annotations.

    The annotations of a unit go to a file of their own in ``annotations/parts``, written with its images; the files are
    merged at the end. So only one image's annotations are in memory, and a killed export can resume.
    """

    summaries: ClassVar = ("annotations/instances.json", "annotations/captions.json")

    def files(self, key: str) -> tuple[Path, ...]:
        return (self.folder / "images" / f"{key}.{self.settings.image_format}",)

    def part(self, unit: int) -> Path:
        """The file with a line for each image of a unit, followed by a line for each annotation; without ids."""
        return self.folder / "annotations" / "parts" / f"{unit:06d}.jsonl"

    def has_unit(self, unit: int, keys: Iterable[str]) -> bool:
        return super().has_unit(unit, keys) and (self.is_finished or self.part(unit).is_file())

    def write(self, unit: int, samples: Iterable[Sample]) -> None:
        write_chunks(self.part(unit), (line for sample in samples for line in self.lines(sample)))

    def add(self, sample: Sample) -> None:
        (path,) = self.files(sample.key)
        _put(path, lambda: self.image(sample))

    def lines(self, sample: Sample) -> Iterator[bytes]:
        """Write the image of a sample and yield its lines of the part."""
        self.add(sample)
        (path,) = self.files(sample.key)
        height, width = sample.pixels.shape[:2]
        file = path.relative_to(self.folder / "images").as_posix()
        facts = {"file_name": file, "height": height, "width": width, "caption": sample.prompt.text}
        described = describe_masks(sample.masks, instances=False)
        found = [
            self.annotation(about, one)
            for about, mask in zip(described, sample.masks.values, strict=True)
            for one in self.objects(mask)
        ]
        yield from (_json(value) + b"\n" for value in ({"image": facts, "annotations": len(found)}, *found))

    def annotation(self, about: Mapping[str, Any], mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
        """The annotation of one object of a word, without its id and its image's id."""
        left, top, right, bottom = box(mask)
        return {
            "category_id": self.numbers[about["word"]] + 1,
            "segmentation": self.segmentation(mask),
            "area": int(mask.sum()),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": 0,
            "score": about["score"],
            "confidence": about["confidence"],
        }

    def segmentation(self, mask: Bool[np.ndarray, "H W"]) -> Any:
        """A mask as polygons, or as compressed run lengths with ``rle``."""
        if self.settings.rle:
            return {"size": list(mask.shape), "counts": compress_counts(run_lengths(mask))}
        return [outline.ravel().tolist() for outline in outlines(mask)]

    def finish(self, units: Sequence[int]) -> None:
        if self.is_finished:
            return
        instances, captions = (self.folder / name for name in self.summaries)
        categories = [{"id": number + 1, "name": name} for name, number in self.numbers.items()]
        images = ({"id": number, **facts} for number, facts, _ in self.read(units))
        lists = {"images": images, "annotations": self.annotations(units), "categories": categories}
        plain = (
            {"id": number, **{name: fact for name, fact in facts.items() if name != "caption"}}
            for number, facts, _ in self.read(units)
        )
        listed = (
            {"id": number, "image_id": number, "caption": facts["caption"]} for number, facts, _ in self.read(units)
        )
        try:
            write_chunks(instances, _document(self.head(), lists))
            write_chunks(captions, _document(self.head(), {"images": plain, "annotations": listed}))
        except MissingArtifact:
            if not self.is_finished:  # else a parallel export has finished and deleted the parts
                raise

    def head(self) -> dict[str, Any]:
        """The first keys of both files."""
        attended = self.run.artifact("images")["stage"] == "attend"
        origin = f"{'existing' if attended else 'generated'} images, masks from the attention of a diffusion model"
        return {
            "info": {"description": f"{self.run.path.resolve().name}: {origin}", "version": "1.0"},
            "licenses": [{"id": 1, "name": source_of(self.run)["licence"], "url": ""}],
        }

    def annotations(self, units: Iterable[int]) -> Iterator[dict[str, Any]]:
        """All annotations, with their ids and their images' ids."""
        numbers = count(1)
        for image, _, found in self.read(units, masks=True):
            yield from ({"id": next(numbers), "image_id": image, **one} for one in found)

    def read(
        self, units: Iterable[int], *, masks: bool = False
    ) -> Iterator[tuple[int, dict[str, Any], list[dict[str, Any]]]]:
        """For each image of all parts: its id from 1, its entry and, with ``masks``, its annotations.

        Raises:
            MissingArtifact: a part is missing.
            CorruptFile: a part cannot be read.
        """
        numbers = count(1)
        for path in map(self.part, units):
            try:
                with open_binary(path) as file:
                    for line in file:
                        entry = json.loads(line)
                        lines = list(islice(file, entry["annotations"]))
                        if len(lines) != entry["annotations"]:
                            raise ValueError("it is cut off")
                        yield next(numbers), entry["image"], [json.loads(one) for one in lines if masks]
            except FileNotFoundError:
                raise MissingArtifact(f"{path} is gone; run the same command again") from None
            except (LookupError, TypeError, ValueError):
                raise CorruptFile(f"{path} cannot be read; delete it and run the same command again") from None

    def tidy(self) -> None:
        parts = self.part(0).parent
        for path in parts.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            parts.rmdir()


class Yolo(Writer):
    """The segmentation format of Ultralytics: a text file for each image, a line for each object."""

    summaries: ClassVar = ("data.yaml",)

    def files(self, key: str) -> tuple[Path, ...]:
        split = split_of(self.run, key, self.settings.val_ratio or 0.0)
        image = self.folder / "images" / split / f"{key}.{self.settings.image_format}"
        return image, self.folder / "labels" / split / f"{key}.txt"

    def add(self, sample: Sample) -> None:
        image, label = self.files(sample.key)
        _put(label, lambda: self.lines(sample.masks).encode())
        _put(image, lambda: self.image(sample))

    def lines(self, masks: WordMasks) -> str:
        """``class x1 y1 x2 y2 ...`` for each object, x and y relative to the width and height.

        A line is one polygon, so without ``instances`` a mask of several parts still gets several lines.
        """
        height, width = masks.values.shape[1:]
        return "".join(
            f"{self.numbers[word]} {' '.join(f'{x / width:.6f} {y / height:.6f}' for x, y in polygon)}\n"
            for word, mask in zip(masks.words, masks.values, strict=True)
            for one in self.objects(mask)
            for polygon in join_corners(outlines(one))
        )

    def finish(self, units: Sequence[int]) -> None:
        val = "val" if (self.folder / "images" / "val").is_dir() else "train"  # trainers need a val set with images
        data = {"train": "images/train", "val": f"images/{val}", "names": dict(enumerate(self.names))}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        write_bytes(self.folder / "data.yaml", text.encode())


class Labels(Writer):
    """A label image of class numbers for each image, as loaders for ADE20K and Pascal VOC expect."""

    summaries: ClassVar = ("classes.txt",)

    def files(self, key: str) -> tuple[Path, ...]:
        image = self.folder / "images" / f"{key}.{self.settings.image_format}"
        return image, self.folder / "labels" / f"{key}.png"

    def add(self, sample: Sample) -> None:
        image, label = self.files(sample.key)
        _put(label, lambda: self.label(sample.masks))
        _put(image, lambda: self.image(sample))

    def label(self, masks: WordMasks) -> bytes:
        """The label image: 8 bits if that keeps 255 free as the ignore value, else 16.

        Raises:
            ConfigError: the run has more than 65534 words.
        """
        numbers = [0] + [self.numbers[word] + 1 for word in masks.words]
        if len(self.names) > 65534:
            raise ConfigError(f"a label image holds 65534 classes, and {self.run.path} has {len(self.names)} words")
        if len(self.names) <= 254:
            return encode_png(np.array(numbers, np.uint8)[codecs.masks_to_labels(masks.values)])
        buffer = io.BytesIO()
        Image.fromarray(np.array(numbers, np.uint16)[codecs.masks_to_labels(masks.values)]).save(buffer, format="PNG")
        return buffer.getvalue()

    def finish(self, units: Sequence[int]) -> None:
        lines = ["background", *(" ".join(name.split()) for name in self.names)]
        write_bytes(self.folder / "classes.txt", "".join(f"{line}\n" for line in lines).encode())


WRITERS: dict[str, type[Writer]] = {"coco": Coco, "yolo": Yolo, "labels": Labels}


def _put(path: Path, make: Callable[[], bytes]) -> None:
    if not path.is_file():  # files are written atomically, and a folder has one export only
        write_bytes(path, make())


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()  # compact: there are many


def _document(head: Mapping[str, Any], lists: Mapping[str, Iterable[Any]]) -> Iterator[bytes]:
    """The bytes of a JSON object: the head, then the lists, with one entry in memory at a time."""
    yield _json(head)[:-1]
    for name, values in lists.items():
        yield b"," + _json(name) + b":["
        for number, value in enumerate(values):
            yield b"," * (number > 0) + _json(value)
        yield b"]"
    yield b"}"
