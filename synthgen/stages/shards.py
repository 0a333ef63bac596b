"""Pack the samples of many units into training tars, with indexes and a dataset card. docs/format.md has the layout."""

from __future__ import annotations

import functools
import io
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from synthgen import __version__, codecs
from synthgen.backbones import BACKBONES
from synthgen.card import (
    MASK_COLUMNS,
    SCHEMA_VERSION,
    count_split,
    dataset_card,
    parquet_bytes,
    prompt_figures,
    wids_index,
)
from synthgen.columns import Column, unit_of
from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.image import encode_jpeg, encode_png
from synthgen.mask_shape import describe_masks
from synthgen.prompt_copy import iter_lines
from synthgen.records import Report
from synthgen.run import Run, digest, versions
from synthgen.stages import Stage, Work, Worker, runtime_field
from synthgen.stages._layout import Shard, lay_out, split_again
from synthgen.stages._units import content_of, need_masks
from synthgen.stores import listing
from synthgen.stores.tar import TarWriter, read_tar, storage_error, write_bytes, write_json
from synthgen.units import checked_mark
from synthgen.untrusted import MAX_BYTES, read_file, read_json

__all__ = ["Shards"]

logger = logging.getLogger(__name__)

_FOREIGN = "The images were not made here: the licence of where they come from holds for them."
_INDEXES = {"train": "index.json", "val": "index-val.json"}  # split → its wids index


@dataclass(frozen=True)
class Shards(Stage):
    """Join image, text, masks, label and metadata of each sample, and pack many units into one tar.

    Units are small, so that little is lost when a run dies; training reads best from large tars. A sample's split
    depends on the run's seed and its key alone. Equal inputs and settings give equal bytes.
    """

    name: ClassVar = "shards"
    reads: ClassVar[tuple[str, ...]] = ("images", "masks")
    writes: ClassVar = ("shards",)

    samples_per_shard: int = 1000
    val_ratio: float = 0.05  # share of the samples that go to val; 0: no val split
    shuffle: bool = True  # mix the order of units, and of the samples of a shard
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = 95  # of jpg and webp, 1 to 100; png is without loss
    masks: bool = True  # False: no mask.png, and the masks stage need not have run
    instances: bool = True  # the json tells the separate objects of a mask apart; False: each mask is one
    _units: frozenset[int] | None = runtime_field()  # the image units to pack; later ones go into no shard of this call
    _labels: list[str] | None = runtime_field()  # the classes, so that workers need not read every json

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")
        if not 0 <= self.val_ratio < 1:
            raise ValueError(f"val_ratio must be at least 0 and below 1, not {self.val_ratio}")
        if self.image_format not in ("jpg", "png", "webp"):
            raise ValueError(f"image_format must be jpg, png or webp, not {self.image_format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, not {self.quality}")
        if not self.masks:
            object.__setattr__(self, "reads", ("images",))

    def inputs(self, run: Run) -> dict[str, str]:
        """The content of the units that are there, so that shards of fewer units are not taken for these.

        Raises:
            MissingArtifact: some images have no masks yet.
            StaleArtifact: a unit was made with other settings than its artifact.
            CorruptFile: see :func:`~synthgen.stages._units.content_of`.
        """
        units = run.units("images")
        found = {"units of images": content_of(run, "images", units)}
        if self.masks:
            need_masks(run, units, otherwise=", or leave masks out with --set masks=false")
            found["units of masks"] = content_of(run, "masks", units)
        return found

    def prepare(self, run: Run) -> Self:
        """Fix which units are packed, and find the classes: for attended images that is one reading of every json.

        Raises:
            CorruptFile: a label cannot be read.
            StaleArtifact: the units are no longer those that :meth:`inputs` found.
        """
        stage = self.with_runtime(_units=frozenset(run.units("images")))
        stage.layout(run)
        return stage.with_runtime(_labels=_classes(run, stage._units))

    def classes(self, run: Run) -> list[str]:
        """The labels in the order of their numbers; none where a sample may be without."""
        return _classes(run, self._units) if self._labels is None else self._labels

    def layout(self, run: Run) -> Sequence[Shard]:
        """Every shard with its samples: reads the done marks of all image units, once for as long as none is added.

        In a run that was claimed (see :meth:`Run.claim`) it is the same in every process, whatever comes meanwhile.

        Raises:
            MissingArtifact, CorruptFile, StaleArtifact: see :func:`~synthgen.stages._layout.lay_out`.
        """
        if "shards" in run.claimed:  # which names the content of all units
            return _layout(self, run, run.claimed["shards"]["fingerprint"])
        return _layout(self, run, digest(sorted(listing(run.folder("images")))))

    def plan(self, run: Run) -> list[int]:
        """Unit n is the n-th shard of the layout: train first, then val."""
        return list(range(len(self.layout(run))))

    def planned(self, run: Run) -> int:
        """How many shards there are: once they are finished, as ``dataset.json`` says."""
        try:
            listed = read_json(read_file(run.folder("shards") / "dataset.json"), MAX_BYTES)["shards"]
        except (OSError, ValueError, LookupError, TypeError):
            listed = None
        return len(listed) if isinstance(listed, list) else len(self.plan(run))

    def size(self, run: Run, unit: int) -> int:
        """How many samples the shard holds."""
        return len(self.layout(run)[unit])

    def done(self, run: Run, unit: int) -> bool:
        """Whether tar, parquet and commit mark of a shard are there with the present settings."""
        return _done(run, self.layout(run)[unit], run.artifact("shards")["fingerprint"])

    def todo(self, run: Run) -> list[int]:
        """The shards that are not done."""
        fingerprint = run.artifact("shards")["fingerprint"]
        return [unit for unit, shard in enumerate(self.layout(run)) if not _done(run, shard, fingerprint)]

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Pack one shard at a time."""
        shards, packer = self.layout(run), Packer(self, run)

        def work(unit: int) -> Report:
            started = time.perf_counter()
            packer.pack(shards[unit], worker.progress.advance)
            run.tar("shards", unit).with_suffix(".failed.json").unlink(missing_ok=True)
            return Report(unit, len(shards[unit]), time.perf_counter() - started)

        yield work

    def finish(self, run: Run) -> None:
        """Write what describes the whole: sizes, wids indexes, ``dataset.json`` and the card."""
        folder = run.folder("shards")
        rows = [_row(run, shard) for shard in self.layout(run)]
        for split, index in _INDEXES.items():
            mine = [row for row in rows if row["split"] == split]
            if mine:
                write_json(folder / split / "sizes.json", {Path(row["file"]).name: row["samples"] for row in mine})
                write_json(folder / index, wids_index(run.path.resolve().name, mine))
        description = self.describe(run, rows)
        write_json(folder / "dataset.json", description)
        if self.val_ratio and "val" not in description["splits"]:
            logger.warning(
                "none of the %d samples of %s is in the val split (val_ratio %g), so evaluate has no test images; "
                "make more images, or %s",
                sum(row["samples"] for row in rows), run.path, self.val_ratio, split_again(run),
            )  # fmt: skip
        write_bytes(folder / "README.md", dataset_card(description).encode())
        for note in folder.glob("*.failed.json"):  # of a shard that was made since, by a worker that was killed then
            note.unlink(missing_ok=True)

    def describe(self, run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``dataset.json`` holds."""
        folder = run.folder("shards")
        counted = {split: count_split(folder, [row for row in rows if row["split"] == split]) for split in _INDEXES}
        splits = {split: counts for split, (counts, _) in counted.items() if counts["samples"]}
        prompts = prompt_figures(*(prompts for _, prompts in counted.values()))
        classes = self.classes(run)
        members = [self.image_format, "txt", "json"] + ["mask.png"] * self.masks + ["cls"] * bool(classes)
        return {
            "schema_version": SCHEMA_VERSION,
            "name": run.path.resolve().name,
            "seed": run.seed,
            **source_of(run),
            "made_by": run.artifact("images")["stage"],
            "members": sorted(members),
            "settings": self.settings(),
            "made_from": {name: run.artifact(name)["settings"] for name in self.reads},
            "made_with": {name: run.artifact(name).get("versions", {}) for name in self.reads},
            "classes": classes,
            "splits": splits,
            "prompts": prompts,
            "shards": rows,
            "versions": versions(),
        }


@functools.lru_cache(maxsize=4)
def _layout(stage: Shards, run: Run, stamp: str) -> tuple[Shard, ...]:
    claimed = run.claimed.get("shards")
    return lay_out(
        run,
        stage.samples_per_shard,
        val_ratio=stage.val_ratio,
        shuffle=stage.shuffle,
        units=stage._units if claimed else None,
        content=claimed["inputs"]["units of images"] if claimed else "",
    )


# -- one shard


class Packer:
    """Writes shards; made once a worker."""

    def __init__(self, stage: Shards, run: Run) -> None:
        self.stage, self.run = stage, run
        self.fingerprint = run.artifact("shards")["fingerprint"]
        self.source = source_of(run)
        self.verified: set[tuple[str, int]] = set()  # units that have their sha256: val looks at all of them again
        self.classes = {label: number for number, label in enumerate(stage.classes(run))}

    def pack(self, shard: Shard, tick: Callable[[int], None]) -> None:
        """Write the tar, its parquet, and last the ``_stats.json`` that says both are whole.

        Raises:
            MissingArtifact, CorruptFile: a sample's image or masks are not there, or not readable.
            StorageError: the disk is full or the folder may not be written to.
        """
        columns = {name: Column(self.run, name, self.verified) for name in self.stage.reads}
        path = self.run.folder("shards") / shard.file
        mark = path.with_name(f"{path.stem}_stats.json")
        try:
            mark.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(mark, error) from error
        started, rows = time.time(), []
        with TarWriter(path) as tar:
            for key in self.words_first(shard.keys, columns):
                members, row = self.sample(key, columns)
                tar.add(key, members)
                rows.append(row)
                tick(1)
        write_bytes(path.with_suffix(".parquet"), parquet_bytes(rows, masks=self.stage.masks))
        ended = time.time()
        stats = {"count": tar.count, "successes": tar.count, "failed": 0, "status_dict": {"success": tar.count}}
        times = {"duration": round(ended - started, 3), "start_time": started, "end_time": ended}
        whole = {"bytes": tar.size, "sha256": tar.sha256, "fingerprint": self.fingerprint, "version": __version__}
        write_json(mark, stats | times | whole)

    def words_first(self, keys: Sequence[str], columns: Mapping[str, Column]) -> list[str]:
        """The keys, one that has words (and a mask that is not empty, where there are masks) in front.

        Readers infer the type of a JSON list from the first samples. Nothing moves unless the first one has none,
        which is rare.
        """
        first = next((number for number, key in enumerate(keys) if _has_all_lists(key, columns)), 0)
        return [keys[first], *keys[:first], *keys[first + 1 :]]

    def sample(self, key: str, columns: Mapping[str, Column]) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The members of a sample, and its row of the parquet."""
        image = columns["images"].read(key)
        request, pixels, warnings = codecs.decode_image(key, image)
        prompt = request.prompt
        meta = {
            "key": key,
            **codecs.prompt_to_json(prompt),
            "seed": request.seed,
            "source": request.source,
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            **self.source,
            "warnings": "; ".join(warnings),
        }
        row: dict[str, Any] = dict(meta)
        members = {self.stage.image_format: self.encode(image["png"], pixels), "txt": prompt.text.encode()}
        if "masks" in columns:
            masks = codecs.decode_masks(key, columns["masks"].read(key))
            if masks.words != prompt.words or masks.values.shape[1:] != pixels.shape[:2]:
                raise CorruptFile(
                    f"the masks of sample {key} do not fit its image; "
                    f"delete {self.run.tar('masks', unit_of(key))} and run: {self.run.remedy('masks')}"
                )
            members["mask.png"] = encode_png(codecs.masks_to_labels(masks.values))
            meta["masks"] = described = describe_masks(masks, instances=self.stage.instances)
            row |= {f"mask_{name}": [mask[name] for mask in described] for name in MASK_COLUMNS}
        if self.classes:
            if prompt.label not in self.classes:
                prompts = self.run.path / "prompts.jsonl"
                raise CorruptFile(f"sample {key} has the label {prompt.label!r}, which is not in {prompts}")
            members["cls"] = str(self.classes[prompt.label]).encode()
        members["json"] = json.dumps(meta, ensure_ascii=False).encode()
        return members, row | {"status": "success", "error": ""}

    def encode(self, png: bytes, pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
        """The image in the format of the shards; a PNG stays as it is."""
        if self.stage.image_format == "png":
            return png
        if self.stage.image_format == "jpg":
            return encode_jpeg(pixels, self.stage.quality)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="WEBP", quality=self.stage.quality)
        return buffer.getvalue()


def _has_all_lists(key: str, columns: Mapping[str, Column]) -> bool:
    """Whether no list in the JSON of a sample is empty."""
    if "masks" in columns:
        masks = codecs.decode_meta(key, columns["masks"].read(key, "json"))
        return "" in masks.get("dropped", ()) or (bool(masks.get("words")) and not masks.get("dropped"))
    return bool(codecs.decode_meta(key, columns["images"].read(key, "json")).get("words"))


# -- what shards say of themselves


def _stats(run: Run, shard: Shard) -> dict[str, Any] | None:
    """The commit mark of a shard, or None where it is not done."""
    path = run.folder("shards") / shard.file
    try:
        return checked_mark(read_json(read_file(path.with_name(f"{path.stem}_stats.json"))))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _done(run: Run, shard: Shard, fingerprint: str) -> bool:
    path, stats = run.folder("shards") / shard.file, _stats(run, shard)
    return (
        stats is not None
        and stats["fingerprint"] == fingerprint
        and path.is_file()
        and path.stat().st_size == stats["bytes"]
        and path.with_suffix(".parquet").is_file()
    )


def _row(run: Run, shard: Shard) -> dict[str, Any]:
    stats = _stats(run, shard)
    if stats is None:  # it was there a moment ago
        raise MissingArtifact(f"{run.folder('shards') / shard.file} is not finished; run the same command again")
    counts = {"samples": stats["count"], "bytes": stats["bytes"], "sha256": stats["sha256"]}
    return {"file": shard.file, "split": shard.split, **counts}


def source_of(run: Run) -> dict[str, str]:
    """Which backbone made the images (or looked at them), which model it ran, and what may be done with them."""
    images = run.artifact("images")
    backbone = images["settings"].get("backbone") or {}
    name, made = str(backbone.get("name", "")), images["stage"] != "attend"
    licence = BACKBONES.load(name).licence if made and name in BACKBONES.names() else _FOREIGN
    return {"backbone": name, "model": str(backbone.get("model") or name), "licence": licence}


def _label(data: bytes, path: Path) -> str:
    try:
        label = read_json(data)["label"]
    except (ValueError, LookupError, TypeError):
        raise CorruptFile(f"the labels in {path} cannot be read; delete it and run the stage that made it") from None
    return label if isinstance(label, str) else ""


def _classes(run: Run, units: Collection[int] | None) -> list[str]:
    """The labels in the order of the run's prompts (of these units, where there are none); none where one has none."""
    path = run.path / "prompts.jsonl"
    if path.is_file():
        labels = (_label(line, path) for line in iter_lines(path))
    else:
        tars = (run.tar("images", unit) for unit in sorted(units or run.units("images")))
        labels = (_label(members.get("json", b""), tar) for tar in tars for _, members in read_tar(tar, {"json"}))
    found: dict[str, None] = {}
    for label in labels:
        if not label:
            return []
        found[label] = None
    return list(found)
