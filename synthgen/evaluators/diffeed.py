"""What a frozen U-Net can tell of an image that it sees twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from synthgen.diffusion.feedback import FeedbackNetwork
from synthgen.errors import SynthgenError
from synthgen.evaluators import Baseline, Latents, Material, Need
from synthgen.evaluators._attentive import AttentiveHead
from synthgen.evaluators._bootstrap import mean_with_interval, spread
from synthgen.evaluators._heads import fitted

__all__ = ["Diffeed"]

_AT_ONCE = 16  # images that are judged together


@dataclass(frozen=True, kw_only=True)
class Diffeed:
    """Classification by the attention head on one block of a U-Net that gets feedback: DifFeed (Mukhopadhyay et al.).

    The network sees each noised image twice. Maps of the decoder go through feedback layers, which learn with the head,
    and into the encoder of the second pass. Theirs has a ``width`` of 1024 and learns for 28 epochs by plain SGD; ours
    learns ``steps`` by AdamW, and its images are noised once and not anew each time.
    """

    needs: ClassVar[Need] = "latents"
    baselines: ClassVar[tuple[Baseline, ...]] = ()

    feedback: bool = True  # false: the same head on the same block of a single pass, for comparison
    width: int = 128  # of a token
    depth: int = 2  # transformer blocks
    num_heads: int = 8
    seeds: int = 3  # trainings, of which the score is the mean
    steps: int = 300  # of a training
    batch_size: int = 16  # images a step; the feedback layers are normalised over them
    learning_rate: float = 5e-4
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.num_heads, self.seeds, self.steps, self.batch_size) < 1:
            raise ValueError("width, depth, num_heads, seeds, steps and batch_size must be 1 or more")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, not {self.width} of {self.num_heads}")
        if not self.learning_rate > 0:
            raise ValueError("learning_rate must be above 0")

    def evaluate(self, material: Material) -> dict[str, float]:
        """``accuracy`` with its interval and spread, and ``train_accuracy``.

        Raises:
            ConfigError: also where the generator is no U-Net, or is read at several timesteps or blocks.
            SynthgenError: the device has too little memory for a batch.
        """
        train, test, reader = material.latents()
        network = FeedbackNetwork(reader)
        right, fit = list[Tensor](), list[float]()
        try:
            for seed in range(self.seeds):
                learner = self.train(network, train, seed)
                right.append(_right(learner, test))
                fit.append(float(_right(learner, train).mean()))
        except torch.OutOfMemoryError:
            raise SynthgenError(
                f"the device has too little memory for gradients through the generator for {self.batch_size} images; "
                "give diffeed a smaller batch_size, or the generator dtype bfloat16"
            ) from None
        accuracy, low, high = mean_with_interval(torch.stack(right).mean(0).numpy())
        return {
            "accuracy": accuracy,
            "low": low,
            "high": high,
            **spread([float(one.mean()) for one in right]),
            "train_accuracy": sum(fit) / len(fit),
            "seeds": float(self.seeds),
        }

    def train(self, network: FeedbackNetwork, given: Latents, seed: int) -> Learner:
        """What has learned the classes of images as they are given."""
        shape = network.read(network.noised(given.values[:1], given.keys[:1])).shape[1:]
        num_classes = int(given.labels.max()) + 1

        def make() -> Learner:
            head = AttentiveHead(
                [(shape[0], shape[1], shape[2])],
                1,
                num_classes,
                width=self.width,
                depth=self.depth,
                num_heads=self.num_heads,
            )
            return Learner(network, head, feedback=self.feedback)

        def loss(learner: Learner, numbers: Int[Tensor, " b"]) -> Tensor:
            scores = learner(_noised(network, given, numbers))
            return F.cross_entropy(scores, given.labels[numbers].to(scores.device))

        return fitted(
            make,
            given.keys,
            loss,
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            device=str(network.device),
        )


class Learner(nn.Module):
    """All that learns, feedback layers and head; the network between them is frozen, and no part of it.

    A feedback layer is a 1 x 1 convolution without bias, a norm over the batch, and what is above 0.
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


def _noised(network: FeedbackNetwork, given: Latents, numbers: Int[Tensor, " b"]) -> Float32[Tensor, "b c h w"]:
    return network.noised(given.values[numbers], [given.keys[number] for number in numbers.tolist()])


def _right(learner: Learner, given: Latents) -> Tensor:
    """For each image 1 where its class is named, else 0."""
    with torch.inference_mode():
        guesses = [
            learner(_noised(learner.network, given, numbers)).argmax(1).cpu()
            for numbers in torch.split(torch.arange(len(given.labels)), _AT_ONCE)
        ]
    return (torch.cat(guesses) == given.labels).double()
