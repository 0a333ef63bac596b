"""Open a source by its path: a tar, a pattern of tars, or a folder of tars or images."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from synthgen.datasets.folders import CaptionedFolder, FolderDataset
from synthgen.datasets.samples import ImageDataset, JoinedDataset
from synthgen.datasets.shards import ShardDataset
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.records import WordMasks
from synthgen.stores import parse_location, walk_files
from synthgen.stores.remote import RemotePath

__all__ = ["LazyMasks", "open_captioned", "open_dataset", "open_masks", "source_inputs", "tars_of"]


def open_dataset(*sources: str | Path, masks: bool = True) -> ImageDataset:
    """The samples of all ``sources``, each a tar, a pattern of tars (``shards/*.tar``), or a folder of tars or images.

    Raises:
        MissingArtifact: a source does not exist or has no samples.
        CorruptFile: a tar cannot be read.
    """
    parts = [_open(source, tars_of(source), masks=masks) for source in sources]
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def open_captioned(source: str | Path, metadata: str | Path = "") -> ImageDataset:
    """The samples of one source with their captions, which for a folder of images may be listed in ``metadata``.

    Raises:
        MissingArtifact, CorruptFile, PromptError: as for :func:`open_dataset` and :class:`CaptionedFolder`.
        ConfigError: ``metadata`` is given for tars.
    """
    tars = tars_of(source)
    if tars and metadata:
        raise ConfigError(f"{source} holds tars, which have their captions in them; leave --metadata out")
    return _open(source, tars, masks=False) if tars else CaptionedFolder(source, metadata)


def _open(source: str | Path, tars: list[Path], *, masks: bool) -> ImageDataset:
    samples = ShardDataset(tars, masks=masks) if tars else FolderDataset(source)
    if not len(samples):
        raise MissingArtifact(f"there are no samples in {source}")
    return samples


class LazyMasks(Mapping[str, WordMasks]):
    """Masks by key, each decoded when it is requested."""

    def __init__(self, readers: Mapping[str, Callable[[], WordMasks]]) -> None:
        self._readers = readers

    def __getitem__(self, key: str) -> WordMasks:
        return self._readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def open_masks(source: str | Path) -> LazyMasks:
    """The masks of all samples of ``source`` that have some, by key; the samples need no images.

    Raises:
        ConfigError: ``source`` has no tars, or no masks, or two samples with one key.
    """
    shards, found = ShardDataset(tars_of(source)), dict[str, Callable[[], WordMasks]]()
    for number in range(len(shards)):
        if shards.mask_member(number):
            key = shards.key(number)
            if key in found:
                raise ConfigError(f"two samples of {source} have the key {key!r}; give tars whose keys are unique")
            found[key] = partial(shards.word_masks, number)
    if not found:
        raise ConfigError(f"{source} has no masks; they are read from tars with members mask.png and json (words)")
    return LazyMasks(found)


def source_inputs(*sources: str | Path) -> dict[str, str]:
    """Names and sizes of the files of each source, for :meth:`~synthgen.stages.Stage.inputs` of a stage.

    Sizes rather than hashes, so that a stage starts at once on a thousand shards.
    """
    found = {}
    for source in sources:
        files = tars_of(source) or sorted(file for file in walk_files(parse_location(source)) if file.is_file())
        found[str(source)] = " ".join(f"{file.name}:{file.stat().st_size}" for file in files)
    return found


def tars_of(source: str | Path) -> list[Path]:
    """The tars of a source; none if it is a folder without tars."""
    path = parse_location(source)
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
