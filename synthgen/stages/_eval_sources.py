"""The images that an encoder is judged on, and the masks that are: what is known of them, without decoding any."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthgen.codecs import decode_masks, decode_meta
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.records import WordMasks
from synthgen.run import Run, digest
from synthgen.stages._integrity import check_there
from synthgen.stages._layout import split_again
from synthgen.stores import parse_location, walk_files
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import read_tar
from synthgen.text import counted
from synthgen.untrusted import MAX_BYTES, read_file, read_json

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset
    from synthgen.evaluators import Need
    from synthgen.stages.evaluate import Evaluate

__all__ = [
    "MissingInput",
    "Source",
    "looked_at",
    "masks_to_judge",
    "missing_split",
    "open_source",
    "placed",
    "spread_out",
    "stamp_of",
    "stamps",
    "thinned",
]


class MissingInput(ConfigError):
    """Images, or an encoder, are not of the kind that an evaluator needs."""


class Source:
    """Labelled, masked or captioned images of one tar, pattern or folder."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.samples = self.open(masks=True)

    def open(self, *, masks: bool) -> ImageDataset:
        """The samples; masks cost time to decode."""
        from synthgen.datasets import FolderDataset, open_captioned, open_dataset

        samples = open_dataset(self.path, masks=masks)
        return open_captioned(self.path) if isinstance(samples, FolderDataset) else samples

    @cached_property
    def labels(self) -> dict[int, str]:
        """The class of each sample that has one."""
        found = ((number, self.samples.label(number)) for number in range(len(self.samples)))
        return {number: label for number, label in found if label is not None}

    @cached_property
    def captions(self) -> dict[int, tuple[str, ...]]:
        """What is said of each sample of which something is said."""
        found = ((number, self.samples.captions(number)) for number in range(len(self.samples)))
        return {number: texts for number, texts in found if texts}

    @cached_property
    def masked(self) -> tuple[int, ...]:
        """The samples with masks."""
        from synthgen.datasets import ShardDataset

        if not isinstance(self.samples, ShardDataset):
            return ()
        return tuple(number for number in range(len(self.samples)) if self.samples.mask_member(number))

    @cached_property
    def boxed(self) -> tuple[int, ...]:
        """The samples without masks that give boxes themselves."""
        masked = set(self.masked)
        return tuple(n for n in range(len(self.samples)) if n not in masked and self.samples.boxes(n))

    def need_labels(self) -> None:
        """See that there are some.

        Raises:
            MissingInput: there are none.
        """
        if not self.labels:
            raise MissingInput(
                f"no image of {self.path} has a label; give --{self.name} tars with cls (or label in json), "
                "or a folder with a subfolder for each class"
            )

    def need_classes_of(self, train: Source, *, same_run: bool) -> None:
        """See that some class of these is known from training images.

        Raises:
            MissingInput: none is; in shards of the same run names agree, and classes have too few images.
        """
        known, asked = (Counter(source.labels.values()) for source in (train, self))
        if not known & asked:
            most = max((known + asked).values())
            if same_run or most == 1:
                each = (
                    f"each of the {len(known + asked)} classes has {'at most ' * (most > 1)}{counted(most, 'images')}"
                )
                raise MissingInput(
                    f"training and test images share no class, for {each}; make more of each in another run "
                    "(generate takes --images-per-prompt), or give --train and --test"
                )
            few = [", ".join(sorted(classes)[:4]) for classes in (known, asked)]
            raise MissingInput(
                f"training and test images share no class: {few[0]}, ... against {few[1]}, ...; their names must agree"
            )

    def need_masks(self) -> None:
        """See that there are some.

        Raises:
            MissingInput: there are none.
        """
        if not self.masked:
            raise MissingInput(
                f"no image of {self.path} has masks; give --{self.name} tars with mask.png and json (words)"
            )

    def need_boxes(self) -> None:
        """See that there are some, or masks, which have boxes round them.

        Raises:
            MissingInput: there are none.
        """
        if not self.masked and not self.boxed:
            raise MissingInput(
                f"no image of {self.path} has masks or boxes; give --{self.name} tars with boxes in their json, "
                "or with mask.png and json (words)"
            )

    def need_captions(self) -> None:
        """See that there are some.

        Raises:
            MissingInput: there are none.
        """
        if not self.captions:
            raise MissingInput(
                f"no image of {self.path} has a text; give --{self.name} tars with txt (or captions in json), "
                "or a folder with captions beside its images"
            )


def open_source(name: str, path: str, stamp: str = "") -> Source:
    """A source; asked for again it is the same object, so that each sample's json is read once.

    Args:
        name: train, or test.
        path: tar, pattern or folder.
        stamp: what :func:`stamp_of` says of it, where that is known.

    Raises:
        MissingArtifact, CorruptFile: it is not there, holds nothing, or cannot be read.
    """
    return _opened(name, path, stamp or stamp_of(path))


@lru_cache(maxsize=4)
def _opened(name: str, path: str, stamp: str) -> Source:
    return Source(name, path)


def missing_split(run: Run, split: str, option: str) -> MissingArtifact:
    """The error that the run's shards have no such split: why, and what helps."""
    entry, samples = run.find_artifact("shards"), _samples_of_splits(run)
    if entry is None or not samples or split in samples:
        return MissingArtifact(
            f"{run.path} has no shards/{split}; first run: {run.remedy('shards')}, or give --{option}"
        )
    ratio, count = entry["settings"].get("val_ratio", 0), counted(sum(samples.values()), "images")
    why = f"got none of the {count} (val_ratio {ratio:g}); make more images" if ratio else "is empty (val_ratio 0)"
    return MissingArtifact(f"the {split} split of {run.path} {why}, or {split_again(run)}, or give --{option}")


def _samples_of_splits(run: Run) -> dict[str, int]:
    """The samples of each split, by ``dataset.json``; empty where it is not there or cannot be read."""
    try:
        splits = read_json(read_file(run.folder("shards") / "dataset.json"), MAX_BYTES)["splits"]
        return {name: int(split["samples"]) for name, split in splits.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def stamps(stage: Evaluate, run: Run, sources: Mapping[str, Source]) -> dict[str, str]:
    """What tells the images and masks of an evaluation from others, without reading any.

    Of the run's own that is what was noted when they were written; of others see :func:`stamp_of`.

    Raises:
        MissingArtifact, CorruptFile: they are not there, or what was noted of them cannot be read.
    """
    found, splits = {}, stage.splits(run)
    for name, source in sources.items():
        own = partial(_stamp_of_shards, run, splits[name])
        found[name] = stage.stamp(source.path) if getattr(stage, name) else stage.once(("shards", splits[name]), own)
    if stage.truth:
        found["truth"] = stage.stamp(stage.truth)
        own = partial(_stamp_of_masks, run)
        found["predicted"] = stage.stamp(stage.predicted) if stage.predicted else stage.once(("masks", ""), own)
    return found


def stamp_of(source: str) -> str:
    """Of each file its name and size, and on this machine the time of its last change; not its content.

    A label that is put right seldom changes the size, and the content may be hundreds of GB.
    """
    from synthgen.datasets import source_inputs
    from synthgen.datasets.sources import tars_of

    place = parse_location(source)
    if isinstance(place, RemotePath):
        return digest(list(source_inputs(source).values()))
    # with their folders, which are the labels where images lie in them
    files = tars_of(source) or sorted(file for file in walk_files(place) if file.is_file())
    return digest([_file_state(file) for file in files])


def _file_state(file: Path) -> list[str | int]:
    about = file.stat()
    return [file.as_posix(), about.st_size, about.st_mtime_ns]


def _stamp_of_shards(run: Run, split: str) -> str:
    """Of each tar of a split the sha256 that ``dataset.json`` tells, here and in a store; of one it does not, the size.

    Raises:
        MissingArtifact, CorruptFile: see :func:`~synthgen.stages._integrity.check_there`.
    """
    sums, sizes = check_there(run, split)
    return digest([[name, sums.get(name, size)] for name, size in sorted(sizes.items()) if name.endswith(".tar")])


def _stamp_of_masks(run: Run) -> str:
    """Of the run's masks what they were made with, and the sha256 of each unit that there is."""
    made = sorted((unit, str(mark["sha256"])) for unit, mark in run.iter_marks("masks"))
    return digest([run.artifact("masks")["fingerprint"], made])


def placed(source: Source, needs: Collection[Need]) -> tuple[int, ...]:
    """The numbers of the samples in which evaluators with these needs are told what is where.

    Those with masks; where none of the evaluators asks for pixels, those with boxes as well.
    """
    if "patches" in needs:
        return source.masked
    return tuple(sorted({*source.masked, *source.boxed})) if "boxes" in needs else ()


def looked_at(source: Source, needs: Collection[Need]) -> tuple[int, ...]:
    """The numbers of the samples that evaluators with these needs look at."""
    from synthgen.evaluators import OF_LABELLED

    found = set(placed(source, needs))
    if OF_LABELLED & set(needs):
        found |= source.labels.keys()
    if "pairs" in needs and source.name == "test":
        found |= source.captions.keys()
    return tuple(sorted(found))


def spread_out(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of ``numbers``: one out of each of so many parts of equal length, the same each time.

    Which one of its part is drawn by lot, so that no rhythm in the order of the images (a class, another class, the
    first one again) decides what is left.
    """
    if len(numbers) <= most:
        return tuple(numbers)
    lots, ends = random.Random(0), [place * len(numbers) // most for place in range(most + 1)]
    return tuple(numbers[lots.randrange(start, end)] for start, end in pairwise(ends))


def thinned(
    numbers: Mapping[str, Sequence[int]], each: int, memory: float, what: str, result: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The samples that fit into ``memory`` GB at ``each`` bytes for ``what`` is kept of one: all, or evenly apart.

    They come in rising order.
    """
    total = sum(map(len, numbers.values()))
    share = min(1.0, memory * 1e9 / (each * total))
    found = {}
    for name, given in numbers.items():
        found[name] = tuple(sorted(spread_out(given, max(1, int(len(given) * share)))))
        if len(found[name]) < len(given):
            result["warnings"].append(
                f"{what} are those of {len(found[name])} of {len(given)} {name} images: all would "
                f"take {each * total / 1e9:.1f} GB, and patch_memory is {memory:g}"
            )
    return found


def masks_to_judge(
    stage: Evaluate, run: Run, result: dict[str, Any]
) -> tuple[Mapping[str, WordMasks], Mapping[str, WordMasks]]:
    """The predicted masks and the true ones, by key; what is doubtful about them goes into ``result``.

    Raises:
        ConfigError: they have no key in common, or a key is that of two images.
    """
    from synthgen.datasets import open_masks

    truth = open_masks(stage.truth)
    predicted = open_masks(stage.predicted) if stage.predicted else _masks_of_run(run)
    shared = len(predicted.keys() & truth.keys())
    if not shared:
        raise ConfigError(f"no key of the predicted masks is among those of {stage.truth}")
    if shared < len(truth):
        result["warnings"].append(f"{len(truth) - shared} of {len(truth)} true masks have no prediction beside them")
    result["masks"] = {"images": shared}
    return predicted, truth


def _masks_of_run(run: Run) -> Mapping[str, WordMasks]:
    """The run's own masks, under the names that their images had before where they were attended.

    Raises:
        ConfigError: two images had the same name.
    """
    from synthgen.datasets import LazyMasks

    readers: dict[str, Callable[[], WordMasks]] = {}
    names = _names_before(run)
    for unit in run.units("masks"):
        for key, members in run.read("masks", unit):  # packed: a few hundred bytes a sample
            name = names.get(key, key)
            if name in readers:
                raise ConfigError(
                    f"two images of {run.path} are called {name}; truth is found by names, so judge one set"
                )
            readers[name] = partial(decode_masks, key, members)
    return LazyMasks(readers)


def _names_before(run: Run) -> dict[str, str]:
    """By key what attended images were called before, which is what their truth is called; none for generated ones."""
    if run.artifact("images")["stage"] != "attend":
        return {}
    rows = (row for unit in run.units("images") for row in read_tar(run.tar("images", unit), ("json",)))
    return {key: str(decode_meta(key, members).get("source") or key) for key, members in rows}
