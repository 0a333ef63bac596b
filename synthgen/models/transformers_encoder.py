"""Vision transformers of ``transformers`` (DINOv2, CLIP, SigLIP, ViT, MAE, ...) as encoders beside our own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, MissingWeights, one_line
from synthgen.models.hub import hub_folder, is_hub_id
from synthgen.models.vit import Encoder, EncoderConfig, load_encoder
from synthgen.stores import parse_location
from synthgen.stores.remote import RemotePath
from synthgen.untrusted import read_file, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["VisionTower", "encoder_folder", "is_tower", "load_tower", "open_encoder"]

_OWN = "encoder.safetensors"
_BLOCK = re.compile(r"\.(?:layer|layers)\.(\d+)\.")
_UNUSED = re.compile(r"(?:^|\.)(?:pooler|mask_token|head)(?:\.|$)")  # nothing of it is in last_hidden_state
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


class VisionTower(Encoder):
    """A vision transformer of ``transformers``: its ``last_hidden_state``, without registers.

    Args:
        network: the model; it takes ``pixel_values`` of ``config.image_size`` pixels.
        config: its shape and normalisation.
        prefix: the number of tokens before those of the patches; the first of them is the class token.
        options: keyword arguments of each call.
    """

    def __init__(self, network: nn.Module, config: EncoderConfig, prefix: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.config, self.prefix, self.options = network, config, prefix, options
        self.has_class_token = prefix > 0

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b t d"]:
        """Tokens of whole, normalised images: the class token (or their mean), then the patches row by row."""
        tokens = self.network(pixel_values=images, **self.options).last_hidden_state
        patches = tokens[:, self.prefix :]
        first = tokens[:, :1] if self.prefix else patches.mean(1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    def untrained(self) -> VisionTower:
        """An encoder of the same shape with new weights, on the CPU."""
        network = type(self.network)._from_config(self.network.config)  # type: ignore[attr-defined]
        return VisionTower(network.eval(), self.config, self.prefix, self.options).eval()

    def layer(self, name: str) -> int:
        """By its name: embeddings are of layer 0, a numbered block k of k + 1, all else of depth + 1."""
        if block := _BLOCK.search(name):
            return int(block[1]) + 1
        return 0 if "embeddings" in name else self.config.depth + 1


def encoder_folder(name: str) -> Path:
    """The folder of an encoder of ``pretrain`` or a vision model of ``transformers``, given by path or hub id.

    A model is downloaded once into the hub's cache and used from there until ``hf download`` brings a newer one.

    Raises:
        MissingArtifact: the folder holds no encoder.
        MissingWeights: the model of a hub id is not in the cache and cannot be downloaded, or has no safetensors.
    """
    folder = parse_location(name)
    if (folder / _OWN).is_file() or is_tower(folder):
        return folder
    if folder.exists() or not is_hub_id(name):
        raise MissingArtifact(
            f"there is no encoder in {folder} ({_OWN}, or config.json and safetensors of a vision model of "
            "transformers); give a folder of pretrain"
        )
    fetched = hub_folder(name)
    if not is_tower(fetched):
        raise MissingWeights(f"{name} on the hub is not a model of transformers with safetensors; choose another")
    return fetched


def is_tower(folder: Path) -> bool:
    """Whether a folder holds a model of ``transformers`` with safetensors."""
    if (folder / _OWN).is_file() or not any(folder.glob("*.safetensors")):
        return False
    try:
        described = read_json(read_file(folder / "config.json"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and "model_type" in described


def open_encoder(folder: str | Path) -> Encoder:
    """The encoder in a folder of :func:`encoder_folder`, in evaluation mode on the CPU.

    Raises:
        MissingArtifact, CorruptFile, ConfigError: see :func:`load_encoder` and :func:`load_tower`.
    """
    folder = parse_location(folder)
    return load_tower(folder) if is_tower(folder) else load_encoder(folder)


def load_tower(folder: Path, patches: int = 0) -> VisionTower:
    """A vision transformer of ``transformers``; the vision tower of a model of images and texts.

    Args:
        folder: with config.json, safetensors, and preprocessor_config.json for size and normalisation.
        patches: along a side, if not the model's own number; its positions are then interpolated.

    Raises:
        ConfigError: the model is not a plain vision transformer, needs custom code, or lies in a store.
        CorruptFile: the files cannot be read, or contradict each other.
    """
    if isinstance(folder, RemotePath):
        raise ConfigError(f"{folder} is in a store, and transformers reads folders; copy it to this machine first")
    try:
        described = read_json(read_file(folder / "config.json"))
        if not isinstance(described, dict):
            raise ValueError("config.json is not an object")
        processor = folder / "preprocessor_config.json"
        prepared = read_json(read_file(processor)) if processor.is_file() else {}
        if "auto_map" in described:
            raise ConfigError(f"the model in {folder} needs custom code, which synthgen does not run; choose another")
        with _silence():
            network = _vision(folder)
        return _build_tower(network.eval(), folder, prepared if isinstance(prepared, dict) else {}, patches)
    except _BROKEN as error:
        raise CorruptFile(
            f"the model in {folder} cannot be read as a vision model of transformers: {one_line(error)}; "
            "download it again, with its safetensors"
        ) from None


def _vision(folder: Path) -> nn.Module:
    """The network; the vision tower of a model of images and texts."""
    from transformers import AutoConfig, AutoModel, ViTModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    is_mae = config.model_type == "vit_mae"  # whose own class hides patches; its weights have a ViT's names
    model, report = (ViTModel if is_mae else AutoModel).from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    network: nn.Module = getattr(model, "vision_model", model)
    prefix = "vision_model." if network is not model else ""
    missing = [name for name in report["missing_keys"] if name.startswith(prefix) and not _UNUSED.search(name)]
    if missing:
        raise ValueError(f"its weights lack {missing[0]}, and {len(missing)} in all")
    return network


def _build_tower(network: nn.Module, folder: Path, prepared: dict[str, Any], patches: int) -> VisionTower:
    """The tower at the first image size that it supports.

    Raises:
        ConfigError: it supports none of them.
    """
    about: PretrainedConfig = network.config
    try:
        patch, own = int(about.patch_size), int(about.image_size)
        config = EncoderConfig(
            image_size=own // patch * patch,
            patch_size=patch,
            dim=int(about.hidden_size),
            depth=int(about.num_hidden_layers),
            num_heads=int(about.num_attention_heads),
            mean=_rgb(prepared.get("image_mean"), EncoderConfig.mean),
            std=_rgb(prepared.get("image_std"), EncoderConfig.std),
        )
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"the {about.model_type} in {folder} is not a vision transformer with square patches of one size"
        ) from None
    sizes = [patches * patch] if patches else [_side(prepared) // patch * patch, config.image_size]
    for size in dict.fromkeys(filter(None, sizes)):
        for options in ({}, {"interpolate_pos_encoding": True}):
            tower = VisionTower(network, replace(config, image_size=size), 0, options)
            prefix = _tokens_before(tower)
            if prefix is not None:
                return VisionTower(network, tower.config, prefix, options).eval()
    raise ConfigError(
        f"the {about.model_type} in {folder} does not give a token for each of its patches at {sizes[-1]} pixels"
    )


@torch.no_grad()
def _tokens_before(tower: VisionTower) -> int | None:
    """The number of tokens before those of the patches, from a run on zeros; None if the size is not supported."""
    side, num_patches = tower.config.image_size, tower.config.grid**2
    try:
        tokens = tower.network(pixel_values=torch.zeros(1, 3, side, side), **tower.options).last_hidden_state
    except (RuntimeError, ValueError, TypeError):  # an unsupported size or option
        return None
    registers = 1 + int(getattr(tower.network.config, "num_register_tokens", 0) or 0)
    before = tokens.shape[1] - num_patches if tokens.ndim == 3 else -1
    return before if 0 <= before <= registers + 1 else None  # one more: the distillation token


def _side(prepared: dict[str, Any]) -> int:
    """The side of its square input images in pixels; 0 where it is not given or they are not square."""
    for name in ("crop_size", "size"):
        value = prepared.get(name)
        sides = set(value.values()) if isinstance(value, dict) else {value}
        if prepared.get("do_center_crop", True) is False and name == "crop_size":
            continue
        if len(sides) == 1 and isinstance(side := sides.pop(), int) and side > 0:
            return side
    return 0


def _rgb(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if values is None:
        return default
    red, green, blue = (float(value) for value in values)
    return red, green, blue


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the warnings and bars of ``transformers``: unused weights of heads are not an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
