"""Check that the sources of a stage outside its run exist, before anything runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from synthgen.run import Run
from synthgen.stores import parse_location
from synthgen.stores.remote import RemotePath

__all__ = ["find_dataset", "find_encoder"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find_dataset(source: str, run: Run) -> None:
    """Check that a tar, pattern or folder of images exists, unless it is in the run, where a stage may still write it.

    Raises:
        MissingArtifact: it is missing or empty.
        CorruptFile: it cannot be read.
    """
    from synthgen.datasets.sources import open_dataset, tars_of

    if source and not _is_within(source, run) and not tars_of(source):
        open_dataset(source)  # a folder without tars


def find_encoder(encoder: str, run: Run) -> None:
    """Check that an encoder exists, unless it is in the run, where a stage may still write it, or on the hub.

    Raises:
        MissingArtifact: there is none.
    """
    from synthgen.models.transformers_encoder import encoder_folder

    if not encoder or _is_within(encoder, run):
        return
    if parse_location(encoder).exists() or not _HUB_ID.fullmatch(encoder):
        encoder_folder(encoder)


def _is_within(place: str, run: Run) -> bool:
    """Whether a path is in the run's folder, whether the two are absolute or relative."""
    inner, outer = parse_location(place), run.path
    if not isinstance(inner, RemotePath) and not isinstance(outer, RemotePath):
        return Path(os.path.abspath(inner)).is_relative_to(os.path.abspath(outer))  # noqa: PTH100 - links stay links
    return str(inner).startswith(f"{outer}/")
