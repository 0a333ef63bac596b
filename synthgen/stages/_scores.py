"""The file that holds the scores of an evaluation, and the encoder that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthgen.run import Run, digest
from synthgen.stores.checksum import sha256_of
from synthgen.untrusted import read_file, read_json

__all__ = ["changed_names", "newest_training", "read_scores", "text_tower_hash"]

_TEXT_TOWER = ("text.safetensors", "text.json", "tokenizer.json")  # as synthgen.models.dual writes it


def newest_training(run: Run) -> Path | None:
    """The folder of the training of a run that was finished last; None if there is none."""
    done = sorted(run.folder("pretrain").glob("*/done.json"), key=lambda path: path.stat().st_mtime_ns)
    return done[-1].parent if done else None


def text_tower_hash(folder: Path) -> str:
    """A hash of the text tower beside an encoder: its weights, configuration and tokenizer."""
    return digest({name: sha256_of(folder / name) for name in _TEXT_TOWER if (folder / name).is_file()})


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a file of scores; empty if it is missing or not such a file."""
    try:
        value = read_json(read_file(path), finite=False)
    except (FileNotFoundError, ValueError):
        return {}
    mappings = isinstance(value, dict) and all(isinstance(value.get(name, {}), dict) for name in ("settings", "inputs"))
    return value if mappings else {}


def changed_names(before: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The names of the settings and inputs that differ from those in a file of scores; "the seed" if none does."""
    now = {**settings, **{f"its input {name}": value for name, value in inputs.items()}}
    recorded = {f"its input {name}": value for name, value in before.get("inputs", {}).items()}
    then = {**before.get("settings", {}), **recorded}
    return ", ".join(name for name in {**now, **then} if then.get(name) != now.get(name)) or "the seed"
