"""Write held-out composites with exact masks as one WebDataset tar: ``python -m synthgen.tiny.truth``.

A sample is ``<key>.png``, ``<key>.txt`` (caption), ``<key>.mask.png`` (8-bit grey: 0 is background, k the visible part
of the k-th word) and ``<key>.json`` (the words of the caption, and the object that each names). Held-out composites
have other seeds than training, and show other parts of the panoramas and other views of the 3D models; objects with a
single rendering are the same.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from synthgen.codecs import masks_to_labels
from synthgen.image import encode_png
from synthgen.stores.tar import TarWriter
from synthgen.tiny.compositor import LAYOUTS, Composites, Compositor, Layout, Names

__all__ = ["BATCH_SIZE", "SEED", "batches", "held_out", "members", "write_truth"]

SEED = 7_000_000  # of all held-out composites; training uses other seeds
BATCH_SIZE = 64  # each batch has a seed of its own, so that a longer set starts with the shorter one


def held_out(data: Path, num: int, *, seed: int = SEED) -> Iterator[Composites]:
    """Yield ``num`` held-out composites in batches."""
    return batches(Compositor(data, Names.load(), held_out=True), num, seed=seed)


def batches(
    compositor: Compositor, num: int, *, seed: int, layouts: Sequence[Layout] = LAYOUTS
) -> Iterator[Composites]:
    """Yield ``num`` composites in batches of at most BATCH_SIZE; batch k has the seed ``seed + k``."""
    for k, start in enumerate(range(0, num, BATCH_SIZE)):
        batch = compositor.sample(BATCH_SIZE, torch.Generator().manual_seed(seed + k), layouts)
        yield batch.first(num - start)


def members(batch: Composites, i: int, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The files of composite ``i`` in a tar, by their suffixes."""
    return {
        "json": json.dumps(metadata).encode(),
        "mask.png": encode_png(masks_to_labels(batch.masks[i].numpy())),
        "png": encode_png(batch.images[i].numpy()),
        "txt": batch.captions[i].encode(),
    }


def write_truth(data: Path, out: Path, num: int) -> Path:
    """Write ``out/truth-000000.tar`` and return its path; the same arguments give the same bytes."""
    path = out / "truth-000000.tar"
    with TarWriter(path) as tar:
        for batch in held_out(data, num):
            for i in range(len(batch.captions)):
                metadata = {"words": batch.words[i], "objects": batch.objects[i]}
                tar.add(f"{tar.count:09d}", members(batch, i, metadata))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.truth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--out", type=Path, required=True, help="folder for truth-000000.tar")
    parser.add_argument("--num", type=int, default=256, help="number of composites")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fixed order of sums, so the same bytes everywhere
    write_truth(args.data, args.out, args.num)


if __name__ == "__main__":
    main()
