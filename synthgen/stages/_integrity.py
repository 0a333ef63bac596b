"""Whether the shards and the encoder of a run are as they were written, before hours are spent on them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.run import Run, digest
from synthgen.stores import listing
from synthgen.stores.checksum import sha256_of, verify_sha256
from synthgen.stores.remote import RemotePath
from synthgen.untrusted import MAX_BYTES, read_file, read_json

__all__ = [
    "check_encoder",
    "check_shards",
    "check_there",
    "encoder_hash",
    "listed_shards",
    "naming_damage",
    "weights_beside",
    "weights_of",
]

_NETWORK = ("*.safetensors", "*.safetensors.index.json", "config.json")  # what decides one of transformers


def listed_shards(run: Run, split: str) -> dict[str, str]:
    """The tars of a split that ``dataset.json`` lists: the name of each, and its sha256.

    Raises:
        MissingArtifact: the shards are not finished.
        CorruptFile: it cannot be read.
    """
    path, again = run.folder("shards") / "dataset.json", run.remedy("shards")
    try:
        rows = [row for row in read_json(read_file(path), MAX_BYTES)["shards"] if row["split"] == split]
        return {Path(row["file"]).name: str(row["sha256"]) for row in rows}
    except (FileNotFoundError, NotADirectoryError):
        raise MissingArtifact(f"{run.path} has no finished shards yet; run: {again}") from None
    except (ValueError, LookupError, TypeError):
        raise CorruptFile(f"{path} cannot be read; delete it and run: {again}") from None


def check_there(run: Run, split: str) -> tuple[dict[str, str], dict[str, int]]:
    """See that no shard of a split is gone, by the names alone; return what is listed, and the size of what is there.

    Raises:
        MissingArtifact: the shards are not finished, or one is gone.
        CorruptFile: their ``dataset.json`` cannot be read.
    """
    folder = run.folder("shards") / split
    listed, there = listed_shards(run, split), listing(folder)
    if gone := sorted(listed.keys() - there.keys()):
        raise MissingArtifact(
            f"{len(gone)} of the shards in {folder} are gone (first: {gone[0]}); run: {run.remedy('shards')}"
        )
    return listed, there


def check_shards(run: Run, split: str, rank: int = 0, world_size: int = 1) -> None:
    """See that every shard of a split has the sha256 that ``dataset.json`` tells; of several processes each looks at
    its share. Costs one reading of them; those in a store are left to its own checksums.

    Raises:
        MissingArtifact, CorruptFile: one is not there, or is not as it was written.
    """
    folder, again = run.folder("shards") / split, run.remedy("shards")
    if isinstance(folder, RemotePath):
        return
    for name, sha256 in sorted(listed_shards(run, split).items())[rank::world_size]:
        verify_sha256(folder / name, sha256, again)


def weights_of(done: Mapping[str, Any]) -> dict[str, str]:
    """The files of weights that a training left, each with its sha256, by what its ``done.json`` holds.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    return {"encoder.safetensors": str(done["sha256"]), **dict(done.get("beside", {}))}


def weights_beside(folder: Path) -> dict[str, str]:
    """Those beside the encoder, such as a text tower."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: sha256_of(path) for path in files if path.name != "encoder.safetensors"}


def check_encoder(folder: Path) -> None:
    """See that the weights of an encoder, and those beside it, have the sha256 that its ``done.json`` tells, if any.

    Raises:
        MissingArtifact, CorruptFile: one is gone, or has another.
    """
    try:
        weights = weights_of(read_json(read_file(folder / "done.json"), finite=False))
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # an encoder from elsewhere
        return
    again = "synthgen pretrain, with the same settings"
    if folder.parent.name == "pretrain":
        again = f"synthgen pretrain --label {shlex.quote(folder.name)} --run {shlex.quote(str(folder.parent.parent))}"
    for name, sha256 in weights.items():
        verify_sha256(folder / name, sha256, again)


def encoder_hash(folder: Path, *, processor: bool = True) -> str:
    """What tells an encoder from others: the sha256 of its weights; of a model of ``transformers``, of its weights, its
    config.json and, unless the network alone is wanted, what its ``processor`` does to pixels.

    Raises:
        OSError: it cannot be read.
    """
    if (folder / "encoder.safetensors").is_file():
        return sha256_of(folder / "encoder.safetensors")
    patterns = (*_NETWORK, "preprocessor_config.json") if processor else _NETWORK
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    return digest({path.name: sha256_of(path) for path in files})


@contextmanager
def naming_damage(look: Callable[[], None]) -> Iterator[None]:
    """Where something cannot be read, let ``look`` say first which file is not as it was written, and its remedy.

    Raises:
        CorruptFile: what ``look`` found, else what was raised within.
    """
    try:
        yield
    except CorruptFile:
        look()
        raise
