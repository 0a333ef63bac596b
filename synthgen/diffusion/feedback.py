"""DifFeed's two passes through a frozen U-Net, the second with feedback from the first.

The first pass keeps the map of one decoder block per level. Trained layers transform these maps, and a second pass
over the same noised image adds them to the output of the matching encoder block, before the next block and the skip
connection use it (Mukhopadhyay et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from synthgen.diffusion.features import NOT_FINITE, EmptyPromptDenoiser, FeatureReader, block_names, block_outputs
from synthgen.errors import ConfigError
from synthgen.prompts import sample_seed

__all__ = ["FeedbackNetwork", "Pair", "feedback_pairs"]

_GRADIENT_SCALE = 2.0**12  # scale of the gradients through the network: those of a mean loss would underflow in float16


@dataclass(frozen=True, slots=True)
class Pair:
    """A decoder block and the matching encoder block; names as in ``block_names``."""

    source: str
    target: str
    source_channels: int
    target_channels: int


class FeedbackNetwork:
    """The passes of a frozen U-Net over noised latents, with and without feedback.

    While it runs, the network is in evaluation mode and its weights get no gradients; its state is restored afterwards.

    Args:
        reader: has the backbone, the timestep, the block to read, and the seed of the noise.

    Raises:
        ConfigError: the network is not a U-Net, or the reader has several timesteps or blocks, a block of the
            encoder, or an inversion.
    """

    def __init__(self, reader: FeatureReader) -> None:
        self.model, self.seed = reader.model, reader.seed
        self.pairs = feedback_pairs(self.model.network)
        if reader.inversion_steps:
            raise ConfigError("DifFeed sees noised images and no inverted ones; leave generator_inversion_steps 0")
        if len(reader.timesteps) != 1:
            raise ConfigError(
                f"DifFeed sees an image at one timestep, not at {list(reader.timesteps)}; give one generator_timesteps"
            )
        if len(reader.blocks) != 1 or reader.blocks[0].startswith("down_blocks."):
            raise ConfigError(
                f"DifFeed reads one block of the middle or the up-sampling path, not {', '.join(reader.blocks)}; "
                "give one such generator_blocks"
            )
        (self.timestep,), (self.block,) = reader.timesteps, reader.blocks
        self._denoiser = EmptyPromptDenoiser(self.model)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return torch.device(self.model.pipeline._execution_device)

    def noised(self, latents: Float32[Tensor, "b c h w"], keys: Sequence[str]) -> Float32[Tensor, "b c h w"]:
        """Latents at the timestep, for both passes; the noise depends only on an image's key."""
        latents = latents.to(self.device)
        noise = self.model.noise([sample_seed(self.seed, key) for key in keys], latents)
        return self.model.noised(latents, noise, self.timestep)

    def sources(self, noised: Float32[Tensor, "b c h w"]) -> list[Float32[Tensor, "b _ _ _"]]:
        """The first pass: the map of each pair's source, as constants."""
        with torch.no_grad():
            return self._maps(noised, [pair.source for pair in self.pairs])

    def read(
        self, noised: Float32[Tensor, "b c h w"], feedback: Sequence[Float32[Tensor, "b _ _ _"]] = ()
    ) -> Float32[Tensor, "b d h w"]:
        """The second pass: the map of the block to read, with gradients to the ``feedback`` of each pair's target.

        Feedback of another size is resized bilinearly. Without feedback this is the map that the reader gives.

        Raises:
            ConfigError: the map is not finite although there is no feedback.
        """
        targets = [pair.target for pair in self.pairs] if feedback else []
        added = [_with_gradient(values, 1 / _GRADIENT_SCALE) for values in feedback]
        with _added(self.model.network, dict(zip(targets, added, strict=True))):
            (read,) = self._maps(noised, [self.block])
        if not feedback and not read.isfinite().all():
            raise ConfigError(NOT_FINITE)
        return _with_gradient(read, _GRADIENT_SCALE)

    def _maps(self, noised: Tensor, blocks: Sequence[str]) -> list[Tensor]:
        denoise = self._denoiser(noised)
        with _frozen(self.model.network), block_outputs(self.model.network, blocks) as seen:
            denoise(noised, self.timestep)
        return [_values(seen[block]).float() for block in blocks]


def feedback_pairs(network: nn.Module) -> tuple[Pair, ...]:
    """The pairs of a U-Net, one a level, from the coarsest to the finest.

    With blocks numbered 1, 2, ... in order of computation, including the first convolution and the down-samplers, and E
    of them in the encoder, decoder block b matches encoder block 2E + 2 - b. A level's source is its second to last
    block, as in the paper; the matching block is the first one of that level in the encoder.

    Raises:
        ConfigError: the network is not a U-Net whose decoder has one block more than its encoder at each level.
    """
    names, ups, downs = block_names(network), *(getattr(network, path, ()) for path in ("up_blocks", "down_blocks"))
    pairs = []
    for number, (up, down) in enumerate(zip(ups, reversed(list(downs)), strict=False)):
        across = len(downs) - 1 - number
        sources = [name for name in names if name.startswith(f"up_blocks.{number}.")]
        targets = [name for name in names if name.startswith(f"down_blocks.{across}.")]
        if len(sources) == len(targets) + 1 > 1:
            channels = up.resnets[-2].out_channels, down.resnets[0].out_channels
            pairs.append(Pair(sources[-2], targets[0], *channels))
    if not pairs or not len(pairs) == len(ups) == len(downs):
        raise ConfigError(
            f"DifFeed needs a U-Net, and {type(network).__name__} is none that it knows; use attentive_probe instead"
        )
    return tuple(pairs)


@contextmanager
def _added(network: nn.Module, feedback: Mapping[str, Float[Tensor, "b _ _ _"]]) -> Iterator[None]:
    """Add its feedback to each block's output while the context lasts."""

    def hook(added: Tensor) -> Any:
        return lambda module, arguments, output: _plus(output, added)

    handles = [network.get_submodule(block).register_forward_hook(hook(added)) for block, added in feedback.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the weights; restored afterwards."""
    training = [module for module in network.modules() if module.training]
    learning = [weight for weight in network.parameters() if weight.requires_grad]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for weight in learning:
            weight.requires_grad_(True)


def _with_gradient(values: Float32[Tensor, "*_"], factor: float) -> Float32[Tensor, "*_"]:
    """The same values, with a gradient scaled by ``factor``."""
    same = values.view_as(values)
    if same.requires_grad:
        same.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    return same


def _values(output: Any) -> Tensor:
    """The map in a block's output: a tensor, or the first of several."""
    values: Tensor = output if isinstance(output, Tensor) else output[0]
    return values


def _plus(output: Any, added: Tensor) -> Any:
    """A block's output with a map added to its own, in the same container."""
    values = _values(output)
    if added.shape[2:] != values.shape[2:]:
        added = F.interpolate(added, values.shape[2:], mode="bilinear", align_corners=False)
    values = values + added.to(values)
    if isinstance(output, Tensor):
        return values
    if isinstance(output, tuple):
        return values, *output[1:]
    return replace(output, sample=values)  # the output class of diffusers for a call without return_dict=False
