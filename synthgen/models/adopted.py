"""A ViT of ``transformers`` as our own encoder: its weights under our names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from synthgen.config import build
from synthgen.errors import ConfigError, CorruptFile, one_line
from synthgen.export import _VERSION_4, _VERSION_5
from synthgen.models.vit import EncoderConfig, VisionTransformer
from synthgen.stores.remote import RemotePath
from synthgen.untrusted import read_file, read_json

__all__ = ["adopt"]

_KINDS = ("vit", "vit_mae")  # MAE's, DINO's first, and the supervised ones are all of these
_INSIDE = "vit."  # before the names of the encoder, in a model that has more than it
_UNASKED = ("pooler.", "embeddings.mask_token")  # what no token of the last layer depends on
_SIZES = {  # ours, theirs, and what theirs is where config.json leaves it out
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
}
_BLOCKS = {"encoder.layer": _VERSION_4, "layers": _VERSION_5}


def adopt(folder: Path) -> VisionTransformer:
    """The encoder of a ``vit`` or ``vit_mae`` of ``transformers``, in evaluation mode on the CPU.

    Its tokens are the model's ``last_hidden_state``, to rounding and but for the 1e-12 that ``transformers`` adds to a
    variance where the codes that such weights come from, and ours, add 1e-6. Positions that were learned are kept as
    they are, and learn no more.

    Raises:
        ConfigError: it is another kind of network, or lies in a store.
        CorruptFile: its files cannot be read, do not fit each other, or hold more of an encoder than ours takes.
    """
    if isinstance(folder, RemotePath):
        raise ConfigError(f"{folder} is in a store, and models of transformers are read here; copy it first")
    try:
        config = _config(folder)
        files = [folder / "model.safetensors"]
        files = files if files[0].is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
        least = config.depth * config.dim**2 + config.dim * (3 * config.patch_size**2 + config.grid**2)
        if sum(file.stat().st_size for file in files) < least:
            raise ValueError("its weights are of a smaller network than its description, or not there")
        encoder = VisionTransformer(config)
        encoder.load_state_dict(_ours(_read(files), encoder.state_dict()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CorruptFile(
            f"the model in {folder} cannot be read as a ViT: {one_line(error)}; get it again, with its safetensors"
        ) from None
    return encoder.eval()


def _config(folder: Path) -> EncoderConfig:
    """Its shape, if it is built as our ViT.

    Raises:
        ConfigError: it is not.
        OSError, ValueError: it is not described.
    """
    described: dict[str, Any] = read_json(read_file(folder / "config.json"))
    kind = described.get("model_type")
    if kind not in _KINDS:
        raise ConfigError(
            f"the {kind} in {folder} is built otherwise than synthgen's ViT, and its weights have no place there; an "
            f"encoder of synthgen pretrain will do, or a {' or '.join(_KINDS)} of transformers"
        )
    sizes = {ours: described.get(theirs, usual) for ours, (theirs, usual) in _SIZES.items()}
    act, width = described.get("hidden_act", "gelu"), described.get("intermediate_size", 3072)
    bias, channels = described.get("qkv_bias", True), described.get("num_channels", 3)
    least = described.get("layer_norm_eps", 1e-12)
    built = {
        f"hidden_act is {act}": act == "gelu",
        f"intermediate_size is {width}": width == 4 * sizes["dim"],
        f"qkv_bias is {bias}": bias is True,
        f"num_channels is {channels}": channels == 3,
        f"layer_norm_eps is {least}": 0 <= least <= 1e-6,
    }
    if other := [said for said, same in built.items() if not same]:
        raise ConfigError(f"the {kind} in {folder} is built otherwise than synthgen's ViT: its {other[0]}")
    processor = folder / "preprocessor_config.json"
    prepared = read_json(read_file(processor)) if processor.is_file() else {}
    seen = {ours: prepared.get(theirs) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))}
    return build(
        EncoderConfig,
        sizes | {name: tuple(map(float, three)) for name, three in seen.items() if three is not None},
        where=str(folder / "config.json"),
    )


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    """The encoder's tensors by their names in it; heads that stand beside it are left out."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if any(name.startswith(_INSIDE) for name in tensors):
        tensors = {n.removeprefix(_INSIDE): tensor for n, tensor in tensors.items() if n.startswith(_INSIDE)}
    return {name: tensor.float() for name, tensor in tensors.items() if not name.startswith(_UNASKED)}


def _ours(theirs: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under our names, query, key and value in one.

    Raises:
        ValueError: one is missing or of another shape, or one is left over.
    """
    stem = next((stem for stem in _BLOCKS if any(name.startswith(f"{stem}.") for name in theirs)), "encoder.layer")
    found: dict[str, Tensor] = {}
    for name, like in wanted.items():
        parts = [theirs.pop(other, None) for other in _names(name, stem)]
        if any(part is None for part in parts):
            raise ValueError(f"it lacks {_names(name, stem)[0]}")
        found[name] = torch.cat([part for part in parts if part is not None])
        if found[name].shape != like.shape:
            raise ValueError(f"its {name} has the shape {tuple(found[name].shape)} instead of {tuple(like.shape)}")
    if theirs:
        raise ValueError(f"{len(theirs)} of its tensors have no place in our ViT, such as {min(theirs)}")
    return found


def _names(name: str, stem: str) -> list[str]:
    """What a tensor of ours is called there."""
    first, *rest = name.split(".")
    if first == "blocks":
        number, inner, end = rest[0], ".".join(rest[1:-1]), rest[-1]
        parts = [f"attn.{part}" for part in "qkv"] if inner == "attn.qkv" else [inner]
        return [f"{stem}.{number}.{_BLOCKS[stem][part]}.{end}" for part in parts]
    plain: dict[str, Any] = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed": f"embeddings.patch_embeddings.projection.{rest[-1] if rest else ''}",
        "norm": f"layernorm.{rest[-1] if rest else ''}",
    }
    return [plain[first]]
