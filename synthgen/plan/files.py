"""The sizes of a stage's files, from those of the sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE

from synthgen.run import Run
from synthgen.stores.tar import index_tar

__all__ = ["TarFiles", "link_tars", "tar_files", "training_bytes"]


@dataclass(frozen=True, slots=True)
class TarFiles:
    """Bytes of an artifact: tars of samples, each with small files beside it."""

    content: tuple[float, ...]  # of a sample with its headers, in each tar of the sample
    beside: float  # of the files beside a tar
    beside_each: float  # and for each of its samples

    def total(self, tars: Mapping[int, int], content: float) -> float:
        """Bytes of all ``tars`` (samples in a tar → number of such tars), with ``content`` bytes a sample."""
        return sum(number * (self._tar(count, content) + self.beside) for count, number in tars.items())

    def _tar(self, count: int, content: float) -> float:
        padded = math.ceil((count * content + 2 * BLOCKSIZE) / RECORDSIZE) * RECORDSIZE
        return padded + self.beside_each * count


def tar_files(probe: Run, rounds: Run, artifact: str) -> TarFiles:
    """Of an artifact of which ``probe`` has one tar with one sample, and ``rounds`` has tars with several."""
    (single,) = probe.folder(artifact).rglob("*.tar")
    tars = sorted(rounds.folder(artifact).rglob("*.tar"))
    contents = [_content(tar) for tar in tars]
    counts = [count for _, count in contents]
    count, alone = max(counts), _beside(single)
    each = (_beside(tars[counts.index(count)]) - alone) / (count - 1) if count > 1 else 0.0
    return TarFiles(tuple(content / count for content, count in contents), alone - each, each)


def training_bytes(folder: Path, *, checkpoints: int, snapshots: int, records: int) -> float:
    """Bytes of a training with so many checkpoints, snapshots and metrics, from one with one checkpoint."""
    (checkpoint,) = (folder / "checkpoints").glob("*.safetensors")
    metrics, encoder = folder / "metrics.jsonl", folder / "encoder.safetensors"
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    once = sum(sizes.values()) - sizes[checkpoint] - sizes[metrics]
    record = sizes[metrics] / metrics.read_bytes().count(b"\n")
    return once + checkpoints * sizes[checkpoint] + snapshots * sizes[encoder] + records * record


def link_tars(tars: Sequence[Path], folder: Path, images: int) -> Path:
    """``folder``, with links to the tars, repeated until there are so many images."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [_content(tar)[1] for tar in tars]
    number = total = 0
    while total < images:
        link = folder / f"{number:06d}.tar"
        if not link.exists():
            link.symlink_to(tars[number % len(tars)].resolve())
        total += counts[number % len(tars)]
        number += 1
    return folder


def _content(tar: Path) -> tuple[int, int]:
    """Bytes of a tar's samples with their headers, and how many there are."""
    samples = index_tar(tar)
    sizes = [member.size for _, members in samples for member in members.values()]
    return sum(BLOCKSIZE + -(-size // BLOCKSIZE) * BLOCKSIZE for size in sizes), len(samples)


def _beside(tar: Path) -> int:
    """Bytes of the files beside a tar that belong to it."""
    return sum(path.stat().st_size for path in tar.parent.glob(f"{tar.stem}[._]*") if path != tar)
