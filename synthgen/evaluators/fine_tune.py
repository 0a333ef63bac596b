"""Classification by fine-tuning a whole encoder or generator."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from synthgen.augment import Augment
from synthgen.datasets import ImageDataset, Sample
from synthgen.diffusion.memory import is_out_of_memory
from synthgen.diffusion.truncated import Shape, TruncatedGenerator
from synthgen.errors import ConfigError, SynthgenError
from synthgen.evaluators import Baseline, EvalData, LabelledImages, Need
from synthgen.evaluators._bootstrap import accuracy_over_seeds
from synthgen.loader import Order, loader, prefetch
from synthgen.models.vit import Encoder, EncoderConfig

__all__ = ["FineTune"]

_REPORT_EVERY = 10  # steps between two progress reports
_AT_ONCE = {"encoder": 64, "generator": 16}  # test images per batch
_RATES = {"encoder": "learning_rate", "generator": "generator_learning_rate"}  # the setting that applies to each
_WORSE = 2.0  # times the loss of a uniform guess, which a sound training never reaches
_GUESS = 0.9  # share of the loss of a guess: a training that ends above it learned nothing


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Classification by fine-tuning all weights of the encoder or generator, with a linear layer on top.

    The end-to-end fine-tuning of He et al. (2022, appendix A), scaled down: mean of the patch tokens, norm, linear
    layer; AdamW (0.9, 0.999), layer-wise learning-rate decay by ``layer_decay``, warm-up and half a cosine. Theirs
    trains for 100 epochs with 1024 images per step, at 2e-3 with a ``layer_decay`` of 0.65 (base), and uses
    RandAugment, erasing, mixup, cutmix and drop path; ours uses crops and mirror images of the centre square.

    For a generator it is the fine-tuning of DDAE (Xiang et al., 2023): the network up to the block that is read, the
    spatial mean of its output, and the same head. DDAE's recipe is not known; ours is the encoder's, with its own
    learning rate. Each training step draws new noise; evaluation uses one draw per image.
    """

    needs: ClassVar[Need] = "images"
    baselines: ClassVar[tuple[Baseline, ...]] = ("random", "random generator")

    seeds: int = 3  # number of trainings; the score is their mean
    steps: int = 300  # training steps
    batch_size: int = 32  # images per step
    learning_rate: float = 1e-3  # peak learning rate of the last layers
    generator_learning_rate: float = 1e-4  # the same for a generator
    layer_decay: float = 0.75  # a layer's learning rate as a share of the next layer's; 1: all the same
    weight_decay: float = 0.05  # AdamW's, on matrices only: not on biases, norms and tokens
    warmup_ratio: float = 0.05  # share of the steps that warm up the learning rate from 0
    label_smoothing: float = 0.0  # share of the target spread evenly over all classes
    max_norm: float = 1.0  # gradient clipping; 0: none
    crop: float = 0.2  # smallest share of an image's area in a crop; 1: as large as the crop's shape allows
    flip: float = 0.5  # probability of a mirror image

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.batch_size) < 1:
            raise ValueError("seeds, steps and batch_size must be 1 or more")
        if not (self.learning_rate > 0 and self.generator_learning_rate > 0):
            raise ValueError("learning_rate and generator_learning_rate must be above 0")
        if not (self.weight_decay >= 0 and self.max_norm >= 0):
            raise ValueError("max_norm and weight_decay must be 0 or more")
        if not (0 < self.layer_decay <= 1 and 0 < self.crop <= 1):
            raise ValueError("layer_decay and crop must be above 0, and at most 1")
        if not (0 <= self.warmup_ratio <= 1 and 0 <= self.flip <= 1 and 0 <= self.label_smoothing < 1):
            raise ValueError("warmup_ratio and flip must be 0 to 1, and label_smoothing 0 or more and less than 1")

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """``accuracy`` with its interval and spread, and ``train_accuracy``.

        Raises:
            ConfigError: the data lacks what is needed, or a training diverged.
            SynthgenError: the device has too little memory for a batch.
        """
        train, test, _ = data.images()
        correct, train_accuracies = list[Tensor](), list[float]()
        try:
            for seed in range(self.seeds):
                learner = self.train(data, seed)
                correct.append(_correct(learner, test, data.device))
                train_accuracies.append(float(_correct(learner, train, data.device).mean()))
                del learner  # otherwise two would be in memory while the next one is made
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = "generator" if data.encoder is None else "encoder"
            raise SynthgenError(
                f"the device has too little memory to train the {what} on {self.batch_size} images at once; "
                "give fine_tune a smaller batch_size"
            ) from None
        return accuracy_over_seeds(correct, train_accuracies)

    def train(self, data: EvalData, seed: int) -> Learner:
        """A copy of the encoder or generator with a linear layer, trained on the images sorted by key.

        Raises:
            ConfigError: there are no labelled images, or the training diverged.
        """
        train, _, _ = data.images()
        num_classes, losses = int(train.labels.max()) + 1, list[Tensor]()
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            learner = Learner(_copy_network(data), num_classes, data.pool).to(data.device)
            optimizer = torch.optim.AdamW(
                parameter_groups(learner, self.layer_decay, self.weight_decay), betas=(0.9, 0.999)
            )
            for step, (images, numbers) in enumerate(self.batches(train, learner.encoder.config, seed)):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(step, generator=data.encoder is None) * group["share"]
                noise_keys = [f"{train.keys[number]} at step {step} of training {seed}" for number in numbers.tolist()]
                scores, labels = learner(images.to(data.device), noise_keys), train.labels[numbers].to(data.device)
                loss = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if self.max_norm:
                    nn.utils.clip_grad_norm_(learner.parameters(), self.max_norm)
                optimizer.step()
                losses.append(loss.detach())
                if step % _REPORT_EVERY == 0:
                    done = f"training {seed + 1} of {self.seeds}, step {step} of {self.steps}"
                    data.describe(f"{done}, loss {float(losses[-1]):.3f}")
        _check_converged(torch.stack(losses), num_classes, learner.what)
        return learner.eval()

    def rate(self, step: int, *, generator: bool = False) -> float:
        """The learning rate of the last layers: a linear warm-up, then half a cosine to 0."""
        highest = self.generator_learning_rate if generator else self.learning_rate
        warmup = self.warmup_ratio * self.steps
        if step < warmup:
            return highest * (step + 1) / (warmup + 1)
        return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, self.steps - warmup)))

    def batches(
        self, train: LabelledImages, config: EncoderConfig | Shape, seed: int
    ) -> Iterator[tuple[Float[Tensor, "b 3 S S"], Int[Tensor, " b"]]]:
        """Normalised views of the images of each step, and their indices; all random numbers come from the seed."""
        by_key, size = _by_key(train), min(self.batch_size, len(train.keys))
        epochs = -(-self.steps // (len(train.keys) // size))
        order = Order(length=len(train.keys), batch_size=size, epochs=epochs, seed=seed, limit=self.steps)
        view = Augment(size=config.image_size, scale=(self.crop, 1.0), flip=self.flip)
        made = loader(InMemory(train, by_key), order, view, mean=config.mean, std=config.std, seed=seed)
        for rows, batch in zip(order, prefetch(made), strict=True):
            yield batch.images, by_key[[index for _, index in rows]]


class InMemory(ImageDataset):
    """Images in memory as samples without labels or captions, in the order of ``numbers``."""

    def __init__(self, images: LabelledImages, numbers: Int[Tensor, " n"]) -> None:
        self.images = images
        self.numbers: list[int] = numbers.tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.key(index), self.images.pixels[self.numbers[index]].numpy())

    def key(self, index: int) -> str:
        """The name of an image."""
        return self.images.keys[self.numbers[index]]

    def label(self, index: int) -> str | None:
        """None."""
        return None

    def has_masks(self) -> bool:
        """No."""
        return False


class Learner(nn.Module):
    """An encoder or a generator with a norm and a linear layer on top, the latter initialised close to 0.

    All weights are trained, without dropout and drop path even if it was pretrained with them.
    """

    def __init__(self, encoder: Encoder | TruncatedGenerator, num_classes: int, pool: str = "mean") -> None:
        super().__init__()
        self.encoder, self.pool = encoder.requires_grad_(True).eval(), pool
        self.norm = nn.LayerNorm(encoder.config.dim, eps=1e-6)
        self.classify = nn.Linear(encoder.config.dim, num_classes)
        nn.init.trunc_normal_(self.classify.weight, std=2e-5)  # as in MAE's code
        nn.init.zeros_(self.classify.bias)

    @property
    def what(self) -> str:
        """What is trained: "encoder" or "generator"."""
        return "generator" if isinstance(self.encoder, TruncatedGenerator) else "encoder"

    def forward(self, images: Float[Tensor, "b 3 H W"], keys: Sequence[str] = ()) -> Float[Tensor, "b k"]:
        """Class scores of normalised images; a generator's noise depends on each image's key."""
        encoder = self.encoder
        if isinstance(encoder, TruncatedGenerator):
            features = encoder(images, keys)
        else:
            features = encoder.features(images, self.pool)
        scores: Tensor = self.classify(self.norm(features))
        return scores

    def scores(self, pixels: UInt8[Tensor, "b S S 3"], keys: Sequence[str] = ()) -> Float[Tensor, "b k"]:
        """Class scores of images that are not yet normalised."""
        config = self.encoder.config
        mean, std = (torch.tensor(value, device=pixels.device) for value in (config.mean, config.std))
        scores: Tensor = self(((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2), keys)
        return scores


def rate_share(name: str, encoder: Encoder | TruncatedGenerator, layer_decay: float) -> float:
    """The learning rate of a weight of :class:`Learner`, as a share of the peak.

    As in MAE's code, layer 0 is the patch projection with the class token, layer i + 1 is block i, and the norms after
    the blocks have the rate of the linear layer: layer_decay ^ (depth + 1 - layer). In a generator, layer 0 is
    everything before its blocks.
    """
    inside = name.removeprefix("encoder.")
    return layer_decay ** (encoder.config.depth + 1 - encoder.layer(inside)) if inside != name else 1.0


def parameter_groups(learner: Learner, layer_decay: float, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups with equal settings, each with its ``share`` of the learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in learner.named_parameters():
        plain = weight.ndim <= 1 or name.endswith("_token")
        alike = rate_share(name, learner.encoder, layer_decay), 0.0 if plain else weight_decay
        groups.setdefault(alike, []).append(weight)
    return [{"params": weights, "share": part, "weight_decay": decay} for (part, decay), weights in groups.items()]


def _copy_network(data: EvalData) -> Encoder | TruncatedGenerator:
    """A copy to train, so that the encoder or the generator stays unchanged."""
    _, _, network = data.images()
    if isinstance(network, Encoder):
        return copy.deepcopy(network)
    return TruncatedGenerator(network, fresh=data.random_init, device=data.device)


def _check_converged(losses: Float[Tensor, " steps"], num_classes: int, what: str) -> None:
    """Check that the loss, averaged over a tenth of the steps, did not rise far above a guess's and stay high.

    Raises:
        ConfigError: the training diverged.
    """
    tenths = torch.stack([part.mean() for part in torch.split(losses, max(1, len(losses) // 10))]).tolist()
    worst, last, guess = (
        max(tenths, key=lambda loss: (not math.isfinite(loss), loss)),
        tenths[-1],
        math.log(num_classes),
    )
    if not math.isfinite(worst) or (worst > _WORSE * max(1.0, guess) and last > _GUESS * guess):
        raise ConfigError(
            f"the training of the {what} diverged; give the evaluator a lower {_RATES[what]} (its loss rose to "
            f"{worst:.3g} and ended at {last:.3g}; that of a guess is {guess:.3g})"
        )


def _by_key(given: LabelledImages) -> Int[Tensor, " n"]:
    """The indices of the images, sorted by key."""
    return torch.tensor(sorted(range(len(given.keys)), key=given.keys.__getitem__))


def _correct(learner: Learner, given: LabelledImages, device: str) -> Tensor:
    """1 for each image, in the order of the keys, that is classified correctly, else 0."""
    by_key = _by_key(given)
    what, parts = learner.what, list[Tensor]()
    with torch.inference_mode():
        for numbers in torch.split(by_key, _AT_ONCE[what]):
            keys = [given.keys[number] for number in numbers.tolist()]
            parts.append(learner.scores(given.pixels[numbers].to(device), keys))
    scores = torch.cat(parts)
    if not scores.isfinite().all():
        raise ConfigError(f"the training of the {what} diverged; give the evaluator a lower {_RATES[what]}")
    return (scores.argmax(1).cpu() == given.labels[by_key]).double()
