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
    """The folder of the training of a run that was finished last; None where there is none."""
    done = sorted(run.folder("pretrain").glob("*/done.json"), key=lambda path: path.stat().st_mtime_ns)
    return done[-1].parent if done else None


def text_tower_hash(folder: Path) -> str:
    """What tells the text tower beside an encoder from others: its weights, how it is read, and how text is spelled."""
    return digest({name: sha256_of(folder / name) for name in _TEXT_TOWER if (folder / name).is_file()})


def read_scores(path: Path) -> dict[str, Any]:
    """What a file of scores says; nothing where there is none, or it is no such file."""
    try:
        value = read_json(read_file(path), finite=False)
    except (FileNotFoundError, ValueError):
        return {}
    mappings = isinstance(value, dict) and all(isinstance(value.get(name, {}), dict) for name in ("settings", "inputs"))
    return value if mappings else {}


def changed_names(before: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The names of settings and inputs that are not what a file of scores tells of its own; else it is the seed."""
    now = {**settings, **{f"its input {name}": value for name, value in inputs.items()}}
    noted = {f"its input {name}": value for name, value in before.get("inputs", {}).items()}
    then = {**before.get("settings", {}), **noted}
    return ", ".join(name for name in {**now, **then} if then.get(name) != now.get(name)) or "the seed"
