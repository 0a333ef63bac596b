"""Pack the samples of many units into training tars, with indexes and a dataset card. docs/format.md has the layout."""

from __future__ import annotations

import functools
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from synthgen.config import check_range
from synthgen.entries import failure_files
from synthgen.errors import CorruptFile, MissingArtifact, StaleArtifact
from synthgen.image import encode_jpeg, encode_png
from synthgen.mask_shape import describe_masks
from synthgen.records import Report
from synthgen.rejected import FILTER, count_rejected, read_rejected
from synthgen.run import Run, digest, versions
from synthgen.stages import Stage, Work, Worker, runtime_field
from synthgen.stages._classes import classes_of
from synthgen.stages._layout import Shard, lay_out, repack_advice
from synthgen.stages._units import content_hash, need_masks
from synthgen.stores import listing
from synthgen.stores.tar import TarWriter, storage_error, write_bytes, write_json
from synthgen.units import validate_mark
from synthgen.untrusted import MAX_BYTES, read_file, read_json

__all__ = ["Shards"]

logger = logging.getLogger(__name__)

_FOREIGN = "The images were not made here: the licence of where they come from holds for them."
_INDEXES = {"train": "index.json", "val": "index-val.json"}  # split → its wids index


@dataclass(frozen=True)
class Shards(Stage):
    """Join image, text, masks, label and metadata of each sample, and pack many units into one tar.

    Units are small, so that a killed run loses little; training reads best from large tars. The split of a sample
    depends only on the run's seed and its key. Equal inputs and settings give equal bytes.
    """

    name: ClassVar = "shards"
    writes: ClassVar = ("shards",)
    uses: ClassVar = (FILTER,)

    samples_per_shard: int = 1000
    val_ratio: float = 0.05  # share of the samples that go to val; 0: no val split
    shuffle: bool = True  # mix the order of units, and of the samples of a shard
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = 95  # of jpg and webp, 1 to 100; png is without loss
    masks: bool = True  # False: no mask.png, and the masks stage need not have run
    instances: bool = True  # the json lists the separate objects of a mask; False: each mask is one
    filtered: bool = True  # leave out the samples that the filter stage rejected; without that stage, none
    _units: frozenset[int] | None = runtime_field()  # the image units to pack; later ones go into no shard of this call
    _rejected: dict[str, str] | None = runtime_field()  # the samples that are left out, whatever is filtered meanwhile
    _labels: list[str] | None = runtime_field()  # the classes, so that workers need not read every json

    def __post_init__(self) -> None:
        check_range(ge=1, samples_per_shard=self.samples_per_shard)
        check_range(ge=0, lt=1, val_ratio=self.val_ratio)
        check_range(ge=1, le=100, quality=self.quality)
        if self.image_format not in ("jpg", "png", "webp"):
            raise ValueError(f"image_format must be jpg, png or webp, not {self.image_format!r}")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Images and masks; with ``masks=false`` images only."""
        return ("images", "masks") if self.masks else ("images",)

    def inputs(self, run: Run) -> dict[str, str]:
        """The content of the existing units, so that shards of other units have another fingerprint.

        Raises:
            MissingArtifact: some images have no masks yet, or were not filtered yet.
            StaleArtifact: a unit was made with other settings than those of its artifact.
            CorruptFile: see :func:`~synthgen.stages._units.content_hash`.
        """
        units = run.units("images")
        found = {"units of images": content_hash(run, "images", units)}
        if self.masks:
            need_masks(run, units, otherwise=", or leave masks out with --set masks=false")
            found["units of masks"] = content_hash(run, "masks", units)
        if rejected := self.rejected(run):
            found["rejected samples"] = digest(rejected)
        return found

    def rejected(self, run: Run) -> dict[str, str]:
        """The samples to leave out, each with its reason.

        Raises:
            MissingArtifact, StaleArtifact, CorruptFile: see :func:`~synthgen.rejected.read_rejected`.
        """
        if self._rejected is not None:
            return self._rejected
        return read_rejected(run) if self.filtered else {}

    def prepare(self, run: Run) -> Self:
        """Fix which units are packed, and list the classes: for attended images this reads every json.

        Raises:
            CorruptFile: a label cannot be read.
            StaleArtifact: the units or the rejected samples have changed since :meth:`inputs`.
        """
        rejected = self.rejected(run)
        if (digest(rejected) if rejected else None) != run.claimed["shards"]["inputs"].get("rejected samples"):
            raise StaleArtifact(f"{run.path} was filtered again since this command started; run it again")
        stage = self.with_runtime(_units=frozenset(run.units("images")), _rejected=rejected)
        stage.layout(run)
        return stage.with_runtime(_labels=classes_of(run, stage._units))

    def classes(self, run: Run) -> list[str]:
        """The labels in the order of their numbers; none if a sample may have no label."""
        return classes_of(run, self._units) if self._labels is None else self._labels

    def layout(self, run: Run) -> Sequence[Shard]:
        """Every shard with its samples, from the done marks of all image units; cached until a unit is added.

        In a claimed run (see :meth:`Run.claim`) it is the same in every process, even if units are added meanwhile.

        Raises:
            MissingArtifact, CorruptFile, StaleArtifact: see :func:`~synthgen.stages._layout.lay_out`.
        """
        if "shards" in run.claimed:  # its fingerprint covers the content of all units
            return _layout(self, run, run.claimed["shards"]["fingerprint"])
        return _layout(self, run, digest([sorted(listing(run.folder("images"))), self.rejected(run)]))

    def plan(self, run: Run) -> list[int]:
        """Unit n is the n-th shard of the layout: train first, then val."""
        return list(range(len(self.layout(run))))

    def num_units(self, run: Run) -> int:
        """How many shards there are; of finished ones as ``dataset.json`` lists them."""
        try:
            listed = read_json(read_file(run.folder("shards") / "dataset.json"), MAX_BYTES)["shards"]
        except (OSError, ValueError, LookupError, TypeError):
            listed = None
        return len(listed) if isinstance(listed, list) else len(self.plan(run))

    def size(self, run: Run, unit: int) -> int:
        """How many samples the shard holds."""
        return len(self.layout(run)[unit])

    def done(self, run: Run, unit: int) -> bool:
        """Whether a shard has its tar, parquet and ``_stats.json``, with the present settings."""
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
            packer.pack(shards[unit], worker.progress.advance)
            run.clear_failure(self, unit)
            return Report(unit, len(shards[unit]))

        yield work

    def finish(self, run: Run) -> None:
        """Write the files that describe all shards: sizes, wids indexes, ``dataset.json`` and the card."""
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
                sum(row["samples"] for row in rows), run.path, self.val_ratio, repack_advice(run),
            )  # fmt: skip
        write_bytes(folder / "README.md", dataset_card(description).encode())
        for path in failure_files(folder):  # a worker was killed before it removed them
            path.unlink(missing_ok=True)

    def describe(self, run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of ``dataset.json``."""
        folder = run.folder("shards")
        counted = {split: count_split(folder, [row for row in rows if row["split"] == split]) for split in _INDEXES}
        splits = {split: counts for split, (counts, _) in counted.items() if counts["samples"]}
        prompts = prompt_figures(*(prompts for _, prompts in counted.values()))
        classes = self.classes(run)
        members = [self.image_format, "txt", "json"] + ["mask.png"] * self.masks + ["cls"] * bool(classes)
        rejected = self.rejected(run)
        sources = (*self.reads, *([FILTER] if rejected else []))
        return {
            "schema_version": SCHEMA_VERSION,
            "name": run.path.resolve().name,
            "seed": run.seed,
            **source_of(run),
            "made_by": run.artifact("images")["stage"],
            "members": sorted(members),
            "settings": self.settings(),
            "made_from": {name: run.artifact(name)["settings"] for name in sources},
            "made_with": {name: run.artifact(name).get("versions", {}) for name in sources},
            "classes": classes,
            "splits": splits,
            "prompts": prompts,
            "rejected": count_rejected(rejected.values()),
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
        rejected=stage.rejected(run),
        units=stage._units if claimed else None,
        content=claimed["inputs"]["units of images"] if claimed else "",
    )


# -- one shard


class Packer:
    """Writes shards; each worker has one."""

    def __init__(self, stage: Shards, run: Run) -> None:
        self.stage, self.run = stage, run
        self.fingerprint = run.artifact("shards")["fingerprint"]
        self.source = source_of(run)
        self.verified: set[tuple[str, int]] = set()  # units whose sha256 was checked: val reads them all again
        self.classes = {label: number for number, label in enumerate(stage.classes(run))}

    def pack(self, shard: Shard, advance: Callable[[int], None]) -> None:
        """Write the tar, its parquet, and last the ``_stats.json`` that marks both as complete.

        Raises:
            MissingArtifact, CorruptFile: a sample's image or masks are missing or damaged.
            StaleArtifact: another command has given the folder other settings.
            StorageError: the disk is full or the folder may not be written to.
        """
        columns = {name: Column(self.run, name, self.verified) for name in self.stage.reads}
        path = self.run.folder("shards") / shard.file
        mark = path.with_name(f"{path.stem}_stats.json")
        started, rows = time.time(), []
        with TarWriter(path) as tar:
            for key in self.words_first(shard.keys, columns):
                members, row = self.sample(key, columns)
                tar.add(key, members)
                rows.append(row)
                advance(1)
            self.run.ensure_settings("shards", self.run.artifact("shards"))
            try:
                mark.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(mark, error) from error
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
        """The image in the format of the shards; a PNG is unchanged."""
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


# -- descriptions of shards


def _stats(run: Run, shard: Shard) -> dict[str, Any] | None:
    """The ``_stats.json`` of a shard, or None if it is not done."""
    path = run.folder("shards") / shard.file
    try:
        return validate_mark(read_json(read_file(path.with_name(f"{path.stem}_stats.json"))))
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
    if stats is None:  # another command has removed it
        raise MissingArtifact(f"{run.folder('shards') / shard.file} is not finished; run the same command again")
    counts = {"samples": stats["count"], "bytes": stats["bytes"], "sha256": stats["sha256"]}
    return {"file": shard.file, "split": shard.split, **counts}


def source_of(run: Run) -> dict[str, str]:
    """The backbone and model that made (or attended) the images, and the licence of the images."""
    images = run.artifact("images")
    backbone = images["settings"].get("backbone") or {}
    name, made = str(backbone.get("name", "")), images["stage"] != "attend"
    licence = BACKBONES.load(name).licence if made and name in BACKBONES.names() else _FOREIGN
    return {"backbone": name, "model": str(backbone.get("model") or name), "licence": licence}
