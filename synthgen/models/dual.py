"""An image and a text tower with a common embedding space: the result of a vision-language training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from synthgen.config import build
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, one_line
from synthgen.models.linear import Linear
from synthgen.models.text import TextConfig, TextEncoder, TextTokenizer, first_words
from synthgen.models.vit import VisionTransformer, check_size, load_encoder
from synthgen.stores import parse_location
from synthgen.stores.tar import write_bytes, write_json
from synthgen.untrusted import read_file, read_json

__all__ = ["DualEncoder", "load_dual_encoder", "save_dual_encoder"]


class DualEncoder(nn.Module):
    """Unit vectors of images and texts in one space; their dot product is their similarity.

    An image is represented by the mean of its patch tokens, a text by its first token, each through a linear layer.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        text: TextEncoder,
        image_head: nn.Linear,
        text_head: nn.Linear,
        tokenizer: TextTokenizer,
    ) -> None:
        super().__init__()
        self.encoder, self.text = encoder, text
        self.image_head, self.text_head = image_head, text_head
        self.tokenizer = tokenizer

    @torch.no_grad()
    def embed_images(self, x: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n d"]:
        """Unit vectors of images that are normalised by the encoder's config, as in batches."""
        return F.normalize(self.image_head(self.encoder.features(x)), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts, truncated to ``max_words`` and ``max_tokens`` as in training."""
        shortened = [first_words(text, self.text.config.max_words) for text in texts]
        tokens, key_mask = (part.to(self.text.positions.device) for part in self.tokenizer(shortened))
        return F.normalize(self.text_head(self.text(tokens, key_mask)[:, 0]), dim=1)


def save_dual_encoder(dual: DualEncoder, folder: Path) -> None:
    """Write ``text.safetensors``, ``text.json`` and ``tokenizer.json`` beside the encoder's own files."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in dual.state_dict().items()
        if not name.startswith("encoder.")
    }
    write_bytes(folder / "tokenizer.json", dual.tokenizer.json.encode())
    write_json(folder / "text.json", dataclasses.asdict(dual.text.config))
    write_bytes(folder / "text.safetensors", save(tensors))


def load_dual_encoder(folder: str | Path) -> DualEncoder:
    """Both towers of the training in ``folder`` (``<run>/pretrain/vlp``), in evaluation mode on the CPU.

    Raises:
        MissingArtifact: the folder holds no training, or one without a text tower.
        CorruptFile: the files cannot be read, or contradict each other.
    """
    folder = parse_location(folder)
    encoder = load_encoder(folder)
    for name in ("text.json", "text.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise MissingArtifact(
                f"the training in {folder} has no text tower ({name} is missing); "
                "train one with: synthgen pretrain --method vlp"
            )
    try:
        described = read_json(read_file(folder / "text.json"))
        config = build(TextConfig, described, where=str(folder / "text.json"))
        rows = config.vocab_size + config.max_tokens + config.embed_dim
        check_size(config.depth * config.dim**2 + rows * config.dim, folder / "text.safetensors")
        dual = DualEncoder(
            encoder,
            TextEncoder(config),
            Linear(encoder.config.dim, config.embed_dim),
            Linear(config.dim, config.embed_dim),
            TextTokenizer(folder / "tokenizer.json", config.max_tokens),
        )
        tensors = load_file(folder / "text.safetensors")
        dual.load_state_dict(tensors | {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()})
    except (ValueError, TypeError, OSError, AttributeError, ConfigError, SafetensorError, RuntimeError) as error:
        raise CorruptFile(
            f"the text tower in {folder} cannot be read: {one_line(error)}; delete it and pretrain again"
        ) from None
    return dual.eval()
