"""The images that an encoder is judged on: what is known of them, without decoding any."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from synthgen.errors import ConfigError
from synthgen.run import digest

if TYPE_CHECKING:
    from synthgen.datasets import ImageDataset

__all__ = ["Lacking", "Source", "open_source", "spread_out"]


class Lacking(ConfigError):
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

    def need_labels(self) -> None:
        """See that there are some.

        Raises:
            Lacking: there are none.
        """
        if not self.labels:
            raise Lacking(
                f"no image of {self.path} has a label; give --{self.name} tars with cls (or label in json), "
                "or a folder with a subfolder for each class"
            )

    def need_masks(self) -> None:
        """See that there are some.

        Raises:
            Lacking: there are none.
        """
        if not self.masked:
            raise Lacking(f"no image of {self.path} has masks; give --{self.name} tars with mask.png and json (words)")

    def need_captions(self) -> None:
        """See that there are some.

        Raises:
            Lacking: there are none.
        """
        if not self.captions:
            raise Lacking(
                f"no image of {self.path} has a text; give --{self.name} tars with txt (or captions in json), "
                "or a folder with captions beside its images"
            )


def open_source(name: str, path: str) -> Source:
    """A source; asked for again it is the same object, so that each sample's json is read once.

    Raises:
        MissingArtifact, CorruptShard: it is not there, holds nothing, or cannot be read.
    """
    from synthgen.datasets import source_inputs

    return _opened(name, path, digest(source_inputs(path)))


@lru_cache(maxsize=4)
def _opened(name: str, path: str, stamp: str) -> Source:
    return Source(name, path)


def spread_out(numbers: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most ``most`` of ``numbers``, evenly apart."""
    if len(numbers) <= most:
        return numbers
    return tuple(numbers[place * len(numbers) // most] for place in range(most))
