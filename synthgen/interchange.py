"""The masked samples of a run as what other tools read: COCO, YOLO, label images. docs/format.md has the layouts."""

from __future__ import annotations

import io
import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from synthgen import __version__, codecs
from synthgen.config import dump
from synthgen.errors import ConfigError, CorruptShard, MissingArtifact, StaleArtifact
from synthgen.image import encode_jpeg, encode_png
from synthgen.mask_shape import box, describe_masks, split
from synthgen.records import Prompt, WordMasks
from synthgen.run import Run, digest
from synthgen.runner import Progress, Summary
from synthgen.stages.shards import Shards, content_of, source_of, split_of
from synthgen.stores.tar import read_tar, write_bytes, write_json
from synthgen.untrusted import read_file, read_json, visible

__all__ = ["Export", "compress_counts", "export_dataset", "join_corners", "outlines", "run_lengths"]

_MARK = "export.json"  # written first: what the folder is, so that it is never mixed with another export
_IMAGE_FORMATS: dict[str, Literal["png", "jpg"]] = {"coco": "png", "yolo": "jpg", "labels": "png"}


@dataclass(frozen=True)
class Export:
    """What is written, and how."""

    format: Literal["coco", "yolo", "labels"]
    image_format: Literal["png", "jpg"] | None = None  # None: jpg for yolo, else png (that of the run, unchanged)
    quality: int = 95  # of jpg, 1 to 100
    rle: bool = False  # coco: masks as compressed run lengths instead of polygons
    instances: bool = True  # coco, yolo: the separate objects of a mask are annotated apart; False: all of it as one
    val_ratio: float | None = None  # yolo: share of the samples that go to val; None: that of the run's shards

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
            raise ValueError("instances tells the objects of coco and yolo apart; labels knows classes only")
        if self.val_ratio is not None and self.format != "yolo":
            raise ValueError(f"val_ratio splits yolo's samples; {self.format} has no split")
        if self.val_ratio is not None and not 0 <= self.val_ratio < 1:
            raise ValueError(f"val_ratio must be at least 0 and below 1, not {self.val_ratio}")

    def complete(self, run: Run) -> Export:
        """With what was left open: the image format, and the split of the run's shards (or their default)."""
        done = replace(self, image_format=self.image_format or _IMAGE_FORMATS[self.format])
        if done.format == "yolo" and done.val_ratio is None:
            shards = run.manifest()["artifacts"].get("shards", {}).get("settings", {})
            done = replace(done, val_ratio=float(shards.get("val_ratio", Shards.val_ratio)))
        return done


def export_dataset(
    run: Run, settings: Export, folder: Path | None = None, *, progress: Progress | None = None
) -> Summary:
    """Write the samples of a run to ``folder`` (by default ``RUN/export-FORMAT``); what is written stays as it is.

    Raises:
        MissingArtifact: there are no masks, or not of every image.
        StaleArtifact: the folder holds an export of other masks, or with other settings.
        ConfigError: the folder holds something else.
        CorruptShard: a sample cannot be read, or its masks do not fit it.
        StorageError: the disk is full or the folder may not be written to.
    """
    progress = progress or Progress()
    settings = settings.complete(run)
    folder = folder or run.path / f"export-{settings.format}"
    units = _masked_units(run)
    entry = _entry(run, settings, units)
    _check(folder, entry)
    writer = _WRITERS[settings.format](run, settings, folder, _names(run, units))
    todo = [unit for unit in units if not _written(run, unit, writer)]
    described = all((folder / name).is_file() for name in writer.summaries)
    if writer.collects and (todo or not described):
        todo = units  # what describes the whole is made from every sample
    summary = Summary("export", len(units), len(units) - len(todo))
    if described and not todo:
        return summary
    if not (folder / _MARK).is_file():
        write_json(folder / _MARK, entry)
    sizes = {unit: int((run.mark("images", unit) or {"count": 0})["count"]) for unit in units}
    total, started, notes = sum(sizes.values()), time.perf_counter(), Counter[str]()
    progress.start("export", total, total - sum(sizes[unit] for unit in todo))
    try:
        for sample in (sample for unit in todo for sample in _samples(run, unit)):
            writer.add(sample)
            kept = int(sample.masks.values.any(axis=(1, 2)).sum())
            notes.update({"masks": kept, "dropped masks": len(sample.masks.words) - kept})
            summary.samples += 1
            progress.advance(1)
        writer.finish()
    finally:
        progress.stop()
    for leftover in folder.glob("**/.*.tmp"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    summary.seconds, summary.notes = time.perf_counter() - started, dict(notes)
    return summary


# -- what there is to export, and what is in the folder


@dataclass(frozen=True)
class _Sample:
    key: str
    prompt: Prompt
    png: bytes
    pixels: UInt8[np.ndarray, "H W 3"]
    masks: WordMasks


def _masked_units(run: Run) -> list[int]:
    units = run.units("images")
    missing = sorted(set(units) - set(run.units("masks")))
    if missing:
        raise MissingArtifact(
            f"{len(missing)} of {len(units)} units of {run.path} have no masks yet (first: {missing[0]:06d}); "
            f"run: synthgen masks --run {run.path}"
        )
    return units


def _samples(run: Run, unit: int) -> Iterator[_Sample]:
    found = dict(run.read("masks", unit))
    for key, members in run.read("images", unit):
        request, pixels, _ = codecs.decode_image(key, members)
        masks = codecs.decode_masks(key, found[key]) if key in found else None
        if masks is None or masks.words != request.prompt.words or masks.values.shape[1:] != pixels.shape[:2]:
            path = run.tar("masks", unit)
            raise CorruptShard(f"the masks of sample {key} do not fit its image; delete {path} and make it again")
        yield _Sample(key, request.prompt, members["png"], pixels, masks)


def _names(run: Run, units: Sequence[int]) -> list[str]:
    """Every marked word of the run once, sorted."""
    names: set[str] = set()
    for unit in units:
        for key, members in read_tar(run.tar("masks", unit), names={"json"}):
            try:
                names.update(read_json(members["json"])["words"])
            except (LookupError, TypeError, ValueError):
                path = run.tar("masks", unit)
                raise CorruptShard(
                    f"the words of sample {key} cannot be read; delete {path} and make it again"
                ) from None
    return sorted(names)


def _entry(run: Run, settings: Export, units: Sequence[int]) -> dict[str, Any]:
    """What ``export.json`` says."""
    inputs = {f"units of {name}": content_of(run, name, units) for name in ("images", "masks")}
    plain = dump(settings)
    return {
        "name": run.path.resolve().name,
        "seed": run.seed,
        **source_of(run),
        "settings": plain,
        "inputs": inputs,
        "fingerprint": digest({"settings": plain, "seed": run.seed, "inputs": inputs}),
        "version": __version__,
    }


def _check(folder: Path, entry: Mapping[str, Any]) -> None:
    """See that the folder is empty, or begun with the same settings from the same samples."""
    try:
        before = read_json(read_file(folder / _MARK))
        same, old = before["fingerprint"] == entry["fingerprint"], {**before["settings"], **before["inputs"]}
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise ConfigError(
                f"{folder} is there and was not written by synthgen export; choose another --out"
            ) from None
        return
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{folder / _MARK} cannot be read; delete {folder} or choose another --out") from None
    if not same:
        changes = [f"{name} is {value!r} and was {old.get(name)!r}" for name, value in entry["settings"].items()
                   if old.get(name) != value]  # fmt: skip
        changes += [f"the {name} have changed" for name, value in entry["inputs"].items() if old.get(name) != value]
        raise StaleArtifact(
            f"{folder} was exported differently: {'; '.join(changes) or 'from another run'}; "
            f"choose another --out, or delete {folder} to make it anew"
        )


def _written(run: Run, unit: int, writer: _Writer) -> bool:
    return all(path.is_file() for key in run.keys("images", unit) for path in writer.files(key))


# -- the formats


class _Writer(ABC):
    """Writes samples in order, then what describes the whole."""

    summaries: ClassVar[tuple[str, ...]]  # the files that :meth:`finish` writes
    collects: ClassVar[bool] = False  # True: they need every sample

    def __init__(self, run: Run, settings: Export, folder: Path, names: Sequence[str]) -> None:
        self.run, self.settings, self.folder, self.names = run, settings, folder, names
        self.numbers = {name: number for number, name in enumerate(names)}

    def files(self, key: str) -> tuple[Path, ...]:
        """What a sample leaves: its image first."""
        if (
            key.startswith("/") or "\\" in key or ".." in key.split("/") or visible(key) != key
        ):  # keys of foreign images may name folders
            raise CorruptShard(f"the key {key!r} of {self.run.path} cannot be the name of a file")
        return self.paths(key)

    @abstractmethod
    def paths(self, key: str) -> tuple[Path, ...]:
        """The same, for a key that is safe."""

    @abstractmethod
    def add(self, sample: _Sample) -> None:
        """Write a sample."""

    @abstractmethod
    def finish(self) -> None:
        """Write what describes the whole."""

    def objects(self, mask: Bool[np.ndarray, "H W"]) -> list[Bool[np.ndarray, "H W"]]:
        """What is annotated apart of one word's mask; nothing where it is empty."""
        return split(mask) if self.settings.instances else [mask] * bool(mask.any())

    def image(self, sample: _Sample) -> bytes:
        """The image in the format asked for; a PNG is that of the run."""
        png = self.settings.image_format == "png"
        return sample.png if png else encode_jpeg(sample.pixels, self.settings.quality)


class _Coco(_Writer):
    """https://cocodataset.org/#format-data, with ``caption`` on images, ``score`` and ``confidence`` on annotations."""

    summaries: ClassVar = ("annotations/instances.json", "annotations/captions.json")
    collects: ClassVar = True

    def __init__(self, run: Run, settings: Export, folder: Path, names: Sequence[str]) -> None:
        super().__init__(run, settings, folder, names)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def paths(self, key: str) -> tuple[Path, ...]:
        return (self.folder / "images" / f"{key}.{self.settings.image_format}",)

    def add(self, sample: _Sample) -> None:
        (path,) = self.files(sample.key)
        _put(path, lambda: self.image(sample))
        height, width = sample.pixels.shape[:2]
        number = len(self.images) + 1
        file = path.relative_to(self.folder / "images").as_posix()
        facts = {"id": number, "file_name": file, "height": height, "width": width, "caption": sample.prompt.text}
        self.images.append(facts)
        described = describe_masks(sample.masks, instances=False)
        for about, mask in zip(described, sample.masks.values, strict=True):
            self.annotations += [self.annotation(number, about, one) for one in self.objects(mask)]

    def annotation(self, image: int, about: Mapping[str, Any], mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
        """One object of a word, without its number."""
        left, top, right, bottom = box(mask)
        return {
            "image_id": image,
            "category_id": self.numbers[about["word"]] + 1,
            "segmentation": self.segmentation(mask),
            "area": int(mask.sum()),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": 0,
            "score": about["score"],
            "confidence": about["confidence"],
        }

    def segmentation(self, mask: Bool[np.ndarray, "H W"]) -> Any:
        """Polygons, or run lengths."""
        if self.settings.rle:
            return {"size": list(mask.shape), "counts": compress_counts(run_lengths(mask))}
        return [outline.ravel().tolist() for outline in outlines(mask)]

    def finish(self) -> None:
        name = self.run.path.resolve().name
        head = {
            "info": {"description": f"{name}: images made by a model, masks from its attention", "version": "1.0"},
            "licenses": [{"id": 1, "name": source_of(self.run)["licence"], "url": ""}],
        }
        categories = [{"id": number + 1, "name": name} for name, number in self.numbers.items()]
        numbered = [{"id": number, **one} for number, one in enumerate(self.annotations, start=1)]
        instances = {"images": self.images, "annotations": numbered, "categories": categories}
        plain = [{key: value for key, value in image.items() if key != "caption"} for image in self.images]
        captions = [{"id": one["id"], "image_id": one["id"], "caption": one["caption"]} for one in self.images]
        for file, value in zip(
            self.summaries, (instances, {"images": plain, "annotations": captions}), strict=True
        ):  # as long as all polygons: without the spaces of write_json
            text = json.dumps(head | value, ensure_ascii=False, separators=(",", ":"))
            write_bytes(self.folder / file, text.encode())


class _Yolo(_Writer):
    """The segmentation form of Ultralytics: a text file beside each image, a line for each object."""

    summaries: ClassVar = ("data.yaml",)

    def paths(self, key: str) -> tuple[Path, ...]:
        split = split_of(self.run, key, self.settings.val_ratio or 0.0)
        image = self.folder / "images" / split / f"{key}.{self.settings.image_format}"
        return image, self.folder / "labels" / split / f"{key}.txt"

    def add(self, sample: _Sample) -> None:
        image, label = self.files(sample.key)
        _put(label, lambda: self.lines(sample.masks).encode())
        _put(image, lambda: self.image(sample))

    def lines(self, masks: WordMasks) -> str:
        """``class x1 y1 x2 y2 ...`` for each object, x and y as shares of the width and height.

        A line is one polygon, so without ``instances`` a mask of several parts still has so many lines.
        """
        height, width = masks.values.shape[1:]
        return "".join(
            f"{self.numbers[word]} {' '.join(f'{x / width:.6f} {y / height:.6f}' for x, y in polygon)}\n"
            for word, mask in zip(masks.words, masks.values, strict=True)
            for one in self.objects(mask)
            for polygon in join_corners(outlines(one))
        )

    def finish(self) -> None:
        val = "val" if (self.folder / "images" / "val").is_dir() else "train"  # trainers want one that has images
        data = {"train": "images/train", "val": f"images/{val}", "names": dict(enumerate(self.names))}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        write_bytes(self.folder / "data.yaml", text.encode())


class _Labels(_Writer):
    """An image of class numbers for each image, as the loaders of ADE20K and Pascal VOC read them."""

    summaries: ClassVar = ("classes.txt",)

    def paths(self, key: str) -> tuple[Path, ...]:
        image = self.folder / "images" / f"{key}.{self.settings.image_format}"
        return image, self.folder / "labels" / f"{key}.png"

    def add(self, sample: _Sample) -> None:
        image, label = self.files(sample.key)
        _put(label, lambda: self.label(sample.masks))
        _put(image, lambda: self.image(sample))

    def label(self, masks: WordMasks) -> bytes:
        """The label image: 8 bits where 255 is left over as the value to ignore, else 16."""
        numbers = [0] + [self.numbers[word] + 1 for word in masks.words]
        if len(self.names) > 65534:
            raise ConfigError(f"a label image holds 65534 classes, and {self.run.path} has {len(self.names)} words")
        if len(self.names) <= 254:
            return encode_png(np.array(numbers, np.uint8)[codecs.masks_to_labels(masks.values)])
        buffer = io.BytesIO()
        Image.fromarray(np.array(numbers, np.uint16)[codecs.masks_to_labels(masks.values)]).save(buffer, format="PNG")
        return buffer.getvalue()

    def finish(self) -> None:
        lines = ["background", *(" ".join(name.split()) for name in self.names)]
        write_bytes(self.folder / "classes.txt", "".join(f"{line}\n" for line in lines).encode())


_WRITERS: dict[str, type[_Writer]] = {"coco": _Coco, "yolo": _Yolo, "labels": _Labels}


def _put(path: Path, make: Callable[[], bytes]) -> None:
    if not path.is_file():  # files appear whole, and the folder holds one export only
        write_bytes(path, make())


# -- masks as polygons and run lengths


def outlines(mask: Bool[np.ndarray, "H W"]) -> list[Int64[np.ndarray, "_ 2"]]:
    """A polygon for every part of a mask, as the corners (x, y) that it passes, clockwise; together they are the mask.

    A part is connected over pixels' sides. Polygons run on the cracks between pixels: pixel (row, column) is the square
    from (column, row) to (column + 1, row + 1), so a polygon's area is that of its part. A hole is joined to what lies
    left of it by a slit without width, passed once there and once back: asking whether pixels' centres are inside, by
    the even-odd or by the nonzero rule, gives the mask again exactly.
    """
    if not mask.any():
        return []
    height, width = mask.shape
    padded = np.pad(mask, 1)
    middle = padded[1:-1, 1:-1]
    # A crack is the side of a pixel of the mask that has none beyond it. It starts at a lattice point and leads east,
    # south, west or north, the pixel on its right.
    cracks = np.zeros((4, height + 1, width + 1), bool)
    cracks[0, :-1, :-1] = middle & ~padded[:-2, 1:-1]
    cracks[1, :-1, 1:] = middle & ~padded[1:-1, 2:]
    cracks[2, 1:, 1:] = middle & ~padded[2:, 1:-1]
    cracks[3, 1:, :-1] = middle & ~padded[1:-1, :-2]
    points = (height + 1) * (width + 1)
    there = cracks.reshape(4, points)
    starts, following = [], []
    for heading, step in enumerate((1, width + 1, -1, -width - 1)):
        start = np.flatnonzero(there[heading])
        end, right, left = start + step, (heading + 1) % 4, (heading - 1) % 4
        # where two pixels touch at a corner only, the right turn stays at the same pixel
        turn = np.where(there[right, end], right, np.where(there[heading, end], heading, left))
        starts.append(heading * points + start)
        following.append(turn * points + end)
    every = np.concatenate(starts)  # sorted
    successor = np.searchsorted(every, np.concatenate(following))
    every, successor = _slit(mask, every, successor)
    headings, passed = np.divmod(every, points)
    y, x = np.divmod(passed, width + 1)
    after = successor.tolist()
    seen = bytearray(len(every))
    found = []
    for first in range(len(starts[0])):  # each outline leads east somewhere
        if seen[first]:
            continue
        chain, crack = [], first
        while not seen[crack]:
            seen[crack] = 1
            chain.append(crack)
            crack = after[crack]
        turns = np.array(chain)[headings[chain] != np.roll(headings[chain], 1)]
        found.append(np.stack([x[turns], y[turns]], axis=1))
    return found


def _slit(
    mask: Bool[np.ndarray, "H W"], cracks: Int64[np.ndarray, " cracks"], after: Int64[np.ndarray, " cracks"]
) -> tuple[Int64[np.ndarray, " more"], Int64[np.ndarray, " more"]]:
    """Join the loop of cracks around each hole to the next loop on its left, by two cracks more for each hole.

    A crack is a number, its heading times the lattice points and where it starts; ``after`` says which comes next. A
    slit leaves from a hole's upper left corner and goes west to the first lattice point that the mask does not
    surround. That one is of another loop: slits go up, or to the left on one line, so that they lead around nothing.
    """
    width, points = mask.shape[1] + 1, (mask.shape[0] + 1) * (mask.shape[1] + 1)
    headings, passed = np.divmod(cracks, points)
    y, x = np.divmod(passed, width)
    links = csr_array((np.ones(len(cracks), bool), (np.arange(len(cracks)), after)), shape=(len(cracks), len(cracks)))
    num_loops, loop = connected_components(links, directed=False)
    areas = np.bincount(loop, weights=x * y[after] - x[after] * y, minlength=num_loops)  # twice; below 0 around a hole
    south = np.flatnonzero(headings == 1)
    loops, first = np.unique(loop[south], return_index=True)  # cracks are sorted: from the upper left corner
    down = south[first[areas[loops] < 0]]
    row, right = y[down], x[down]
    ends = ~(mask[row - 1] & mask[row]) & (np.arange(width - 1) < right[:, None])  # pixels left of it, not both there
    left = np.where(ends, np.arange(1, width), 0).max(axis=1, initial=0)
    up = ~mask[row - 1, left - 1] | (left == 0)  # where the loop that is met goes on, north or west
    onward = np.searchsorted(cracks, np.where(up, 3, 2) * points + row * width + left)
    east = len(cracks) + np.arange(len(down))
    west = east + len(down)
    before = np.empty_like(after)
    before[after] = np.arange(len(after))
    joined = np.concatenate([after, down, onward])
    joined[before[onward]], joined[before[down]] = east, west
    return np.concatenate([cracks, row * width + left, 2 * points + row * width + right]), joined


def join_corners(polygons: Sequence[Int64[np.ndarray, "_ 2"]]) -> list[list[tuple[int, int]]]:
    """Polygons that meet at a corner as one, which passes the corner once for each."""
    rings = [[(x, y) for x, y in polygon.tolist()] for polygon in polygons]
    passing: dict[tuple[int, int], list[int]] = {}
    for number, ring in enumerate(rings):
        for corner in ring:
            passing.setdefault(corner, []).append(number)
    left, found = set(range(len(rings))), []
    for number, ring in enumerate(rings):
        if number not in left:
            continue
        left.remove(number)
        path, stack = [], [iter(ring)]
        while stack:
            at = next(stack[-1], None)
            if at is None:
                stack.pop()
                continue
            path.append(at)
            for other in left.intersection(passing[at]):  # one at most: four pixels meet at a corner
                left.remove(other)
                start = rings[other].index(at) + 1
                stack.append(iter(rings[other][start:] + rings[other][:start]))
        found.append(path)
    return found


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """How many pixels in turn are outside and inside, down the columns from the left; the first number is outside."""
    flat = mask.ravel(order="F")
    bounds = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))
    counts: list[int] = np.diff(bounds, prepend=0).tolist()
    return counts


def compress_counts(counts: Sequence[int]) -> str:
    """Run lengths as the text that COCO calls compressed.

    From the fourth on a number is less the one two before it. Five bits make a character from "0" on, the lowest
    first; the sixth says that more follow, and the last one's fifth is the sign. Source: the published format of the
    COCO API (cocodataset/cocoapi, common/maskApi.c, ``rleToString``).
    """
    text = []
    for index, count in enumerate(counts):
        left = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            bits, left = left & 31, left >> 5
            more = left != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)
