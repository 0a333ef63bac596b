"""Methods: each trains an encoder on batches and reads as its paper.

What it draws for a sample comes from :mod:`synthgen.models.draws` and ``Batch.seeds``, so that a training is the same
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
    """What one step gives: a loss to go down, and named numbers to look at."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """A module whose arguments, but for the encoder, are its settings.

    What must outlive a step (teachers, queues) belongs into parameters and buffers: checkpoints hold those.
    """

    guided: ClassVar[Mapping[str, Any]]  # the options that ``--guided`` stands for
    added: ClassVar[Mapping[str, Any]] = {}  # options that trainings of earlier versions had not, and what theirs were
    reads_texts: ClassVar[bool] = False  # whether a text tower is left beside the encoder
    min_images: ClassVar[int] = 1  # at once on all processes; a method that compares images needs two

    encoder: VisionTransformer

    @property
    def uses_masks(self) -> bool:
        """Whether batches must come with word masks."""
        return False

    @property
    def copies(self) -> Mapping[str, str]:
        """Averages and teachers, and what each follows, by how names of tensors begin: ``{"teacher.": "encoder."}``.

        Where a training begins from weights that lack them, they begin as what they follow. None by default.
        """
        return {}

    def fit_to(self, data: ImageDataset) -> None:
        """Take from the data what must be known before the first step, such as its classes. Nothing by default.

        What it takes must end up in the state that checkpoints hold.
        """

    def check(self, samples: Sequence[Sample]) -> None:
        """See, from a look at some samples, that the data has what the method needs: by default masks if it uses them.

        Raises:
            ConfigError: it has not; says what is missing and what to do.
        """
        if self.uses_masks and not any(sample.label_map is not None and sample.words for sample in samples):
            raise ConfigError(
                f"no mask in the {len(samples)} samples looked at, and guidance needs word masks; first run: "
                "synthgen masks and synthgen shards, or leave --guided out"
            )

    def check_start(self, folder: Path) -> None:
        """See that what a whole training left in ``folder`` suits this method, which takes its weights over.

        Nothing by default.

        Raises:
            ConfigError: it does not; says what to do.
        """

    def views(self) -> Augment:
        """What it wants done to a sample: by default a random crop of 20 % of the area or more, and a flip."""
        return Augment(size=self.encoder.config.image_size)

    def second_views(self) -> Augment | None:
        """The same for ``Batch.second``, where a method compares two views of a sample. None by default."""
        return None

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of a batch; ``progress`` is how much of the training is over, from 0 to 1."""

    def after_step(self, progress: float) -> None:
        """Called when the weights have changed: teachers, queues. Nothing by default."""

    def export(self, folder: Path) -> None:
        """Write what is worth keeping beside the encoder. Nothing by default."""


METHODS: Registry[Method] = Registry(__name__, "pretrain.method")
