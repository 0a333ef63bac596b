"""A diffusion network up to one block, as a trainable image encoder: what DDAE fine-tunes (Xiang et al., 2023)."""

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

from synthgen.diffusion.backbone import DiffusionBackbone
from synthgen.diffusion.features import (
    NOT_FINITE,
    EmptyPromptDenoiser,
    FeatureReader,
    as_map,
    block_names,
    block_outputs,
)
from synthgen.errors import ConfigError
from synthgen.prompts import sample_seed

__all__ = ["Shape", "TruncatedGenerator", "check_truncatable"]


@dataclass(frozen=True)
class Shape:
    """The counterpart of :class:`~synthgen.models.vit.EncoderConfig` for a generator."""

    image_size: int  # pixels a side
    dim: int  # channels of the block that is read
    depth: int  # blocks, that one included
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class TruncatedGenerator(nn.Module):
    """A trainable float32 copy of a generator's network up to the block to read, averaged over space.

    Later parts are not copied. Images are encoded by the generator's own autoencoder and noised to the timestep; the
    prompt is empty. Autoencoder and text encoder are shared with the generator and frozen; the generator itself is not
    changed. A bfloat16 network computes under bfloat16 autocast, with float32 weights; a float16 one in float32,
    because its gradients would underflow.

    Args:
        reader: gives the generator, the timestep, the block, and the seed of the noise.
        fresh: start from random weights drawn from the reader's seed.
        device: the device of the copy.

    Raises:
        ConfigError: as for :func:`check_truncatable`; the block's output is not finite; or a layer of an unknown
            kind cannot be initialised.
    """

    def __init__(self, reader: FeatureReader, *, fresh: bool = False, device: str = "cpu") -> None:
        super().__init__()
        check_truncatable(reader)
        self.reader, (self.timestep,), (self.block,) = reader, reader.timesteps, reader.blocks
        original: nn.Module = reader.model.network
        names = block_names(original)
        self.blocks = names[: names.index(self.block) + 1]
        with torch.inference_mode(False):
            used, dim = _used_modules(reader, self.block)
            self.network = _copy_modules(original, used, "cpu" if fresh else device)
            if fresh:
                _initialize(self.network, reader.seed)
                self.network.to(device)
        self.network.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        self.config = Shape(reader.image_size, dim, len(self.blocks))
        self.uses_bfloat16 = original.dtype == torch.bfloat16
        self._model = _with_network(reader.model, self.network)
        self._denoiser = EmptyPromptDenoiser(self._model)

    def forward(self, images: Float[Tensor, "b 3 S S"], keys: Sequence[str]) -> Float[Tensor, "b d"]:
        """The block's output for normalised images, averaged over space; the noise of each depends on its key."""
        device, side = images.device, self.config.image_size
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        latents = self.reader.latents(pixels)
        noise = self._model.noise([sample_seed(self.reader.seed, key) for key in keys], latents)
        noised = self._model.noised(latents, noise, self.timestep).to(device)
        denoise = self._denoiser(noised)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.uses_bfloat16)
        with autocast, block_outputs(self.network, [self.block]) as outputs:
            denoise(noised, self.timestep)
        return as_map(outputs[self.block], self._model.grid(side, side)).float().mean((2, 3))

    def layer(self, name: str) -> int:
        """The layer that a weight belongs to: 0 is before all blocks, k is block k in order of computation.

        Down- and up-samplers belong to the block before them.
        """
        name = name.removeprefix("network.")
        for number, block in enumerate(self.blocks, start=1):
            if name.startswith((f"{block}.", f"{block}.".replace(".attentions.", ".resnets."))):
                return number
        level = re.match(r"(down|up)_blocks\.\d+\.", name)
        of_level = [number for number, block in enumerate(self.blocks, 1) if level and block.startswith(level[0])]
        return max(of_level, default=0)


def check_truncatable(reader: FeatureReader) -> None:
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


def _used_modules(reader: FeatureReader, block: str) -> tuple[set[nn.Module], int]:
    """The modules that run up to the block in a pass over a black image, and the block's number of channels."""
    model, side, used = reader.model, reader.image_size, set[nn.Module]()
    network: nn.Module = model.network
    latents = reader.latents(torch.zeros(1, side, side, 3, dtype=torch.uint8)).to(model.pipeline._execution_device)
    handles = [module.register_forward_pre_hook(lambda module, _: used.add(module)) for module in network.modules()]
    try:
        with torch.no_grad(), block_outputs(network, [block]) as outputs:
            model.casting_denoiser([""], latents)(latents, reader.timesteps[0])
    finally:
        for handle in handles:
            handle.remove()
    output = as_map(outputs[block], model.grid(side, side))
    if not output.isfinite().all():
        raise ConfigError(NOT_FINITE)
    return used, output.shape[1]


def _copy_modules(network: nn.Module, used: set[nn.Module], device: str) -> nn.Module:
    """A trainable float32 copy of the network with identities in place of modules that are not used.

    It is made weight by weight, so there is never a second copy in memory. Offloading hooks are not copied.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own and module not in used:
            memo[id(module)] = nn.Identity()
        elif own:
            memo |= {id(weight): _trainable(weight, device) for weight in own}
        if hasattr(module, "_hf_hook"):  # it references the other parts of the pipeline, which must not be copied
            memo[id(module._hf_hook)] = ModelHook()
    result = copy.deepcopy(network, memo)
    remove_hook_from_module(result, recurse=True)
    return result.to(device, torch.float32)


def _trainable(weight: nn.Parameter, device: str) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(device, torch.float32, copy=True))


def _initialize(network: nn.Module, seed: int) -> None:
    """Initialise the weights by the defaults of torch's layers, drawn on the CPU so that they depend on no device.

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
                    f"a {type(module).__name__} of the generator cannot be initialised at random, as the row "
                    "'random generator' needs; give baselines=false"
                )


def _with_network(model: DiffusionBackbone, network: nn.Module) -> DiffusionBackbone:
    """A shallow copy of the backbone with another network; the backbone itself is not changed."""
    other = copy.copy(model)
    other.pipeline = copy.copy(model.pipeline)
    (name,) = (name for name, part in model.pipeline.components.items() if part is model.network)
    setattr(other.pipeline, name, network)
    return other


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Cast a network's inputs, such as a prompt encoded in half precision, to float32 like its weights."""
    return _cast(args), _cast(kwargs)


def _cast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(part) for part in value)
    return {name: _cast(part) for name, part in value.items()} if isinstance(value, dict) else value
