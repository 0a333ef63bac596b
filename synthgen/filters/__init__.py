"""Filters choose the samples that are left out of the shards, each with a reason. They delete nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from synthgen.records import Request, WordMasks
from synthgen.registry import Registry

__all__ = ["FILTERS", "Candidate", "Filter", "Measure"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generated or attended image, and what is known about it."""

    request: Request
    image: UInt8[np.ndarray, "H W 3"]
    warnings: tuple[str, ...] = ()  # of the backbone
    masks: WordMasks | None = None  # None if no filter of the stage reads masks


Measure = Callable[[Sequence[Candidate]], Sequence[Any]]


class Filter(ABC):
    """The contract of a filter: a frozen dataclass whose fields are its settings.

    A worker measures images one batch at a time; when all are measured, the filter decides from the figures alone.
    So the decision may depend on other images, and never depends on the number of workers.
    """

    uses_masks: ClassVar[bool] = False  # True: the masks stage must have run
    accelerated: ClassVar[bool] = False  # True: measure in one worker per GPU, if there are GPUs

    def inputs(self) -> dict[str, str]:
        """What the figures depend on besides the settings, such as weights: a name and a hash each.

        Called before workers start, so a model is downloaded here.
        """
        return {}

    @abstractmethod
    def open(self, device: str) -> Measure:
        """The function that returns one figure per candidate, as plain JSON data. Called once per worker."""

    @abstractmethod
    def reject(self, figures: Iterable[tuple[str, Any]]) -> dict[str, str]:
        """The keys of the samples to leave out, each with the reason.

        Args:
            figures: key and figure of each sample, in the order of the keys, without samples that an earlier filter
                rejected. They are read while this iterates, once, and need not fit into memory.
        """


FILTERS: Registry[Filter] = Registry(__name__, "filter.filters")
