"""Classification with a frozen U-Net that makes two passes over each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.diffusion.feedback import FeedbackNetwork
from synthgen.diffusion.memory import is_out_of_memory
from synthgen.errors import SynthgenError
from synthgen.evaluators import Baseline, EvalData, Latents, Need
from synthgen.evaluators._attentive import AttentiveHead, AttentiveSettings

__all__ = ["Diffeed"]


@dataclass(frozen=True, kw_only=True)
class Diffeed(AttentiveSettings):
    """Classification by the attention head on one block of a U-Net with feedback: DifFeed (Mukhopadhyay et al.).

    The network makes two passes over each noised image. Decoder maps of the first pass go through feedback layers,
    trained together with the head, into the encoder of the second. Theirs has a ``width`` of 1024 and trains for 28
    epochs with plain SGD; ours trains for ``steps`` with AdamW, and each image is noised only once.
    """

    needs: ClassVar[Need] = "latents"
    baselines: ClassVar[tuple[Baseline, ...]] = ()

    feedback: bool = True  # false: the same head on the same block of a single pass, for comparison
    batch_size: int = 16  # images per step; the feedback layers' batch norm is over them
    learning_rate: float = 5e-4  # peak learning rate

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``accuracy`` with its interval and spread, and ``train_accuracy``.

        Raises:
            ConfigError: the data lacks what is needed, a training diverged, the generator is not a U-Net, or it is read
                at several timesteps or blocks.
            SynthgenError: the device has too little memory for a batch.
        """
        train, test, reader = data.latents()
        network, num_classes = FeedbackNetwork(reader), int(train.labels.max()) + 1
        shape = network.read(network.noised(train.values[:1], train.keys[:1])).shape[1:]

        def make() -> Learner:
            head = self.head([(shape[0], shape[1], shape[2])], 1, num_classes)
            return Learner(network, head, feedback=self.feedback)

        def scores(learner: Learner, given: Latents, numbers: Int[Tensor, " b"]) -> Tensor:
            keys = [given.keys[number] for number in numbers.tolist()]
            found: Tensor = learner(network.noised(given.values[numbers], keys))
            return found

        try:
            return self.score(make, scores, train, test, str(network.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise SynthgenError(
                f"the device has too little memory for gradients through the generator for {self.batch_size} images; "
                "give diffeed a smaller batch_size, or the generator dtype bfloat16"
            ) from None


class Learner(nn.Module):
    """The trainable parts, feedback layers and head; the frozen network between them is not a submodule.

    A feedback layer is a 1 x 1 convolution without bias, batch norm, and ReLU.
    """

    def __init__(self, network: FeedbackNetwork, head: AttentiveHead, *, feedback: bool = True) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(pair.source_channels, pair.target_channels, kernel_size=1, bias=False),
                nn.BatchNorm2d(pair.target_channels),
                nn.ReLU(),
            )
            for pair in (network.pairs if feedback else ())
        )

    def forward(self, noised: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Class scores of noised latents."""
        sources = self.network.sources(noised) if len(self.layers) else []
        feedback = [layer(source) for layer, source in zip(self.layers, sources, strict=True)]
        scores: Tensor = self.head([self.network.read(noised, feedback)[:, None]])
        return scores
