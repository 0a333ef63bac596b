"""What the files of a sample take, and what as many as there will be would take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE

from synthgen.run import Run
from synthgen.stores.tar import index_tar

__all__ = ["TarFiles", "TrainingFiles", "repeated", "tar_files", "training_files"]


@dataclass(frozen=True, slots=True)
class TarFiles:
    """What an artifact's files take: tars of samples, each with small files beside it."""

    content: tuple[float, ...]  # bytes of a sample, headers too, in each tar of the sample
    beside: float  # bytes beside a tar
    beside_each: float  # and for each of its samples

    def total(self, tars: Mapping[int, int], content: float) -> float:
        """Bytes of all ``tars``, samples in one → number of such, with ``content`` bytes a sample."""
        return sum(
            number
            * (
                math.ceil((count * content + 2 * BLOCKSIZE) / RECORDSIZE) * RECORDSIZE
                + self.beside
                + self.beside_each * count
            )
            for count, number in tars.items()
        )


@dataclass(frozen=True, slots=True)
class TrainingFiles:
    """What a training leaves behind, in bytes."""

    checkpoint: int  # each
    encoder: int  # each snapshot
    record: float  # each line of the metrics
    rest: int  # once: the encoder and all that lies beside it


def tar_files(probe: Run, rounds: Run, artifact: str) -> TarFiles:
    """Of an artifact of which ``probe`` has one tar with one sample, and ``rounds`` has tars with several."""
    (single,) = probe.folder(artifact).rglob("*.tar")
    tars = sorted(rounds.folder(artifact).rglob("*.tar"))
    held = [_content(tar) for tar in tars]
    counts = [count for _, count in held]
    count, alone = max(counts), _beside(single)
    each = (_beside(tars[counts.index(count)]) - alone) / (count - 1) if count > 1 else 0.0
    return TarFiles(tuple(content / count for content, count in held), alone - each, each)


def training_files(folder: Path) -> TrainingFiles:
    """Of a training that wrote one checkpoint into ``folder``."""
    (checkpoint,) = (folder / "checkpoints").glob("*.safetensors")
    metrics, encoder = folder / "metrics.jsonl", folder / "encoder.safetensors"
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    rest = sum(sizes.values()) - sizes[checkpoint] - sizes[metrics]
    lines = metrics.read_bytes().count(b"\n")
    return TrainingFiles(sizes[checkpoint], sizes[encoder], sizes[metrics] / lines, rest)


def repeated(tars: Sequence[Path], folder: Path, images: int) -> Path:
    """``folder``, with links to the tars, over and over, as often as makes so many images."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [_content(tar)[1] for tar in tars]
    number, held = 0, 0
    while held < images:
        link = folder / f"{number:06d}.tar"
        if not link.exists():
            link.symlink_to(tars[number % len(tars)].resolve())
        held += counts[number % len(tars)]
        number += 1
    return folder


def _content(tar: Path) -> tuple[int, int]:
    """Bytes of a tar's samples, headers too, and how many there are."""
    samples = index_tar(tar)
    sizes = [member.size for _, members in samples for member in members.values()]
    return sum(BLOCKSIZE + -(-size // BLOCKSIZE) * BLOCKSIZE for size in sizes), len(samples)


def _beside(tar: Path) -> int:
    """Bytes of the files beside a tar that belong to it."""
    return sum(path.stat().st_size for path in tar.parent.glob(f"{tar.stem}[._]*") if path != tar)
