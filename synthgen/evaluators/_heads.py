"""Training of small heads on frozen patch features, the same for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.errors import ConfigError
from synthgen.evaluators import DenseFeatures

__all__ = ["Standardize", "finite", "fit", "train_head", "trunk"]

H = TypeVar("H", bound=nn.Module)


class Standardize(nn.Module):
    """Standardise each channel by its mean and deviation over the patches of the training images."""

    mean: Tensor
    scale: Tensor

    def __init__(self, scenes: DenseFeatures) -> None:
        super().__init__()
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for part in torch.split(scenes.patches, 64):
            values = part.double()
            count += values[:, 0].numel()
            total, squares = total + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.register_buffer("mean", mean.float()[:, None, None])
        # a constant channel carries no information: it becomes 0 instead of noise
        scale = torch.where(deviation > 1e-4 * (1 + mean.abs()), 1 / deviation.clamp(min=1e-12), 0.0)
        self.register_buffer("scale", scale.float()[:, None, None])

    def forward(self, patches: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Standardised patches in float32."""
        y: Tensor = (patches.float() - self.mean) * self.scale
        return y


def trunk(num_channels: int, width: int) -> nn.Sequential:
    """The shared part of decoders: a projection of each patch to ``width``, then two 3 x 3 convolutions."""
    return nn.Sequential(
        nn.Conv2d(num_channels, width, kernel_size=1),
        nn.GELU(),
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.GELU(),
    )


def fit(
    make: Callable[[], H],
    keys: Sequence[str],
    loss: Callable[[H, Int[Tensor, " b"]], Tensor],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    device: str,
) -> H:
    """A head from ``make``, trained by AdamW: warm-up over a tenth of the steps, then half a cosine to 0.

    ``loss`` gets the head and the indices of a batch's images. Weights and batches depend only on ``seed`` and the
    images' keys, so the order of the images does not matter.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed)
        head = make().to(device)
    by_key = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=weight_decay)
    order = torch.empty(0, dtype=torch.long)
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            while len(order) < min(batch_size, len(keys)):
                order = torch.cat([order, torch.randperm(len(keys), generator=generator)])
            numbers, order = by_key[order[:batch_size]], order[batch_size:]
            progress, warmup = step / steps, min(1.0, (step + 1) / max(1, steps // 10))
            optimizer.param_groups[0]["lr"] = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))
            value = loss(head, numbers)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head.eval()


def finite(scores: Tensor, setting: str = "learning_rate") -> Tensor:
    """The output of a trained head, unchanged. ``setting`` is its learning rate, for the message.

    Raises:
        ConfigError: the output is not finite.
    """
    if not scores.isfinite().all():
        raise ConfigError(f"the training of the head diverged; give the evaluator a lower {setting}")
    return scores


def train_head(
    make: Callable[[], nn.Module],
    scenes: DenseFeatures,
    loss: Callable[[nn.Module, Float[Tensor, "b d h w"], Int[Tensor, " b"]], Tensor],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    device: str,
) -> nn.Module:
    """A head on standardised patches, trained as in :func:`fit`.

    ``loss`` gets the head, the standardised patches of a batch, and the indices of their images in ``scenes``.
    """
    standardize = Standardize(scenes).to(device)

    def of_batch(head: nn.Module, numbers: Int[Tensor, " b"]) -> Tensor:
        return loss(head, standardize(scenes.patches[numbers].to(device)), numbers)

    head = fit(
        make,
        scenes.keys,
        of_batch,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        device=device,
    )
    return nn.Sequential(standardize, head).eval()
