"""Methods: each trains an encoder on batches and follows its paper's notation.

Random numbers for a sample come from :mod:`synthgen.models.draws` and ``Batch.seeds``, so that a training is the same
on any number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from synthgen.augment import Augment
from synthgen.datasets import ImageDataset, Sample
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.models.vit import VisionTransformer
from synthgen.registry import Registry

__all__ = ["METHODS", "Method", "StepOutput"]


@dataclass(frozen=True)
class StepOutput:
    """The result of one step: a loss to minimise, and metrics to log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """A module whose arguments, except the encoder, are its settings.

    State that outlives a step (teachers, queues) belongs in parameters and buffers, which checkpoints hold.
    """

    guided: ClassVar[Mapping[str, Any]]  # the options that ``--guided`` sets
    reads_texts: ClassVar[bool] = False  # whether a text tower is saved beside the encoder
    min_images: ClassVar[int] = 1  # of a step on all processes; a method that compares images needs two

    encoder: VisionTransformer

    @property
    def uses_masks(self) -> bool:
        """Whether batches must have word masks."""
        return False

    @property
    def copies(self) -> Mapping[str, str]:
        """Prefixes of averages and teachers, and of the weights each one follows: ``{"teacher.": "encoder."}``.

        Where initial weights lack a copy, it starts equal to what it follows. None by default.
        """
        return {}

    def fit_to(self, data: ImageDataset) -> None:
        """Read from the data what the first step needs, such as its classes. Nothing by default.

        The result must be part of the state that checkpoints hold.
        """

    def check(self, samples: Sequence[Sample]) -> None:
        """Check on some samples that the data has what the method needs: by default masks, if it uses them.

        Images and masks of the samples are reduced to one pixel, to save memory.

        Raises:
            ConfigError: the samples lack it; the error says what is missing and what to do.
        """
        if self.uses_masks and not any(sample.label_map is not None and sample.words for sample in samples):
            raise ConfigError(
                f"no mask in the {len(samples)} samples looked at, and guidance needs word masks; first run: "
                "synthgen masks and synthgen shards, or leave --guided out"
            )

    def check_start(self, folder: Path) -> None:
        """Check that the training in ``folder``, whose weights this method starts from, fits it.

        Nothing by default.

        Raises:
            ConfigError: the training does not fit; the error says what to do.
        """

    def views(self) -> Augment:
        """The augmentation of a sample: by default a random crop of 20 % of the area or more, and a flip."""
        return Augment(size=self.encoder.config.image_size)

    def second_views(self) -> Augment | None:
        """The augmentation of ``Batch.second``, for methods that compare two views of a sample. None by default."""
        return None

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of a batch; ``progress`` is the finished share of the training, in [0, 1]."""

    def after_step(self, progress: float) -> None:
        """Update teachers and queues after an optimizer step. Nothing by default."""

    def export(self, folder: Path) -> None:
        """Write further results beside the encoder. Nothing by default."""


METHODS: Registry[Method] = Registry(__name__, "pretrain.method")
