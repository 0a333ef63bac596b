"""Images one by one, from shards or folders: random access, each sample decoded when it is asked for.

:func:`open_dataset` opens whatever a source is. :mod:`~synthgen.datasets.samples` says what a sample is,
:mod:`~synthgen.datasets.shards` and :mod:`~synthgen.datasets.folders` are the two kinds of source.
"""

from synthgen.datasets.folders import CaptionedFolder, FolderDataset
from synthgen.datasets.samples import ImageDataset, JoinedDataset, NamedBox, Sample
from synthgen.datasets.shards import ShardDataset
from synthgen.datasets.sources import LazyMasks, open_captioned, open_dataset, open_masks, source_inputs

__all__ = [
    "CaptionedFolder",
    "FolderDataset",
    "ImageDataset",
    "JoinedDataset",
    "LazyMasks",
    "NamedBox",
    "Sample",
    "ShardDataset",
    "open_captioned",
    "open_dataset",
    "open_masks",
    "source_inputs",
]
