"""Methods: each trains an encoder on batches and reads as its paper.

What it draws at random comes from torch's generators, which the training loop seeds before every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from synthgen.augment import Augment
from synthgen.loader import Batch
from synthgen.models.vit import VisionTransformer
from synthgen.registry import Family

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

    encoder: VisionTransformer

    @property
    def uses_masks(self) -> bool:
        """Whether batches must come with word masks."""
        return False

    def views(self) -> Augment:
        """What it wants done to a sample: by default a random crop of 20 % of the area or more, and a flip."""
        return Augment(size=self.encoder.config.image_size)

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of a batch; ``progress`` is how much of the training is over, from 0 to 1."""

    def after_step(self, step: int) -> None:
        """Called when the weights have changed: teachers, queues. Nothing by default."""


METHODS: Family[Method] = Family(__name__)
