"""Check the files of shards and encoders before hours are spent on them."""

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
    "check_shards_exist",
    "diagnose_corruption",
    "encoder_hash",
    "weights_beside",
    "weights_of",
]

_NETWORK = ("*.safetensors", "*.safetensors.index.json", "config.json")  # files of a network of transformers


def _shard_hashes(run: Run, split: str) -> dict[str, str]:
    """The tars of a split in ``dataset.json``: the name of each, and its sha256.

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


def check_shards_exist(run: Run, split: str) -> tuple[dict[str, str], dict[str, int]]:
    """Check by name that no shard of a split is missing.

    Returns:
        The sha256 of each listed tar, and the size of each file in the folder, by name.

    Raises:
        MissingArtifact: the shards are not finished, or one is missing.
        CorruptFile: their ``dataset.json`` cannot be read.
    """
    folder = run.folder("shards") / split
    listed, there = _shard_hashes(run, split), listing(folder)
    if gone := sorted(listed.keys() - there.keys()):
        raise MissingArtifact(
            f"{len(gone)} of the shards in {folder} are gone (first: {gone[0]}); run: {run.remedy('shards')}"
        )
    return listed, there


def check_shards(run: Run, split: str, rank: int = 0, world_size: int = 1) -> None:
    """Check the sha256 of every shard of a split; each of several processes checks its share.

    This reads all of them once. Shards in a store are not checked: stores have checksums of their own.

    Raises:
        MissingArtifact, CorruptFile: a shard is missing or damaged.
    """
    folder, again = run.folder("shards") / split, run.remedy("shards")
    if isinstance(folder, RemotePath):
        return
    for name, sha256 in sorted(_shard_hashes(run, split).items())[rank::world_size]:
        verify_sha256(folder / name, sha256, again)


def weights_of(done: Mapping[str, Any]) -> dict[str, str]:
    """The weight files of a training and their sha256, from the content of its ``done.json``.

    Raises:
        LookupError, TypeError, ValueError: it is not the content of a ``done.json``.
    """
    return {"encoder.safetensors": str(done["sha256"]), **dict(done.get("beside", {}))}


def weights_beside(folder: Path) -> dict[str, str]:
    """The other weight files in an encoder's folder, such as a text tower's, and their sha256."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: sha256_of(path) for path in files if path.name != "encoder.safetensors"}


def check_encoder(folder: Path) -> None:
    """Check the sha256 of an encoder's weights, and of those beside it, if it has a ``done.json``.

    Raises:
        MissingArtifact, CorruptFile: a file is missing or damaged.
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
    """The sha256 of an encoder's files: weights, ``config.json``, and ``preprocessor_config.json`` of ``transformers``.

    Args:
        folder: the encoder's.
        processor: whether what is done to pixels counts; if not, only the network does: of an encoder of ours the
            weights, of one of ``transformers`` weights and ``config.json``.

    Raises:
        OSError: a file cannot be read.
    """
    weights = folder / "encoder.safetensors"
    if weights.is_file():
        if not processor:
            return sha256_of(weights)
        files = [weights, folder / "config.json"]
    else:
        patterns = (*_NETWORK, "preprocessor_config.json") if processor else _NETWORK
        files = [path for pattern in patterns for path in folder.glob(pattern)]
    return digest({path.name: sha256_of(path) for path in files})


@contextmanager
def diagnose_corruption(look: Callable[[], None]) -> Iterator[None]:
    """If the block raises CorruptFile, call ``look`` first: it may raise an error that names the damaged file.

    Raises:
        CorruptFile: from ``look``, otherwise from the block.
    """
    try:
        yield
    except CorruptFile:
        look()
        raise
