"""Export the masked samples of a run as COCO, YOLO or label images; docs/format.md has the layouts."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthgen import __version__, codecs
from synthgen.config import dump
from synthgen.errors import ConfigError, CorruptFile, StaleArtifact
from synthgen.export.formats import WRITERS, Export, Sample
from synthgen.rejected import read_rejected
from synthgen.run import Run, digest
from synthgen.runner import Progress, Summary
from synthgen.stages._units import content_hash, need_masks
from synthgen.stages.shards import source_of
from synthgen.stores import parse_location, temporaries
from synthgen.stores.tar import is_abandoned, read_tar, write_bytes, write_json
from synthgen.untrusted import read_file, read_json

__all__ = ["Export", "export_dataset"]

_MARK = "export.json"  # written first: identifies the export, so that two are never mixed in a folder
_SOURCES = "sources.csv"  # the original names of images from the stage attend


def export_dataset(
    run: Run, settings: Export, folder: Path | None = None, *, progress: Progress | None = None
) -> Summary:
    """Write the samples of a run to ``folder`` (by default ``RUN/export-FORMAT``); existing files are kept.

    Raises:
        MissingArtifact: there are no masks, or some images have none.
        StaleArtifact: the folder contains an export of other masks, or with other settings.
        ConfigError: the folder contains something else.
        CorruptFile: a sample cannot be read, or its masks do not fit its image.
        StorageError: the disk is full or the folder cannot be written to.
    """
    progress = progress or Progress()
    settings = settings.complete(run)
    folder = parse_location(folder) if folder else run.path / f"export-{settings.format}"
    units = run.units("images")
    need_masks(run, units)
    rejected = read_rejected(run) if settings.filtered else {}
    entry = _entry(run, settings, units, rejected)
    _check(folder, entry)
    writer = WRITERS[settings.format](run, settings, folder, _names(run, units))
    kept = {unit: [key for key in run.keys("images", unit) if key not in rejected] for unit in units}
    todo = [unit for unit in units if not writer.has_unit(unit, kept[unit])]
    summary = Summary("export", len(units), len(units) - len(todo))
    if writer.is_finished and not todo:
        writer.tidy()
        return summary
    if not (folder / _MARK).is_file():
        write_json(folder / _MARK, entry)
    sizes = {unit: len(keys) for unit, keys in kept.items()}
    total, started, notes = sum(sizes.values()), time.perf_counter(), Counter[str]()
    progress.start("export", total, total - sum(sizes[unit] for unit in todo))

    def count(samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield sample
            num_masks = int(sample.masks.values.any(axis=(1, 2)).sum())
            notes.update({"masks": num_masks, "dropped": len(sample.masks.words) - num_masks})
            summary.samples += 1
            progress.advance(1)

    try:
        for unit in todo:
            writer.write(unit, count(_samples(run, unit, rejected)))
        _write_sources(run, units, folder, rejected)
        writer.finish(units)
        writer.tidy()
    finally:
        progress.stop()
    for leftover in temporaries(folder):
        if is_abandoned(leftover):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    summary.seconds, summary.notes = time.perf_counter() - started, dict(notes)
    return summary


# -- the samples to export, and the state of the folder


def _samples(run: Run, unit: int, rejected: Collection[str]) -> Iterator[Sample]:
    found = dict(run.read("masks", unit))
    for key, members in run.read("images", unit):
        if key in rejected:
            continue
        request, pixels, _ = codecs.decode_image(key, members)
        masks = codecs.decode_masks(key, found[key]) if key in found else None
        if masks is None or masks.words != request.prompt.words or masks.values.shape[1:] != pixels.shape[:2]:
            raise CorruptFile(
                f"the masks of sample {key} do not fit its image",
                f"delete {run.tar('masks', unit)} and run: {run.remedy('masks')}",
            )
        yield Sample(key, request.prompt, members["png"], pixels, masks)


def _write_sources(run: Run, units: Sequence[int], folder: Path, rejected: Collection[str]) -> None:
    """For images from the stage attend, write each image's key and its original name."""
    if run.artifact("images")["stage"] != "attend":
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("key", "source"))
    for unit in units:
        for key, members in read_tar(run.tar("images", unit), names={"json"}):
            if key not in rejected:
                table.writerow((key, str(codecs.decode_meta(key, members).get("source", ""))))
    write_bytes(folder / _SOURCES, text.getvalue().encode())


def _names(run: Run, units: Sequence[int]) -> list[str]:
    """Every marked word of the run once, sorted."""
    names: set[str] = set()
    for unit in units:
        for key, members in read_tar(run.tar("masks", unit), names={"json"}):
            names.update(codecs.decode_meta(key, members)["words"])
    return sorted(names)


def _entry(run: Run, settings: Export, units: Sequence[int], rejected: Mapping[str, str]) -> dict[str, Any]:
    """The contents of ``export.json``."""
    inputs = {f"units of {name}": content_hash(run, name, units) for name in ("images", "masks")}
    if rejected:
        inputs["rejected samples"] = digest(rejected)
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
    """Check that the folder is empty, or has an export of the same samples with the same settings."""
    try:
        before = read_json(read_file(folder / _MARK))
        same, old = before["fingerprint"] == entry["fingerprint"], {**before["settings"], **before["inputs"]}
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise ConfigError(f"{folder} was not written by synthgen export; choose another --out") from None
        return
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{folder / _MARK} cannot be read; delete {folder} or choose another --out") from None
    if not same:
        changes = [f"{name} is {value!r} and was {old.get(name)!r}" for name, value in entry["settings"].items()
                   if old.get(name) != value]  # fmt: skip
        changes += [f"the {name} have changed" for name, value in entry["inputs"].items() if old.get(name) != value]
        raise StaleArtifact(
            f"{folder} was exported differently: {'; '.join(changes) or 'from another run'}; "
            f"choose another --out, or delete {folder} to export again"
        )
