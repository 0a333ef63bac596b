"""The files that a training writes at its end: the encoder in two forms, those of its method, and last a done mark."""

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
    """Write the results of a training to ``folder``.

    Args:
        method: the trained method, on the CPU.
        folder: of the training.
        about: fields of ``config.json`` besides the shape of the encoder.
        done: fields of ``done.json`` besides hashes and versions.
        export: whether to write ``transformers/`` too.

    Raises:
        StorageError: a file cannot be written.
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
    """Whether ``folder`` has the undamaged results of a training with this fingerprint."""
    try:
        done = read_json(read_file(folder / "done.json"), finite=False)
        whole = all(sha256_of(folder / name) == sha256 for name, sha256 in weights_of(done).items())
        return whole and bool(done["fingerprint"] == fingerprint)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def export_missing(folder: Path) -> None:
    """Write the ``transformers/`` of a finished training, if it is missing or incomplete.

    Raises:
        CorruptFile: the encoder cannot be read.
        StorageError: a file cannot be written.
    """
    from synthgen.models.transformers_vit import save_transformers
    from synthgen.models.vit import load_encoder

    if not (folder / _EXPORTED / "preprocessor_config.json").is_file():  # the file that is written last
        save_transformers(load_encoder(folder), folder / _EXPORTED)
        logger.info("wrote %s of a training that was already finished", folder / _EXPORTED)
