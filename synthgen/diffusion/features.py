"""What a frozen diffusion network makes of an image on the way: the activations of its blocks, as image features.

An image is encoded by the model's own autoencoder, noised, and seen by the network once at each timestep, with an empty
prompt. That is the read-out of DDAE (Xiang et al., 2023), there of one block at one timestep, averaged over space.
Several of either, side by side, are the features that DifFormer reads (Mukhopadhyay et al., 2023), without its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor, nn

from synthgen.diffusion.backbone import TOO_LITTLE, DiffusionBackbone, Look
from synthgen.errors import ConfigError, SynthgenError, UnknownName
from synthgen.prompts import sample_seed

__all__ = ["Activations", "FeatureReader", "block_names", "middle_block"]

_LARGEST = torch.finfo(torch.float16).max
UNFIT = "the generator's activations are not finite numbers; try another dtype, such as bfloat16 or float32"


@dataclass(frozen=True, slots=True)
class Activations:
    """What a network made of a batch of images: the channels of all blocks at all timesteps, side by side."""

    pooled: Float32[Tensor, "b d"]  # the mean over space
    patches: Float16[Tensor, "b d g g"]  # on the grid that was asked for


class _SeenEnough(Exception):
    """The last block that is read has computed: what comes behind it is not needed."""


class FeatureReader:
    """A frozen diffusion model as an image encoder.

    Args:
        backbone: a backbone of a family in :mod:`synthgen.diffusion`.
        timesteps: of training (0 to 999), at each of which the network sees the image once.
        blocks: names of the blocks that are read, as in :func:`block_names`; none: the middle one.
        seed: with an image's key it makes the noise of that image, one draw for all timesteps.

    Raises:
        ConfigError: the backbone is of no such family, or its network has no such block; lists those it has.
    """

    most = 16  # images that the network sees together

    def __init__(
        self, backbone: object, *, timesteps: Sequence[int], blocks: Sequence[str] = (), seed: int = 0
    ) -> None:
        model = getattr(backbone, "family", backbone)
        if not isinstance(model, DiffusionBackbone):
            raise ConfigError(f"the activations of {type(backbone).__name__} cannot be read: it is no known family")
        known = block_names(model.network)
        for block in blocks:
            if block not in known:
                raise UnknownName.among(f"block of {type(model.network).__name__}", block, known)
        self.model, self.timesteps, self.seed = model, tuple(timesteps), seed
        self.blocks = tuple(sorted(set(blocks), key=known.index)) or (middle_block(model.network),)
        self._look: tuple[torch.Size, Look] | None = None

    @property
    def image_size(self) -> int:
        """The side of the square that the model sees, in pixels: the shorter one of its own images."""
        return min(self.model.size)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels in all, and rows and columns of the finest block; the network sees a black image for it."""
        side = self.image_size
        try:
            maps = self._maps(torch.zeros(1, side, side, 3, dtype=torch.uint8), ("",))
        except torch.OutOfMemoryError:
            raise SynthgenError(TOO_LITTLE) from None
        rows, columns = (max(one.shape[axis] for one in maps) for axis in (2, 3))
        return sum(one.shape[1] for one in maps), rows, columns

    def read(self, images: UInt8[Tensor, "b S S 3"], keys: Sequence[str], grid: int) -> Activations:
        """The activations for images, pooled and on a grid of ``grid`` rows and columns.

        A batch for which the device has too little memory is halved.

        Raises:
            SynthgenError: there is too little for one image.
            ConfigError: the activations are not finite numbers.
        """
        starts = range(0, len(images), self.most)
        parts = [
            self._read(images[start : start + self.most], keys[start : start + self.most], grid) for start in starts
        ]
        return _joined(parts)

    def _read(self, images: Tensor, keys: Sequence[str], grid: int) -> Activations:
        try:
            maps = self._maps(images, keys)
            pooled = torch.cat([one.mean((2, 3)) for one in maps], 1).cpu()
            resized = [
                F.interpolate(one, (grid, grid), mode="bilinear", align_corners=False, antialias=True) for one in maps
            ]
            patches = torch.cat(resized, 1).clamp(-_LARGEST, _LARGEST).half().cpu()
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise SynthgenError(TOO_LITTLE) from None
        else:
            if not pooled.isfinite().all():
                raise ConfigError(UNFIT)
            return Activations(pooled, patches)
        torch.cuda.empty_cache()
        half = len(images) // 2
        return _joined([self._read(images[:half], keys[:half], grid), self._read(images[half:], keys[half:], grid)])

    def _maps(self, images: Tensor, keys: Sequence[str]) -> list[Float32[Tensor, "b _ _ _"]]:
        """The map of each block at each timestep."""
        model, maps = self.model, list[Tensor]()
        with torch.inference_mode():
            latents = model.encode(images.to(model.pipeline._execution_device)).float()
            noise = model.noise([sample_seed(self.seed, key) for key in keys], latents)
            look, grid = self._looking(latents), model.grid(images.shape[1], images.shape[2])
            for timestep in self.timesteps:
                with _watched(model.network, self.blocks) as seen:
                    look(model.noised(latents, noise, timestep), timestep)
                maps += [_as_map(seen[block], grid).float() for block in self.blocks]
        return maps

    def _looking(self, latents: Tensor) -> Look:
        """What looks at latents of this shape with an empty prompt, which is encoded again only for another shape."""
        if self._look is None or self._look[0] != latents.shape:
            self._look = latents.shape, self.model.seer([""] * len(latents), latents)
        return self._look[1]


def block_names(network: nn.Module) -> tuple[str, ...]:
    """The blocks of a network, in the order in which they compute, by their names in ``diffusers``.

    Of a U-Net a block is a residual block with the attention behind it, and has the name of that attention where there
    is one; what only changes the size is not counted (DDAE counts so). Of a transformer it is a block.
    """
    names = []
    for path in ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks"):
        part = getattr(network, path, None)
        if isinstance(part, nn.ModuleList):
            for number, block in enumerate(part):
                resnets = len(getattr(block, "resnets", ()))
                kind = "attentions" if len(getattr(block, "attentions", ())) == resnets else "resnets"
                inside = [f".{kind}.{inner}" for inner in range(resnets)]
                names += [f"{path}.{number}{name}" for name in inside or [""]]
        elif part is not None:
            names.append(path)
    return tuple(names)


def middle_block(network: nn.Module) -> str:
    """The block in the middle of a U-Net's up-sampling path, or of all blocks of a transformer.

    DDAE's best ones lie there: the 6th of 12 of its U-Net, and layer 13 of DiT's 28.
    """
    names = block_names(network)
    names = tuple(name for name in names if name.startswith("up_blocks.")) or names
    return names[(len(names) - 1) // 2]


@contextmanager
def _watched(network: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each block gives in one pass, which ends behind the last of them."""
    seen: dict[str, Any] = {}

    def hook(block: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            seen[block] = output
            if len(seen) == len(blocks):
                raise _SeenEnough

        return keep

    handles = [network.get_submodule(block).register_forward_hook(hook(block)) for block in blocks]
    try:
        yield seen
    except _SeenEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _as_map(output: Any, grid: tuple[int, int]) -> Tensor:
    """A block's output as b d h w: a tensor or the last of several, which of a transformer is the image's tokens."""
    values: Tensor = output if isinstance(output, Tensor) else output[-1]
    return values if values.dim() == 4 else values.mT.reshape(len(values), -1, *grid)


def _joined(parts: Sequence[Activations]) -> Activations:
    return Activations(torch.cat([part.pooled for part in parts]), torch.cat([part.patches for part in parts]))
