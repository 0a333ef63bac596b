"""Classification with an attention head on frozen feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from synthgen.evaluators import Baseline, EvalData, LabelledFeatureMaps, Need
from synthgen.evaluators._attentive import AttentiveHead, AttentiveSettings

__all__ = ["AttentiveProbe"]


@dataclass(frozen=True, kw_only=True)
class AttentiveProbe(AttentiveSettings):
    """Classification by a small transformer over the tokens of frozen blocks, trained with cross-entropy.

    With one block at one timestep this is the attention head of Mukhopadhyay et al. (2023), with several their
    DifFormer; for an encoder, the patch tokens are the only block. Theirs has a ``width`` of 1024 and trains for 28
    epochs with plain SGD; ours trains for ``steps`` with AdamW, and each image is noised only once.
    """

    needs: ClassVar[Need] = "maps"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random",)

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``accuracy`` with its interval and spread, and ``train_accuracy``."""
        train, test = data.feature_maps()
        shapes = [(block.shape[2], block.shape[3], block.shape[4]) for block in train.maps]
        num_classes = int(train.labels.max()) + 1

        def make() -> AttentiveHead:
            return self.head(shapes, train.maps[0].shape[1], num_classes)

        def scores(head: AttentiveHead, given: LabelledFeatureMaps, numbers: Int[Tensor, " b"]) -> Tensor:
            found: Tensor = head([block[numbers].to(data.device) for block in given.maps])
            return found

        return self.score(make, scores, train, test, data.device)
