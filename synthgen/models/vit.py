"""The image encoder: a Vision Transformer with timm's parameter names, which can encode a subset of patches."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from synthgen.config import Choice, build, check_range
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, UnknownName, one_line
from synthgen.models.layers import Block, initialize, patchify, sincos_positions
from synthgen.models.linear import linear
from synthgen.stores import parse_location
from synthgen.stores.tar import write_bytes, write_json
from synthgen.untrusted import read_file, read_json

__all__ = [
    "MAX_PIXELS",
    "SIZES",
    "Encoder",
    "EncoderConfig",
    "VisionTransformer",
    "encoder_config",
    "load_encoder",
    "save_encoder",
]

#: Width, depth and heads of each named size. ``micro`` is for 64-pixel images on a laptop; the others are ViT's own.
SIZES: dict[str, tuple[int, int, int]] = {
    "micro": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

MAX_PIXELS = 224  # along a side of an encoder's input, unless the settings give another size


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder, and its normalisation: (pixels - mean) / std per channel, of pixels in [0, 1]."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE's code
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_range(ge=1, image_size=self.image_size, patch_size=self.patch_size)
        check_range(ge=1, dim=self.dim, depth=self.depth, num_heads=self.num_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads {self.num_heads} and of 4")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def min_weights(self) -> int:
        """A lower bound on the number of weights; a file with fewer bytes is not of this encoder."""
        return self.depth * self.dim**2 + self.dim * (3 * self.patch_size**2 + self.grid**2)


def encoder_config(choice: Choice | str, image_size: int) -> EncoderConfig:
    """The config of a choice such as ``{name: small, patch_size: 8}`` for images of ``image_size`` pixels.

    The size sets dim, depth and num_heads; options override them. The default ``image_size`` is that of the data, at
    most 224. The default ``patch_size`` is the largest of 16, 8 and 4 pixels that gives at least 64 patches: with
    fewer, hiding three quarters of them leaves too little context (papers have 196; below 128 pixels it is our choice).

    Raises:
        ConfigError: the size or an option is unknown, or the numbers contradict each other.
    """
    choice = Choice.of(choice)
    if choice.name not in SIZES:
        raise UnknownName.among("encoder", choice.name, SIZES)
    dim, depth, num_heads = SIZES[choice.name]
    options = {"dim": dim, "depth": depth, "num_heads": num_heads, **choice.options}
    side = options.get("image_size", min(image_size, MAX_PIXELS))
    if "patch_size" not in options and isinstance(side, int):
        options["patch_size"] = next((size for size in (16, 8) if side // size >= 8), 4)
    if "image_size" not in options:
        patch = options["patch_size"]
        options["image_size"] = side // patch * patch if isinstance(patch, int) and patch > 0 else side
    return build(EncoderConfig, options, where=f"encoder {choice.name}")


class PatchEmbed(nn.Module):
    """Linear projection of patches; the weight has the shape of timm's convolution and is applied as a matrix."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n d"]:
        """Tokens of patches in the layout of :func:`patchify`; the cost is that of the patches given."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # d (row column channel)
        return linear(patches, weight, self.proj.bias)


class Encoder(nn.Module, ABC):
    """The interface of evaluators: the tokens of an image, the class token before those of its patches."""

    config: EncoderConfig
    has_class_token = True  # if false, the first token is the mean of the patch tokens

    @abstractmethod
    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b t d"]:
        """Tokens of whole, normalised images: the class token, then the patches row by row."""

    @abstractmethod
    def untrained(self) -> Encoder:
        """An encoder of the same shape with new weights, on the CPU."""

    @abstractmethod
    def layer(self, name: str) -> int:
        """The layer of a weight: 0 for the embedding, k for block k - 1, depth + 1 for all after the blocks."""

    def features(self, images: Float[Tensor, "b 3 H W"], pool: str = "mean") -> Float[Tensor, "b d"]:
        """One vector an image: the ``mean`` of the patch tokens, or the class token (``cls``)."""
        tokens = self(images)
        pooled: Tensor = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        return pooled


class VisionTransformer(Encoder):
    """ViT (Dosovitskiy et al., 2021) with a class token and fixed sine-cosine positions, as MAE uses it."""

    pos_embed: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_buffer("pos_embed", sincos_positions(config.dim, config.grid))
        self.blocks = nn.ModuleList(Block(config.dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.apply(initialize)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # a view: the flattened projection
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b t d"]:
        """Tokens of whole, normalised images: the class token, then the patches row by row."""
        return self.encode(patchify(images, self.config.patch_size))

    def encode(
        self,
        patches: Float[Tensor, "b v p"],
        indices: Int[Tensor, "b v"] | None = None,
        modulations: Sequence[Float[Tensor, "b 6 d"]] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Tokens of the patches at ``indices`` of the grid; None means all of them, in order.

        ``modulations``, one per block, come from :class:`~synthgen.models.layers.Modulation`.
        """
        x = self.embed(patches, indices)
        for number, block in enumerate(self.blocks):
            x = block(x, None if modulations is None else modulations[number])
        y: Tensor = self.norm(x)
        return y

    def embed(
        self, patches: Float[Tensor, "b v p"], indices: Int[Tensor, "b v"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The input of the first block: the class token, then the patches, each plus its position."""
        positions = self.pos_embed[:, 1:] if indices is None else self.pos_embed[0, 1:][indices]
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, x.to(cls.dtype)], dim=1)

    def untrained(self) -> VisionTransformer:
        """An encoder of the same shape with new weights, on the CPU."""
        return VisionTransformer(self.config)

    def layer(self, name: str) -> int:
        """As in MAE's code: the class token is of layer 0, the last norm of layer depth + 1."""
        first, *rest = name.split(".")
        if first in ("cls_token", "patch_embed"):
            return 0
        return int(rest[0]) + 1 if first == "blocks" else self.config.depth + 1


def save_encoder(encoder: VisionTransformer, folder: Path, **about: Any) -> None:
    """Write ``encoder.safetensors`` and ``config.json``, the latter with the further fields ``about``."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    write_json(folder / "config.json", {**dataclasses.asdict(encoder.config), **about})
    write_bytes(folder / "encoder.safetensors", save(tensors))


def check_size(min_weights: int, *files: Path) -> None:
    """Check that files of weights have at least a byte per weight, before a network of that size is allocated.

    Raises:
        ValueError: they are smaller or missing, so the description of the network is false.
    """
    if sum(file.stat().st_size for file in files) < min_weights:
        raise ValueError("its weights are of a smaller network than its description, or not there")


def load_encoder(folder: str | Path) -> VisionTransformer:
    """The encoder that pretraining wrote to ``folder`` (``<run>/pretrain/mae``), in evaluation mode on the CPU.

    Raises:
        MissingArtifact: the folder holds no encoder.
        CorruptFile: the encoder's files cannot be read, or contradict each other.
    """
    folder = parse_location(folder)
    weights, described = folder / "encoder.safetensors", folder / "config.json"
    for path in (described, weights):
        if not path.is_file():
            raise MissingArtifact(
                f"there is no encoder in {folder} ({path.name} is missing); first run: synthgen pretrain"
            )
    try:
        value = read_json(read_file(described))
        names = {item.name for item in dataclasses.fields(EncoderConfig)}
        config = build(EncoderConfig, {k: v for k, v in value.items() if k in names}, where=str(described))
        check_size(config.min_weights, weights)
        encoder = VisionTransformer(config)
        encoder.load_state_dict(load_file(weights))
    except (ValueError, TypeError, OSError, AttributeError, ConfigError, SafetensorError, RuntimeError) as error:
        raise CorruptFile(
            f"the encoder in {folder} cannot be read: {one_line(error)}; delete it and pretrain again"
        ) from None
    return encoder.eval()
