"""What a training leaves behind: the encoder in two forms, what its method adds, and last its done mark."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthgen.run import versions
from synthgen.stages._integrity import weights_beside, weights_of
from synthgen.stores.checksum import sha256_of
from synthgen.stores.tar import write_json
from synthgen.untrusted import read_file, read_json

if TYPE_CHECKING:
    from synthgen.methods import Method

__all__ = ["export_missing", "is_complete", "save_outputs"]

logger = logging.getLogger(__name__)

_EXPORTED = "transformers"


def save_outputs(
    method: Method, folder: Path, about: Mapping[str, Any], done: Mapping[str, Any], *, export: bool
) -> None:
    """Write all that a training leaves into ``folder``.

    Args:
        method: at the end of it, on the CPU.
        folder: of the training.
        about: what ``config.json`` says beside the shape of the encoder.
        done: what ``done.json`` says beside hashes and versions.
        export: write ``transformers/`` too.

    Raises:
        StorageError: it cannot be written.
    """
    from synthgen.models.transformers_vit import save_transformers
    from synthgen.models.vit import save_encoder

    method.export(folder)
    save_encoder(method.encoder, folder, **about)
    if export:
        save_transformers(method.encoder, folder / _EXPORTED)
    hashes = {"sha256": sha256_of(folder / "encoder.safetensors"), "beside": weights_beside(folder)}
    write_json(folder / "done.json", {**done, **hashes, "versions": versions()})


def is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether all of it is there, whole, and of a training with this fingerprint."""
    try:
        done = read_json(read_file(folder / "done.json"), finite=False)
        whole = all(sha256_of(folder / name) == sha256 for name, sha256 in weights_of(done).items())
        return whole and bool(done["fingerprint"] == fingerprint)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def export_missing(folder: Path) -> None:
    """Write ``transformers/`` of a finished training that was made without, or where writing it was broken off.

    Raises:
        CorruptFile: the encoder cannot be read.
        StorageError: it cannot be written.
    """
    from synthgen.models.transformers_vit import save_transformers
    from synthgen.models.vit import load_encoder

    if not (folder / _EXPORTED / "preprocessor_config.json").is_file():  # the last one that is written
        save_transformers(load_encoder(folder), folder / _EXPORTED)
        logger.info("%s is written, of a training that was finished before", folder / _EXPORTED)
