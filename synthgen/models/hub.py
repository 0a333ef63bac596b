"""Models of ``transformers`` on the Hugging Face hub, through its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from synthgen.errors import MissingWeights, one_line
from synthgen.untrusted import read_file, read_json

__all__ = ["hub_folder", "is_hub_id"]

_DESCRIBED = ("config.json", "preprocessor_config.json")
_INDEX = "model.safetensors.index.json"  # where the weights are several files


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model on the hub, as ``owner/model``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def hub_folder(name: str, tokenizer: Sequence[str] = ()) -> Path:
    """The folder of a model in the hub's cache, with configuration, safetensors and, if asked for, a tokenizer.

    A model is downloaded once and used from the cache until ``hf download`` brings a newer one.

    Args:
        name: its hub id.
        tokenizer: names of the files one of which holds the vocabulary; empty: no tokenizer is needed.

    Raises:
        MissingWeights: it is not completely in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    texts = ("*.json", "*.txt", *tokenizer) if tokenizer else ()
    patterns = [*_DESCRIBED, "*.safetensors", "*.safetensors.index.json", *texts]
    try:
        return _cached(name, patterns, tokenizer) or Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network errors have many types, and the hub's library changes them
        raise MissingWeights(
            f"there is no folder {name}, and no such model can be downloaded from the hub: {one_line(error)}; "
            f"download it first, for example with: hf download {name}"
        ) from None


def _cached(name: str, patterns: list[str], tokenizer: Sequence[str]) -> Path | None:
    """The folder of a model in the hub's cache; None if it is absent or incomplete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        several = (folder / _INDEX).is_file()
        weights = read_json(read_file(folder / _INDEX))["weight_map"].values() if several else ["model.safetensors"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    whole = all((folder / file).is_file() for file in (*_DESCRIBED, *weights))
    has_tokenizer = not tokenizer or any((folder / file).is_file() for file in tokenizer)
    return folder if whole and has_tokenizer else None
