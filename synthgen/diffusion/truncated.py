"""A diffusion network truncated after the block to read, as a fully trainable image encoder.

DDAE fine-tunes this (Xiang et al., 2023): the network up to one block, at one timestep, averaged over space.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from jaxtyping import Float
from torch import Tensor, nn

from synthgen.diffusion.backbone import Denoiser, DiffusionBackbone
from synthgen.diffusion.features import UNFIT, FeatureReader, as_map, block_names, watched
from synthgen.errors import ConfigError
from synthgen.prompts import sample_seed

__all__ = ["Shape", "TruncatedGenerator", "see_that_it_can_be_cut"]


@dataclass(frozen=True)
class Shape:
    """The counterpart of :class:`~synthgen.models.vit.EncoderConfig` for a generator."""

    image_size: int  # pixels a side
    dim: int  # channels of the block that is read
    depth: int  # blocks, that one included
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class TruncatedGenerator(nn.Module):
    """A trainable float32 copy of a generator's network up to the block to read.

    Later parts are not copied. Images are encoded by the generator's own autoencoder and noised to the timestep; the
    prompt is empty. Autoencoder and text encoder are shared with the generator and frozen; the generator itself is not
    changed. A bfloat16 network computes in bfloat16 here too, with float32 weights; a float16 one in float32, as its
    gradients would underflow.

    Args:
        reader: has the generator, the timestep, the block, and the seed of the noise.
        fresh: start from random weights drawn from the reader's seed.
        device: the device of the copy.

    Raises:
        ConfigError: as for :func:`see_that_it_can_be_cut`; the block's output is not finite; or a layer of an unknown
            kind cannot be initialised.
    """

    def __init__(self, reader: FeatureReader, *, fresh: bool = False, device: str = "cpu") -> None:
        super().__init__()
        see_that_it_can_be_cut(reader)
        self.reader, (self.timestep,), (self.block,) = reader, reader.timesteps, reader.blocks
        original: nn.Module = reader.model.network
        names = block_names(original)
        self.blocks = names[: names.index(self.block) + 1]
        with torch.inference_mode(False):
            reached, dim = _reached(reader, self.block)
            self.network = _copied(original, reached, "cpu" if fresh else device)
            if fresh:
                _begin_anew(self.network, reader.seed)
                self.network.to(device)
        self.network.register_forward_pre_hook(_in_float32, with_kwargs=True)
        self.config = Shape(reader.image_size, dim, len(self.blocks))
        self.halves = original.dtype == torch.bfloat16
        self._model = _with_network(reader.model, self.network)
        self._denoiser: tuple[torch.Size, Denoiser] | None = None

    def forward(self, images: Float[Tensor, "b 3 S S"], keys: Sequence[str]) -> Float[Tensor, "b d"]:
        """The block's output for normalised images, averaged over space; the noise of each depends on its key."""
        device, side = images.device, self.config.image_size
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        latents = self.reader.latents(pixels)
        noise = self._model.noise([sample_seed(self.reader.seed, key) for key in keys], latents)
        noised = self._model.noised(latents, noise, self.timestep).to(device)
        denoise, halves = self._denoiser_for(noised), torch.autocast(device.type, torch.bfloat16, enabled=self.halves)
        with halves, watched(self.network, [self.block]) as seen:
            denoise(noised, self.timestep)
        return as_map(seen[self.block], self._model.grid(side, side)).float().mean((2, 3))

    def layer(self, name: str) -> int:
        """The layer that a weight belongs to: 0 is before all blocks, k is block k in order of computation.

        Down- and up-samplers belong to the block before them.
        """
        inside = name.removeprefix("network.")
        for number, block in enumerate(self.blocks, start=1):
            if inside.startswith((f"{block}.", f"{block}.".replace(".attentions.", ".resnets."))):
                return number
        level = re.match(r"(down|up)_blocks\.\d+\.", inside)
        of_level = [number for number, block in enumerate(self.blocks, 1) if level and block.startswith(level[0])]
        return max(of_level, default=0)

    def _denoiser_for(self, noised: Tensor) -> Denoiser:
        """The reader's denoiser, with the prompt encoded outside inference mode so that gradients can flow."""
        if self._denoiser is None or self._denoiser[0] != noised.shape:
            with torch.inference_mode(False), torch.no_grad():
                self._denoiser = noised.shape, self._model.casting_denoiser([""] * len(noised), noised)
        return self._denoiser[1]


def see_that_it_can_be_cut(reader: FeatureReader) -> None:
    """Check that images are noised and read at one timestep, from one block.

    Raises:
        ConfigError: the reader has several timesteps or blocks, or an inversion; the message says what to give.
    """
    if reader.inversion_steps:
        raise ConfigError("a generator is fine-tuned on noised images; leave generator_inversion_steps 0")
    if len(reader.timesteps) != 1:
        raise ConfigError(
            f"a generator is fine-tuned at one timestep, not at {list(reader.timesteps)}; give one generator_timesteps"
        )
    if len(reader.blocks) != 1:
        raise ConfigError(
            f"a generator is fine-tuned up to one block, not {', '.join(reader.blocks)}; give one generator_blocks"
        )


def _reached(reader: FeatureReader, block: str) -> tuple[set[nn.Module], int]:
    """The modules that run up to the block in a pass over a black image, and the block's number of channels."""
    model, side, reached = reader.model, reader.image_size, set[nn.Module]()
    network: nn.Module = model.network
    latents = reader.latents(torch.zeros(1, side, side, 3, dtype=torch.uint8)).to(model.pipeline._execution_device)
    handles = [
        module.register_forward_pre_hook(lambda module, given: reached.add(module)) for module in network.modules()
    ]
    try:
        with torch.no_grad(), watched(network, [block]) as seen:
            model.casting_denoiser([""], latents)(latents, reader.timesteps[0])
    finally:
        for handle in handles:
            handle.remove()
    found = as_map(seen[block], model.grid(side, side))
    if not found.isfinite().all():
        raise ConfigError(UNFIT)
    return reached, found.shape[1]


def _copied(network: nn.Module, reached: set[nn.Module], device: str) -> nn.Module:
    """A trainable float32 copy of the reached modules; the others are left out.

    It is made weight by weight, so there is never a second copy in memory. Offloading hooks are not copied.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own and module not in reached:
            memo[id(module)] = nn.Identity()
        elif own:
            memo |= {id(weight): _learning(weight, device) for weight in own}
        if hasattr(module, "_hf_hook"):  # it references the other parts of the pipeline, which must not be copied
            memo[id(module._hf_hook)] = ModelHook()
    copied = copy.deepcopy(network, memo)
    remove_hook_from_module(copied, recurse=True)
    return copied.to(device, torch.float32)


def _learning(weight: nn.Parameter, device: str) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(device, torch.float32, copy=True))


def _begin_anew(network: nn.Module, seed: int) -> None:
    """Initialise the weights as torch's layers do; drawn on the CPU, so that they are the same on any device.

    Raises:
        ConfigError: a layer has no known initialisation.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in network.modules():
            own = dict(module.named_parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None)
            if own and reset is not None:
                reset()
            elif own.keys() <= {"weight", "bias"} and all(weight.ndim == 1 for weight in own.values()):  # of a norm
                for name, weight in own.items():
                    weight.fill_(float(name == "weight"))
            else:
                raise ConfigError(
                    f"a {type(module).__name__} of the generator cannot begin anew, as the row 'random generator' "
                    "needs; give baselines=false"
                )


def _with_network(model: DiffusionBackbone, network: nn.Module) -> DiffusionBackbone:
    """A shallow copy of the backbone with another network; the backbone itself is not changed."""
    other = copy.copy(model)
    other.pipeline = copy.copy(model.pipeline)
    (name,) = (name for name, part in model.pipeline.components.items() if part is model.network)
    setattr(other.pipeline, name, network)
    return other


def _in_float32(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    """Cast a network's inputs, such as a prompt encoded in half precision, to float32 like its weights."""
    return _cast(given), _cast(named)


def _cast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(part) for part in value)
    return {name: _cast(part) for name, part in value.items()} if isinstance(value, dict) else value
