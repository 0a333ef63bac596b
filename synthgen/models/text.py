"""A small text tower: a tokenizer, a transformer over tokens, and one that also attends to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synthgen.config import check_range
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.models.layers import Block, CrossBlock, initialize
from synthgen.stores import parse_location
from synthgen.tiny import WEIGHTS

__all__ = ["ImageReader", "TextConfig", "TextEncoder", "TextTokenizer", "first_words"]


def first_words(text: str, count: int) -> str:
    """The first ``count`` words of a text, joined by single spaces."""
    return " ".join(text.split()[:count])


class TextTokenizer:
    """Token numbers of texts, by a ``tokenizer.json`` of the ``tokenizers`` library.

    The default is the shipped model's: lower-case byte-level BPE, trained on captions of common objects. It encodes any
    text in any script, rare words in pieces. Nothing is downloaded and nothing is unpickled.

    Raises:
        MissingArtifact: the file does not exist.
        ConfigError: the file is not a tokenizer.
    """

    def __init__(self, path: str | Path = "", max_tokens: int = 48) -> None:
        path = parse_location(path) if path else WEIGHTS / "tokenizer"
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingArtifact(f"there is no tokenizer {path}; give a tokenizer.json, or a folder with one")
        try:
            self._load(path.read_text(encoding="utf-8"), max_tokens)
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"{path} is not a tokenizer: {' '.join(str(error).split())[:200]}") from None

    def _load(self, json: str, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        self.json, self.max_tokens = json, max_tokens
        self._tokenizer: Any = Tokenizer.from_str(json)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs: the highest token number plus 1. Numbers may have gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def __call__(self, texts: Sequence[str]) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
        """Token numbers, padded to the longest text, and a mask that is false at padding; long texts are truncated."""
        rows = [encoding.ids or [0] for encoding in self._tokenizer.encode_batch(list(texts))]
        tokens = torch.zeros(len(rows), max(map(len, rows), default=1), dtype=torch.long)
        key_mask = torch.zeros_like(tokens, dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            key_mask[index, : len(row)] = True
        return tokens, key_mask

    def holds(self, text: str) -> bool:
        """Whether a text fits into ``max_tokens`` without truncation."""
        return not self._tokenizer.encode(text).overflowing

    def ends(self, text: str) -> list[int]:
        """The end of each token in the text, in characters."""
        return [end for _, end in self._tokenizer.encode(text).offsets if end]  # 0 for tokens such as [SEP]

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.json, "max_tokens": self.max_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(**state)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The shape of a text tower."""

    vocab_size: int
    max_tokens: int
    dim: int
    depth: int
    num_heads: int
    embed_dim: int  # of the vectors by which images and texts are compared
    max_words: int  # of a text; the rest is cut off

    def __post_init__(self) -> None:
        check_range(ge=1, **asdict(self))
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads {self.num_heads}")


class TextEncoder(nn.Module):
    """A bidirectional transformer over tokens; the output of the first token represents the text."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Parameter(torch.zeros(1, config.max_tokens, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.apply(initialize)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Int[Tensor, "b t"], key_mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Features of each token; no token attends to padding, where ``key_mask`` is false."""
        x = self.embed(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, key_mask=key_mask)
        y: Tensor = self.norm(x)
        return y


class ImageReader(nn.Module):
    """A fusion encoder: text tokens attend to each other and to the image's tokens (as in ALBEF and BLIP)."""

    def __init__(self, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialize)

    def forward(
        self, text: Float[Tensor, "b t d"], key_mask: Bool[Tensor, "b t"], image: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b d"]:
        """The features of the text's first token after fusion."""
        *blocks, last = self.blocks
        for block in blocks:
            text = block(text, image, key_mask=key_mask)
        y: Tensor = self.norm(last(text, image, key_mask=key_mask, queries=slice(1))[:, 0])
        return y
