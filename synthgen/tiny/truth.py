"""Write held-out composites with exact masks as one WebDataset tar: ``python -m synthgen.tiny.truth``.

A sample is ``<key>.png``, ``<key>.txt`` (caption), ``<key>.mask.png`` (mode L: 0 background, k where the k-th word is
seen) and ``<key>.json`` (words as they stand in the caption, and the object behind each). The seeds, and the part of
each panorama that is looked at, lie apart from those of training; the objects are the same.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from synthgen.tiny.compositor import Composites, Compositor, Names

__all__ = ["SEED", "held_out", "write_truth"]

SEED = 7_000_000  # of the truth set and of every held-out measure; no training seed
BATCH = 64  # composites of one seed, so that a longer set begins with the shorter one


def held_out(data: Path, num: int, *, seed: int = SEED) -> Iterator[Composites]:
    """Draw ``num`` held-out composites in batches."""
    compositor = Compositor(data, Names.load(), held_out=True)
    for start in range(0, num, BATCH):
        drawn = compositor.draw(BATCH, torch.Generator().manual_seed(seed + start // BATCH))
        yield drawn.first(min(BATCH, num - start))


def write_truth(data: Path, out: Path, num: int) -> Path:
    """Write ``out/truth-000000.tar`` and return its path; the same arguments give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "truth-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        row = 0
        for batch in held_out(data, num):
            for i, caption in enumerate(batch.captions):
                numbers = torch.arange(1, len(batch.masks[i]) + 1, dtype=torch.uint8)[:, None, None]
                labels = (batch.masks[i] * numbers).amax(dim=0)
                about = {"words": batch.words[i], "objects": batch.objects[i]}
                members = {
                    "json": json.dumps(about).encode(),
                    "mask.png": png(labels.numpy()),
                    "png": png(batch.images[i].numpy()),
                    "txt": caption.encode(),
                }
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                row += 1
    return path


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3) or (H, W) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.truth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--out", type=Path, required=True, help="folder for truth-000000.tar")
    parser.add_argument("--num", type=int, default=256, help="how many composites")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, so the same bytes everywhere
    write_truth(args.data, args.out, args.num)


if __name__ == "__main__":
    main()
