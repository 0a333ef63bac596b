"""Image features from a frozen diffusion network: the activations of its blocks.

An image is encoded by the model's own autoencoder, noised, and passed through the network once at each timestep, with
an empty prompt. DDAE (Xiang et al., 2023) reads one block at one timestep this way, averaged over space. Several
blocks or timesteps, concatenated, are the features of DifFormer (Mukhopadhyay et al., 2023), without its head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor, nn

from synthgen.diffusion.backbone import Denoiser, DiffusionBackbone
from synthgen.errors import ConfigError, UnknownName
from synthgen.prompts import sample_seed

__all__ = [
    "Activations",
    "EmptyPromptDenoiser",
    "FeatureReader",
    "as_map",
    "block_names",
    "block_outputs",
    "middle_block",
]

T = TypeVar("T")

_LARGEST = torch.finfo(torch.float16).max
NOT_FINITE = "the generator's activations are not finite numbers; try another dtype, such as bfloat16 or float32"


@dataclass(frozen=True, slots=True)
class Activations:
    """A network's activations for a batch of images: the channels of all blocks at all timesteps, concatenated."""

    pooled: Float32[Tensor, "b d"]  # the mean over space
    patches: Float16[Tensor, "b d g g"]  # on the requested grid
    maps: tuple[Float16[Tensor, "b t _ _ _"], ...] = ()  # per block, at each timestep, no larger than requested


class EmptyPromptDenoiser:
    """A model's denoisers with an empty prompt, which is encoded again only for latents of another shape."""

    def __init__(self, model: DiffusionBackbone) -> None:
        self._model = model
        self._cached: tuple[torch.Size, Denoiser] | None = None

    def __call__(self, latents: Tensor) -> Denoiser:
        """A denoiser for latents of this shape; gradients can flow through it."""
        if self._cached is None or self._cached[0] != latents.shape:
            with torch.inference_mode(False), torch.no_grad():
                self._cached = latents.shape, self._model.casting_denoiser([""] * len(latents), latents)
        return self._cached[1]


class _LastBlockDone(Exception):
    """Raised when the last block to read has computed, to skip the rest of the pass."""


class FeatureReader:
    """A frozen diffusion model as an image encoder.

    Args:
        backbone: a backbone of a family in :mod:`synthgen.diffusion`.
        timesteps: timesteps of training (0 to 999), with one pass per image at each.
        blocks: names of the blocks to read, as in :func:`block_names`; empty: the middle one.
        inversion_steps: if above 0, images are not noised but inverted to noise in this many deterministic steps (see
            :meth:`DiffusionBackbone.invert`), and read at the steps nearest to the timesteps, as DiffusionSeg proposes
            (Ma et al., 2023; its steps are not known).
        seed: determines, together with an image's key, the noise of that image, one draw for all timesteps.

    Raises:
        ConfigError: the backbone is of no such family, or its network has no such block; the message lists its blocks.
    """

    most = 16  # largest batch

    def __init__(
        self,
        backbone: object,
        *,
        timesteps: Sequence[int],
        blocks: Sequence[str] = (),
        inversion_steps: int = 0,
        seed: int = 0,
    ) -> None:
        model = getattr(backbone, "family", backbone)
        if not isinstance(model, DiffusionBackbone):
            raise ConfigError(f"the activations of {type(backbone).__name__} cannot be read: it is no known family")
        known = block_names(model.network)
        for block in blocks:
            if block not in known:
                raise UnknownName.among(f"block of {type(model.network).__name__}", block, known)
        self.model, self.timesteps, self.inversion_steps, self.seed = model, tuple(timesteps), inversion_steps, seed
        self.seen_at: tuple[float, ...] = ()  # timesteps of the inversion, set by the first read
        self.blocks = tuple(sorted(set(blocks), key=known.index)) or (middle_block(model.network),)
        self._denoiser = EmptyPromptDenoiser(self.model)

    @property
    def image_size(self) -> int:
        """The side of the square input, in pixels: the shorter side of the model's own images."""
        return min(self.model.size)

    def describe(self) -> dict[str, Any]:
        """The settings of the reader, for the record; ``seen_at`` are the nearest timesteps of an inversion."""
        settings: dict[str, Any] = {"timesteps": self.timesteps, "blocks": self.blocks, "image_size": self.image_size}
        if not self.inversion_steps:
            return settings
        return settings | {"inversion_steps": self.inversion_steps, "seen_at": self.seen_at}

    @cached_property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Channels, rows and columns of each block at one timestep; found by a pass over a black image."""
        side = self.image_size
        black = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        (maps,) = self._in_batches("read", black, lambda some: self._maps(black[some], ("",)))
        return tuple((one.shape[1], one.shape[2], one.shape[3]) for one in maps[: len(self.blocks)])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels of all blocks at all timesteps, and rows and columns of the finest block."""
        channels, rows, columns = zip(*self.shapes, strict=True)
        return len(self.timesteps) * sum(channels), max(rows), max(columns)

    def latents(self, images: UInt8[Tensor, "b S S 3"]) -> Float32[Tensor, "b c h w"]:
        """Latents of images by the model's autoencoder; a batch that does not fit into memory is halved.

        Raises:
            SynthgenError: the device has too little memory for one image.
        """
        device = self.model.pipeline._execution_device

        def encode(some: slice) -> Tensor:
            with torch.no_grad():
                return self.model.encode(images[some].to(device)).float().cpu()

        return torch.cat(self._in_batches("encode", images, encode))

    def read(self, images: UInt8[Tensor, "b S S 3"], keys: Sequence[str], grid: int, largest: int = 0) -> Activations:
        """The activations for images, pooled and on a grid of ``grid`` rows and columns.

        ``largest`` above 0 adds the maps of each block, average-pooled to at most this many rows and columns. A batch
        that does not fit into memory is halved.

        Raises:
            SynthgenError: the device has too little memory for one image.
            ConfigError: the activations are not finite numbers.
        """

        def read(some: slice) -> Activations:
            return self._read(images[some], keys[some], grid, largest)

        return _joined(self._in_batches("read", images, read))

    def _in_batches(self, verb: str, images: Tensor, compute: Callable[[slice], T]) -> list[T]:
        """Call ``compute`` on images, ``most`` at a time or as many as memory allows."""
        kind = f"images of {images.shape[1]} x {images.shape[2]} pixels to {verb}"
        return self.model.in_batches(kind, len(images), compute, self.most)

    def _read(self, images: Tensor, keys: Sequence[str], grid: int, largest: int) -> Activations:
        maps = self._maps(images, keys)
        pooled = torch.cat([one.mean((2, 3)) for one in maps], 1).cpu()
        if not pooled.isfinite().all():
            raise ConfigError(NOT_FINITE)
        resized = [
            F.interpolate(one, (grid, grid), mode="bilinear", align_corners=False, antialias=True) for one in maps
        ]
        return Activations(pooled, _to_float16(torch.cat(resized, 1)), self._own(maps, largest) if largest else ())

    def _own(self, maps: Sequence[Tensor], largest: int) -> tuple[Float16[Tensor, "b t _ _ _"], ...]:
        """The maps of each block at all timesteps, at their own size."""
        small = [F.adaptive_avg_pool2d(one, (min(one.shape[2], largest), min(one.shape[3], largest))) for one in maps]
        blocks = len(self.blocks)
        return tuple(_to_float16(torch.stack(small[block::blocks], 1)) for block in range(blocks))

    def _maps(self, images: Tensor, keys: Sequence[str]) -> list[Float32[Tensor, "b _ _ _"]]:
        """The map of each block at each timestep: of all blocks at the first one, then of all at the second."""
        model = self.model
        with torch.no_grad():  # not inference mode: weights that offloading moves in it could have no gradients later
            latents = model.encode(images.to(model.pipeline._execution_device)).float()
            denoise = self._denoiser(latents)
            passes: Iterable[Mapping[str, Any]] = (
                self._inverted(latents, denoise) if self.inversion_steps else self._noised(latents, keys, denoise)
            )
            grid = model.grid(images.shape[1], images.shape[2])
            return [as_map(seen[block], grid).float() for seen in passes for block in self.blocks]

    def _noised(self, latents: Tensor, keys: Sequence[str], denoise: Denoiser) -> Iterator[Mapping[str, Any]]:
        """Block outputs at each timestep, for noised latents."""
        noise = self.model.noise([sample_seed(self.seed, key) for key in keys], latents)
        for timestep in self.timesteps:
            with block_outputs(self.model.network, self.blocks) as seen:
                denoise(self.model.noised(latents, noise, timestep), timestep)
            yield seen

    def _inverted(self, latents: Tensor, denoise: Denoiser) -> list[Mapping[str, Any]]:
        """Block outputs during an inversion, at the step nearest to each timestep."""
        times, step = self.model.inversion(self.inversion_steps, latents)
        seen_at, found = self._nearest(times), dict[int, Mapping[str, Any]]()
        for number, time in enumerate(times[: max(seen_at) + 1]):
            with block_outputs(self.model.network, self.blocks if number in seen_at else (), whole=True) as seen:
                output = denoise(latents, time)
            latents, found[number] = step(latents, number, output), seen
        return [found[number] for number in seen_at]

    def _nearest(self, times: Sequence[float]) -> list[int]:
        """The step of an inversion that lies nearest to each timestep."""
        nearest = [min(range(len(times)), key=lambda number: abs(times[number] - asked)) for asked in self.timesteps]
        if len(set(nearest)) < len(nearest):
            raise ConfigError(
                f"an inversion in {len(times)} steps passes several of the timesteps {list(self.timesteps)} in one "
                "step; give more generator_inversion_steps, or timesteps further apart"
            )
        self.seen_at = tuple(round(times[number], 1) for number in nearest)
        return nearest


def block_names(network: nn.Module) -> tuple[str, ...]:
    """The blocks of a network, in the order in which they compute, by their names in ``diffusers``.

    In a U-Net, a block is a residual block with the attention after it, named after that attention if there is one;
    down- and up-samplers are not counted, as in DDAE. In a transformer, it is a transformer block.
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

    DDAE found the best ones there: the 6th of 12 of its U-Net, and layer 13 of DiT's 28.
    """
    names = block_names(network)
    names = tuple(name for name in names if name.startswith("up_blocks.")) or names
    return names[(len(names) - 1) // 2]


@contextmanager
def block_outputs(network: nn.Module, blocks: Sequence[str], *, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Collect the output of each block in one pass, which stops after the last of them unless ``whole``."""
    seen: dict[str, Any] = {}

    def hook(block: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            seen[block] = output
            if len(seen) == len(blocks) and not whole:
                raise _LastBlockDone

        return keep

    handles = [network.get_submodule(block).register_forward_hook(hook(block)) for block in blocks]
    try:
        yield seen
    except _LastBlockDone:
        pass
    finally:
        for handle in handles:
            handle.remove()


def as_map(output: Any, grid: tuple[int, int]) -> Tensor:
    """A block's output as b d h w: a tensor or the last of several, which in a transformer are the image's tokens."""
    values: Tensor = output if isinstance(output, Tensor) else output[-1]
    return values if values.dim() == 4 else values.mT.reshape(len(values), -1, *grid)


def _to_float16(values: Tensor) -> Float16[Tensor, "*_"]:
    """Copy to the CPU as float16, clamped to its range."""
    return values.clamp(-_LARGEST, _LARGEST).half().cpu()


def _joined(parts: Sequence[Activations]) -> Activations:
    return Activations(
        torch.cat([part.pooled for part in parts]),
        torch.cat([part.patches for part in parts]),
        tuple(torch.cat(block) for block in zip(*(part.maps for part in parts), strict=True)),
    )
