"""Images that do not show what their prompt says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from synthgen.config import check_range
from synthgen.errors import ConfigError, CorruptFile, MissingWeights, one_line
from synthgen.filters import Candidate, Filter, Measure
from synthgen.models.dual import load_dual_encoder
from synthgen.models.hub import hub_folder, is_hub_id
from synthgen.stores import parse_location
from synthgen.stores.checksum import sha256_of
from synthgen.stores.remote import RemotePath
from synthgen.untrusted import read_file, read_json

__all__ = ["Clip"]

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # CLIP and SigLIP, fast and slow tokenizers
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)

Similarity = Callable[[list[UInt8[np.ndarray, "H W 3"]], list[str]], Float[Tensor, " n"]]


@dataclass(frozen=True, kw_only=True)
class Clip(Filter):
    """Reject images whose CLIP similarity with their prompt is below a threshold (Radford et al., 2021).

    The figure is the cosine of the two embeddings, in [-1, 1]. What is low depends on the model: look at the figures of
    a small run first (docs/filters.md).
    """

    accelerated: ClassVar = True

    model: str  # folder or hub id of a CLIP or SigLIP model of transformers, or folder of a vlp training
    min_similarity: float = 0.2  # least cosine of image and prompt

    def __post_init__(self) -> None:
        check_range(ge=-1, le=1, min_similarity=self.min_similarity)

    def inputs(self) -> dict[str, str]:
        """The weights, which may be replaced in a folder or on the hub; a model of the hub is downloaded.

        Raises:
            MissingWeights: see :func:`_folder`.
        """
        files = sorted(_folder(self.model).glob("*.safetensors"))
        return {f"{path.name} of {self.model}": sha256_of(path) for path in files}

    def open(self, device: str) -> Measure:
        """The function that compares images with their prompts."""
        folder = _folder(self.model)
        own = (folder / "text.safetensors").is_file()
        similarity = _of_training(folder, device) if own else _of_transformers(folder, device)

        def measure(candidates: Sequence[Candidate]) -> list[float | None]:
            texts = [candidate.request.prompt.text for candidate in candidates]
            with torch.inference_mode():
                found = similarity([candidate.image for candidate in candidates], texts)
            return [round(value, 4) if math.isfinite(value) else None for value in found.tolist()]

        return measure

    def reject(self, figures: Iterable[tuple[str, float | None]]) -> dict[str, str]:
        """Those below ``min_similarity``, and those that the model gives no finite figure."""
        return {
            key: "its similarity with its prompt is not a finite number"
            if value is None
            else f"a similarity of {value:.3f} with its prompt, less than {self.min_similarity:g}"
            for key, value in figures
            if value is None or value < self.min_similarity
        }


def _folder(name: str) -> Path:
    """The folder of a model.

    Raises:
        MissingWeights: there is no such folder, and the model cannot be downloaded.
    """
    folder = parse_location(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not is_hub_id(name):
        raise MissingWeights(f"there is no model in {name} (config.json is missing); give a folder or a hub id")
    return hub_folder(name, _VOCABULARIES)


def _of_training(folder: Path, device: str) -> Similarity:
    """By both encoders of a vision-language training of ``pretrain``."""
    dual = load_dual_encoder(folder).to(device)
    config = dual.encoder.config

    def similarity(images: list[UInt8[np.ndarray, "H W 3"]], texts: list[str]) -> Float[Tensor, " n"]:
        pixels = _pixels(images, config.image_size, config.mean, config.std).to(device)
        return (dual.embed_images(pixels) * dual.embed_texts(texts)).sum(dim=1)

    return similarity


def _of_transformers(folder: Path, device: str) -> Similarity:
    """By a CLIP or SigLIP model of ``transformers``.

    Raises:
        ConfigError: it is no model of images and texts, or is in a store.
        CorruptFile: it cannot be read.
    """
    from transformers import AutoModel, AutoTokenizer

    if isinstance(folder, RemotePath):
        raise ConfigError(f"{folder} is in a store, and transformers reads folders; copy it to this machine first")
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):  # these weights would be random
            raise ValueError(f"its weights lack {missing[0]}, and {len(missing)} in all")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        described = read_json(read_file(folder / "preprocessor_config.json"))
        mean, std = tuple(described["image_mean"]), tuple(described["image_std"])
    except _BROKEN as error:
        raise CorruptFile(
            f"the model in {folder} cannot be read by transformers: {one_line(error)}; download it again, with its "
            "tokenizer and its safetensors"
        ) from None
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    max_tokens = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
    if size is None or max_tokens is None:
        raise ConfigError(
            f"the {model.config.model_type} in {folder} does not compare images of one size with texts; "
            "give a CLIP or SigLIP model"
        )
    model.eval().to(device)

    def similarity(images: list[UInt8[np.ndarray, "H W 3"]], texts: list[str]) -> Float[Tensor, " n"]:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
        found = model(pixel_values=_pixels(images, size, mean, std).to(device), **tokens.to(device))
        return F.cosine_similarity(found.image_embeds, found.text_embeds).float().cpu()

    return similarity


def _pixels(
    images: list[UInt8[np.ndarray, "H W 3"]], size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "n 3 size size"]:
    """The central squares of the images at ``size`` pixels, normalised."""
    squares = []
    for image in images:
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
        squares.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32))
    values = (np.stack(squares) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())
