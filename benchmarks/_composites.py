"""Labelled held-out composites as a tar, for the benchmarks that evaluate encoders and heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from synthgen.stores.tar import TarWriter
from synthgen.tiny.compositor import LAYOUTS, Compositor, Layout
from synthgen.tiny.truth import batches, members

__all__ = ["write_composites"]


def write_composites(
    path: Path, compositor: Compositor, num: int, *, seed: int, prefix: str = "", layouts: Sequence[Layout] = LAYOUTS
) -> None:
    """Write ``num`` composites with captions, words, masks and, for images of one object, a label.

    ``prefix`` distinguishes the keys of several tars.
    """
    with TarWriter(path) as tar:
        for batch in batches(compositor, num, seed=seed, layouts=layouts):
            for i, objects in enumerate(batch.objects):
                metadata = {"words": objects, "label": objects[0] if len(objects) == 1 else None}
                tar.add(f"{prefix}{tar.count:09d}", members(batch, i, metadata))
