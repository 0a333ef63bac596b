"""The encoder as a ``transformers`` ViT, with the same features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from synthgen.errors import one_line
from synthgen.models.vit import VisionTransformer
from synthgen.stores import filled
from synthgen.stores.tar import storage_error, write_json

if TYPE_CHECKING:
    from transformers import ViTModel

__all__ = ["export_encoder", "to_transformers"]

#: Names inside a block, here and there; ``transformers`` 5 renamed its modules and still writes files of version 4.
_VERSION_4 = {
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


def to_transformers(encoder: VisionTransformer) -> ViTModel:
    """A ``ViTModel`` whose ``last_hidden_state`` is what ``encoder`` returns (class token first), to rounding."""
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
    state = _renamed(encoder, newer="layers.0.layernorm_before.weight" in model.state_dict())
    model.load_state_dict(state)
    return model.eval()


def export_encoder(encoder: VisionTransformer, folder: Path) -> None:
    """Save what ``ViTModel.from_pretrained(folder)`` and ``ViTImageProcessor.from_pretrained(folder)`` read.

    Raises:
        StorageError: the disk is full or the folder may not be written to; or the store does not answer.
    """
    from transformers.utils import logging

    model = to_transformers(encoder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one file needs none, and it would cross the bar of the training
    try:
        with filled(folder) as here:
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


def _renamed(encoder: VisionTransformer, *, newer: bool) -> dict[str, Tensor]:
    ours = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    state = {
        "embeddings.cls_token": ours["cls_token"],
        "embeddings.position_embeddings": ours["pos_embed"],
    }
    for end in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{end}"] = ours[f"patch_embed.proj.{end}"]
        state[f"layernorm.{end}"] = ours[f"norm.{end}"]
    return state | _blocks(ours, "layers" if newer else "encoder.layer", newer=newer)


def _blocks(ours: Mapping[str, Tensor], prefix: str, *, newer: bool) -> dict[str, Tensor]:
    """The parameters of all ``blocks`` under the names they have there."""
    names, state = _VERSION_5 if newer else _VERSION_4, {}
    numbers = sorted({name.split(".")[1] for name in ours if name.startswith("blocks.")})
    for block, end in ((number, end) for number in numbers for end in ("weight", "bias")):
        qkv = ours[f"blocks.{block}.attn.qkv.{end}"].chunk(3)
        parts = dict(zip(("attn.q", "attn.k", "attn.v"), qkv, strict=True))
        for here, there in names.items():
            tensor = parts[here] if here in parts else ours[f"blocks.{block}.{here}.{end}"]
            state[f"{prefix}.{block}.{there}.{end}"] = torch.clone(tensor)
    return state
