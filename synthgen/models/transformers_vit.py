"""Our encoder as a ViT of ``transformers``, and back: the same weights under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from synthgen.config import build
from synthgen.errors import ConfigError, CorruptFile, one_line
from synthgen.models.vit import EncoderConfig, VisionTransformer, check_size
from synthgen.stores import staging_folder
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import storage_error, write_json
from synthgen.untrusted import read_file, read_json

if TYPE_CHECKING:
    from transformers import ViTModel

__all__ = ["from_transformers", "save_transformers", "to_transformers"]

_KINDS = ("vit", "vit_mae")  # the models of MAE, the first DINO and supervised ViTs are all of these
_PREFIX = "vit."  # of the encoder's names in a model with further parts
_UNUSED = ("pooler.", "embeddings.mask_token")  # last_hidden_state does not depend on these
_SHAPE = {  # our field, theirs, and the default of theirs in config.json
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
}
_VERSION_4 = {  # our names inside a block, and theirs; version 5 renamed its modules and still saves these
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_VERSION_5 = _VERSION_4 | {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCKS = {"encoder.layer": _VERSION_4, "layers": _VERSION_5}  # by the name of their list of blocks


def to_transformers(encoder: VisionTransformer) -> ViTModel:
    """A ``ViTModel`` whose ``last_hidden_state`` equals the tokens of ``encoder`` up to rounding, class token first."""
    from transformers import ViTConfig, ViTModel

    config = encoder.config
    model = ViTModel(
        ViTConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.dim,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            image_size=config.image_size,
            patch_size=config.patch_size,
            qkv_bias=True,
        ),
        add_pooling_layer=False,
    )
    model.load_state_dict(_theirs(encoder.state_dict(), _block_list(model.state_dict())))
    return model.eval()


def save_transformers(encoder: VisionTransformer, folder: Path) -> None:
    """Write the files of ``ViTModel.from_pretrained(folder)`` and ``ViTImageProcessor.from_pretrained(folder)``.

    Raises:
        StorageError: the disk is full, the folder is not writable, or the store does not answer.
    """
    from transformers.utils import logging

    model = to_transformers(encoder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would overwrite the progress bar of the training
    try:
        with staging_folder(folder) as here:
            model.save_pretrained(here)
    except OSError as error:
        raise storage_error(folder, error) from error
    except SafetensorError as error:  # the library's own form of it
        raise storage_error(folder, OSError(one_line(error))) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    config = encoder.config
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    write_json(folder / "preprocessor_config.json", processor)


def from_transformers(folder: Path) -> VisionTransformer:
    """The encoder of a ``vit`` or ``vit_mae`` of ``transformers``, in evaluation mode on the CPU.

    Its tokens equal the model's ``last_hidden_state`` up to rounding and the epsilon of layer norms: 1e-12 by default
    in ``transformers``, 1e-6 in the code that such weights come from and in ours. Learned positions are kept, and are
    not trained further.

    Raises:
        ConfigError: the model has another architecture, or lies in a store.
        CorruptFile: the files cannot be read or contradict each other, or tensors are missing or left over.
    """
    if isinstance(folder, RemotePath):
        raise ConfigError(f"{folder} is in a store, and transformers reads folders; copy it to this machine first")
    try:
        config = _config(folder)
        files = [folder / "model.safetensors"]
        files = files if files[0].is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
        check_size(config.min_weights, *files)
        encoder = VisionTransformer(config)
        encoder.load_state_dict(_ours(_read(files), encoder.state_dict()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CorruptFile(
            f"the model in {folder} cannot be read as a ViT: {one_line(error)}; download it again, with its safetensors"
        ) from None
    return encoder.eval()


def _config(folder: Path) -> EncoderConfig:
    """The encoder's config, from config.json and preprocessor_config.json.

    Raises:
        ConfigError: the architecture differs from our ViT's.
        OSError, ValueError: config.json cannot be read.
    """
    described: dict[str, Any] = read_json(read_file(folder / "config.json"))
    kind = described.get("model_type")
    if kind not in _KINDS:
        raise ConfigError(
            f"the {kind} in {folder} has another architecture than synthgen's ViT; choose an encoder of synthgen "
            f"pretrain, or a {' or '.join(_KINDS)} of transformers"
        )
    shape = {ours: described.get(theirs, default) for ours, (theirs, default) in _SHAPE.items()}
    act, width = described.get("hidden_act", "gelu"), described.get("intermediate_size", 3072)
    bias, channels = described.get("qkv_bias", True), described.get("num_channels", 3)
    epsilon = described.get("layer_norm_eps", 1e-12)
    as_ours = {
        f"hidden_act is {act}": act == "gelu",
        f"intermediate_size is {width}": width == 4 * shape["dim"],
        f"qkv_bias is {bias}": bias is True,
        f"num_channels is {channels}": channels == 3,
        f"layer_norm_eps is {epsilon}": 0 <= epsilon <= 1e-6,
    }
    if other := [what for what, same in as_ours.items() if not same]:
        raise ConfigError(f"the {kind} in {folder} has another architecture than synthgen's ViT: its {other[0]}")
    processor = folder / "preprocessor_config.json"
    prepared = read_json(read_file(processor)) if processor.is_file() else {}
    normalisation = {ours: prepared.get(theirs) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))}
    return build(
        EncoderConfig,
        shape | {name: tuple(map(float, three)) for name, three in normalisation.items() if three is not None},
        where=str(folder / "config.json"),
    )


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors that ``last_hidden_state`` depends on, by their names in ``ViTModel``."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if any(name.startswith(_PREFIX) for name in tensors):
        tensors = {n.removeprefix(_PREFIX): tensor for n, tensor in tensors.items() if n.startswith(_PREFIX)}
    return {name: tensor.float() for name, tensor in tensors.items() if not name.startswith(_UNUSED)}


def _ours(theirs: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, with our shapes.

    Raises:
        ValueError: a tensor is missing, has another shape, or is left over.
    """
    blocks, found = _block_list(theirs), dict[str, Tensor]()
    for name, ours in like.items():
        parts = [theirs.pop(other, None) for other in _their_names(name, blocks)]
        if any(part is None for part in parts):
            raise ValueError(f"it lacks {_their_names(name, blocks)[0]}")
        found[name] = torch.cat([part for part in parts if part is not None])
        if found[name].shape != ours.shape:
            raise ValueError(f"its {name} has the shape {tuple(found[name].shape)} instead of {tuple(ours.shape)}")
    if theirs:
        raise ValueError(f"{len(theirs)} of its tensors are unknown to our ViT, such as {min(theirs)}")
    return found


def _theirs(ours: Mapping[str, Tensor], blocks: str) -> dict[str, Tensor]:
    """Our tensors under their names."""
    return {
        name: part.detach()
        for own, tensor in ours.items()
        for names in [_their_names(own, blocks)]
        for name, part in zip(names, tensor.chunk(len(names)), strict=True)
    }


def _block_list(theirs: Mapping[str, Tensor]) -> str:
    """The name of the list of blocks, which tells the version."""
    return "layers" if any(name.startswith("layers.") for name in theirs) else "encoder.layer"


def _their_names(name: str, blocks: str) -> list[str]:
    """Their name of our tensor; three names where query, key and value are one tensor of ours."""
    first, *rest = name.split(".")
    if first == "blocks":
        number, inner, end = rest[0], ".".join(rest[1:-1]), rest[-1]
        parts = [f"attn.{part}" for part in "qkv"] if inner == "attn.qkv" else [inner]
        return [f"{blocks}.{number}.{_BLOCKS[blocks][part]}.{end}" for part in parts]
    module = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }[first]
    return [".".join([module, *rest[-1:]])]
