"""Which sample lies in which shard: a function of the run's seed and of what its done marks count."""

from __future__ import annotations

import shlex
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from synthgen.errors import CorruptFile, MissingArtifact, StaleArtifact
from synthgen.records import sample_key
from synthgen.run import Run, digest

__all__ = ["Shard", "lay_out", "split_again", "split_of"]

_MOST = 10_000  # samples of a unit: a key has four digits for them


@dataclass(frozen=True)
class Shard:
    """One tar of the plan: what it holds, in order."""

    split: str  # "train" or "val"
    number: int  # from 0 in each split
    samples: array[int]  # their keys as numbers, for a worker knows all shards

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def keys(self) -> list[str]:
        """The ten digits of each sample."""
        return [f"{sample:010}" for sample in self.samples]

    @property
    def file(self) -> str:
        """The path of the tar under the shards folder."""
        return f"{self.split}/{self.number:06d}.tar"


def lay_out(
    run: Run,
    samples_per_shard: int,
    *,
    val_ratio: float,
    shuffle: bool,
    units: Collection[int] | None = None,
    content: str = "",
) -> tuple[Shard, ...]:
    """Every shard, those of train first. The done marks of the image units are read, and no tar.

    Of ``units`` alone, where they are given; with ``content``, which is what
    :func:`~synthgen.stages._units.content_of` said of them, no other images are laid out for them.

    Raises:
        MissingArtifact: there is no image.
        CorruptFile: a done mark counts more samples than a unit can hold.
        StaleArtifact: the units there are no longer have that content.
    """
    found, seen = {}, []
    for unit, mark in run.iter_marks("images"):
        if units is None or unit in units:
            found[unit] = _samples(run, unit, mark)
            seen.append([unit, mark["sha256"]])
    if content and digest(sorted(seen)) != content:
        raise StaleArtifact(
            f"the images of {run.path} are no longer those that this command began with: another made or deleted some; "
            "when it has ended, run this one again"
        )
    splits = {"train": array("Q"), "val": array("Q")}
    for unit in sorted(found, key=lambda unit: _draw(run, "unit", unit) if shuffle else unit):
        for sample in found[unit]:
            splits[split_of(run, f"{sample:010}", val_ratio)].append(sample)
    shards = []
    for split, samples in splits.items():
        for number, start in enumerate(range(0, len(samples), samples_per_shard)):
            chunk = samples[start : start + samples_per_shard]
            if shuffle:
                chunk = array("Q", sorted(chunk, key=lambda sample: _draw(run, "order", f"{sample:010}")))
            shards.append(Shard(split, number, chunk))
    if not shards:
        raise MissingArtifact(f"{run.path} has no image to pack; run: {run.remedy('images')}")
    return tuple(shards)


def _samples(run: Run, unit: int, mark: Mapping[str, Any]) -> array[int]:
    """The samples of an image unit, their keys as numbers: as many as its done mark counts, but for those that failed.

    Raises:
        CorruptFile: they are more than a unit can hold.
    """
    failed = mark.get("failed")
    failed = failed if isinstance(failed, dict) else {}
    first, count = int(sample_key(unit, 0)), mark["count"] + len(failed)
    if count > _MOST:
        path = run.tar("images", unit)
        raise CorruptFile(
            f"the done mark of {path} tells of {count} samples; delete both and run: {run.remedy('images')}"
        )
    return array("Q", (sample for sample in range(first, first + count) if f"{sample:010}" not in failed))


def split_of(run: Run, key: str, val_ratio: float) -> str:
    """The split of a sample: "val" for a share of ``val_ratio`` of all, else "train"."""
    return "val" if _draw(run, "split", key) < val_ratio * 2**64 else "train"


def split_again(run: Run) -> str:
    """What gives a few images a val split, in words: packed shards keep the split that they have."""
    path, folder = shlex.quote(str(run.path)), shlex.quote(str(run.folder("shards")))
    return f"delete {folder} and run: synthgen shards --val-ratio 0.3 --run {path}"


def _draw(run: Run, purpose: str, name: str | int) -> int:
    """A number in [0, 2**64) that depends on the run's seed, the purpose and the name, whatever the numpy version."""
    return int.from_bytes(blake2b(f"{run.seed}:{purpose}:{name}".encode(), digest_size=8).digest(), "big")
