"""The images that an evaluation reads: what is known of them without decoding any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from synthgen.config import Choice
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.run import Run, digest
from synthgen.stages._eval_rows import generator_choice
from synthgen.stages._integrity import check_shards_exist
from synthgen.stages._layout import repack_advice
from synthgen.stores import parse_location, walk_files
from synthgen.stores.remote import RemotePath
from synthgen.text import counted
from synthgen.untrusted import MAX_BYTES, read_file, read_json

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset
    from synthgen.evaluators import Need

__all__ = [
    "MissingInput",
    "Source",
    "generator_files",
    "masks_hash",
    "missing_split",
    "open_source",
    "scene_samples",
    "source_hash",
    "split_hash",
    "used_samples",
]

_REMEDIES = {  # attribute of Source → what an image lacks, and what to give instead
    "labels": ("a label", "tars with cls (or label in json), or a folder with a subfolder for each class"),
    "captions": ("a text", "tars with txt (or captions in json), or a folder with captions beside its images"),
    "masked": ("masks", "tars with mask.png and json (words)"),
    "masked_or_boxed": ("masks or boxes", "tars with boxes in their json, or with mask.png and json (words)"),
}


class MissingInput(ConfigError):
    """An evaluator lacks what it needs: an encoder, or images of the right kind."""


class Source:
    """The images of one tar, pattern or folder; attributes that map or list samples do so by their number."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path  # the name is that of the setting: train, or test
        self.samples = self.open(masks=True)

    def open(self, *, masks: bool) -> ImageDataset:
        """The samples; masks take time to decode."""
        from synthgen.datasets import FolderDataset, open_captioned, open_dataset

        samples = open_dataset(self.path, masks=masks)
        return open_captioned(self.path) if isinstance(samples, FolderDataset) else samples

    @cached_property
    def labels(self) -> dict[int, str]:
        """The class of each sample that has one."""
        labels = ((number, self.samples.label(number)) for number in range(len(self.samples)))
        return {number: label for number, label in labels if label is not None}

    @cached_property
    def captions(self) -> dict[int, tuple[str, ...]]:
        """The texts of each sample that has some."""
        captions = ((number, self.samples.captions(number)) for number in range(len(self.samples)))
        return {number: texts for number, texts in captions if texts}

    @cached_property
    def masked(self) -> tuple[int, ...]:
        """The samples with masks."""
        from synthgen.datasets import ShardDataset

        if not isinstance(self.samples, ShardDataset):
            return ()
        return tuple(number for number in range(len(self.samples)) if self.samples.mask_member(number))

    @cached_property
    def masked_or_boxed(self) -> tuple[int, ...]:
        """The samples with masks or with boxes of their own."""
        masked = set(self.masked)
        return tuple(number for number in range(len(self.samples)) if number in masked or self.samples.boxes(number))

    @cached_property
    def places(self) -> frozenset[str]:
        """Its tars, or its folder of images."""
        from synthgen.datasets.sources import tars_of

        paths = tars_of(self.path) or [parse_location(self.path)]
        return frozenset(str(path if isinstance(path, RemotePath) else path.resolve()) for path in paths)

    def require(self, kind: Literal["labels", "captions", "masked", "masked_or_boxed"]) -> None:
        """Check that there are samples of that kind.

        Raises:
            MissingInput: there are none.
        """
        if not getattr(self, kind):
            lacking, remedy = _REMEDIES[kind]
            raise MissingInput(f"no image of {self.path} has {lacking}; give --{self.name} {remedy}")

    def require_shared_class(self, train: Source, *, same_run: bool) -> None:
        """Check that at least one class also occurs in the training images.

        Raises:
            MissingInput: none does; in shards of the same run because classes have too few images, not because their
                names differ.
        """
        known, asked = (Counter(source.labels.values()) for source in (train, self))
        if known & asked:
            return
        most = max((known + asked).values())
        if same_run or most == 1:
            each = f"{'at most ' * (most > 1)}{counted(most, 'images')}"
            raise MissingInput(
                f"training and test images share no class: each of the {len(known + asked)} classes has {each}; "
                "generate more of each (--images-per-prompt) and pack new shards, or give --train and --test"
            )
        few = [", ".join([*sorted(classes)[:4], *["..."] * (len(classes) > 4)]) for classes in (known, asked)]
        raise MissingInput(
            f"training and test images share no class: {few[0]} against {few[1]}; their names must agree"
        )


def open_source(name: str, path: str, content: str = "") -> Source:
    """A source; the same one for the same arguments, so that each sample's json is read once.

    Args:
        name: train, or test.
        path: tar, pattern or folder.
        content: its :func:`source_hash`, if that is known.

    Raises:
        MissingArtifact, CorruptFile: it is not there, holds nothing, or cannot be read.
    """
    return _open_source(name, path, content or source_hash(path))


@lru_cache(maxsize=4)
def _open_source(name: str, path: str, content: str) -> Source:
    return Source(name, path)


def scene_samples(source: Source, needs: Collection[Need]) -> tuple[int, ...]:
    """The samples for evaluators of pixels and boxes: if any of them needs pixels, only those with masks."""
    if "patches" in needs:
        return source.masked
    return source.masked_or_boxed if "boxes" in needs else ()


def used_samples(source: Source, needs: Collection[Need]) -> tuple[int, ...]:
    """The samples that evaluators with these needs use."""
    from synthgen.evaluators import OF_LABELLED

    used = set(scene_samples(source, needs))
    if OF_LABELLED & set(needs):
        used |= source.labels.keys()
    if "pairs" in needs and source.name == "test":
        used |= source.captions.keys()
    return tuple(sorted(used))


def missing_split(run: Run, split: str, option: str) -> MissingArtifact:
    """The error that the run's shards have no such split, with the reason and what to do."""
    entry, samples = run.find_artifact("shards"), _split_sizes(run)
    if entry is None or not samples or split in samples:
        return MissingArtifact(
            f"{run.path} has no shards/{split}; first run: {run.remedy('shards')}, or give --{option}"
        )
    ratio, count = entry["settings"].get("val_ratio", 0), counted(sum(samples.values()), "images")
    why = f"got none of the {count} (val_ratio {ratio:g}); make more images" if ratio else "is empty (val_ratio 0)"
    return MissingArtifact(f"the {split} split of {run.path} {why}, or {repack_advice(run)}, or give --{option}")


def _split_sizes(run: Run) -> dict[str, int]:
    """The number of samples of each split in ``dataset.json``; empty if it is missing or cannot be read."""
    try:
        splits = read_json(read_file(run.folder("shards") / "dataset.json"), MAX_BYTES)["splits"]
        return {name: int(split["samples"]) for name, split in splits.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


# -- hashes that identify images and masks, without reading any


def source_hash(source: str) -> str:
    """Of the name and size of each file and, on this machine, its modification time; not of the content.

    The content may be hundreds of GB. A corrected label seldom changes the size, hence the time.
    """
    from synthgen.datasets import source_inputs
    from synthgen.datasets.sources import tars_of

    place = parse_location(source)
    if isinstance(place, RemotePath):
        return digest(list(source_inputs(source).values()))
    # with their folders, which may be the labels
    files = tars_of(source) or sorted(file for file in walk_files(place) if file.is_file())
    return digest([_file_state(file) for file in files])


def _file_state(file: Path) -> list[str | int]:
    state = file.stat()
    return [file.as_posix(), state.st_size, state.st_mtime_ns]


def generator_files(generator: Choice) -> dict[str, str]:
    """The options of a generator that name a file or folder of this machine, not a short name or a hub id."""
    options = generator_choice(generator).options
    given = {name: options.get(name, "") for name in ("model", "lora", "textual_inversion")}
    return {name: path for name, path in given.items() if path and Path(path).exists()}


def split_hash(run: Run, split: str) -> str:
    """Of the sha256 that ``dataset.json`` lists for each tar of a split of the run; of an unlisted tar, of its size.

    Raises:
        MissingArtifact, CorruptFile: see :func:`~synthgen.stages._integrity.check_shards_exist`.
    """
    listed, sizes = check_shards_exist(run, split)
    return digest([[name, listed.get(name, size)] for name, size in sorted(sizes.items()) if name.endswith(".tar")])


def masks_hash(run: Run) -> str:
    """Of the settings of the run's masks and of the sha256 of each finished unit.

    Raises:
        MissingArtifact: there are none.
    """
    units = sorted((unit, str(mark["sha256"])) for unit, mark in run.iter_marks("masks"))
    return digest([run.artifact("masks")["fingerprint"], units])
