"""Which sample goes into which shard: a function of the run's seed and its done marks."""

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

__all__ = ["Shard", "lay_out", "repack_advice", "split_of"]

_MAX_SAMPLES = 10_000  # of a unit: a key has four digits for them


@dataclass(frozen=True)
class Shard:
    """One planned tar: its samples in order."""

    split: str  # "train" or "val"
    number: int  # from 0 in each split
    samples: array[int]  # keys as numbers, to save memory: every worker has the list of all shards

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def keys(self) -> list[str]:
        """The keys of the samples, ten digits each."""
        return [f"{sample:010}" for sample in self.samples]

    @property
    def file(self) -> str:
        """The path of the tar in the shards folder."""
        return f"{self.split}/{self.number:06d}.tar"


def lay_out(
    run: Run,
    samples_per_shard: int,
    *,
    val_ratio: float,
    shuffle: bool,
    rejected: Collection[str] = (),
    units: Collection[int] | None = None,
    content: str = "",
) -> tuple[Shard, ...]:
    """Every shard, those of train first. Reads the done marks of the image units, but no tar.

    Args:
        run: with images.
        samples_per_shard: the last shard of a split may have fewer.
        val_ratio: share of the samples that go to val.
        shuffle: whether units, and the samples of a shard, are put in random order.
        rejected: the keys of samples to leave out.
        units: the image units to use; by default all.
        content: :func:`~synthgen.stages._units.content_hash` of them, to detect changes; "": not checked.

    Raises:
        MissingArtifact: there is no image, or every one is rejected.
        CorruptFile: a done mark counts more samples than a unit can hold.
        StaleArtifact: the units no longer have that content.
    """
    found, seen = {}, []
    for unit, mark in run.iter_marks("images"):
        if units is None or unit in units:
            found[unit] = _samples(run, unit, mark)
            seen.append([unit, mark["sha256"]])
    if content and digest(sorted(seen)) != content:
        raise StaleArtifact(
            f"the images of {run.path} have changed since this command started: another one made or deleted some; "
            "when that has ended, run this one again"
        )
    splits = {"train": array("Q"), "val": array("Q")}
    for unit in sorted(found, key=lambda unit: _draw(run, "unit", unit) if shuffle else unit):
        for sample in found[unit]:
            if (key := f"{sample:010}") not in rejected:
                splits[split_of(run, key, val_ratio)].append(sample)
    shards = []
    for split, samples in splits.items():
        for number, start in enumerate(range(0, len(samples), samples_per_shard)):
            chunk = samples[start : start + samples_per_shard]
            if shuffle:
                chunk = array("Q", sorted(chunk, key=lambda sample: _draw(run, "order", f"{sample:010}")))
            shards.append(Shard(split, number, chunk))
    if not shards and any(found.values()):
        raise MissingArtifact(
            f"every image of {run.path} is rejected; see: synthgen status {shlex.quote(str(run.path))}"
        )
    if not shards:
        raise MissingArtifact(f"{run.path} has no image to pack; run: {run.remedy('images')}")
    return tuple(shards)


def _samples(run: Run, unit: int, mark: Mapping[str, Any]) -> array[int]:
    """The keys of an image unit's samples as numbers, without those that failed, from its done mark.

    Raises:
        CorruptFile: there are more than a unit can hold.
    """
    failed = mark.get("failed")
    failed = failed if isinstance(failed, dict) else {}
    first, count = int(sample_key(unit, 0)), mark["count"] + len(failed)
    if count > _MAX_SAMPLES:
        path = run.tar("images", unit)
        raise CorruptFile(
            f"the done mark of {path} counts {count} samples; delete both and run: {run.remedy('images')}"
        )
    return array("Q", (sample for sample in range(first, first + count) if f"{sample:010}" not in failed))


def split_of(run: Run, key: str, val_ratio: float) -> str:
    """The split of a sample: "val" with probability ``val_ratio``, else "train"."""
    return "val" if _draw(run, "split", key) < val_ratio * 2**64 else "train"


def repack_advice(run: Run) -> str:
    """Advice on how to get a val split from few images: the shards must be packed anew."""
    path, folder = shlex.quote(str(run.path)), shlex.quote(str(run.folder("shards")))
    return f"delete {folder} and run: synthgen shards --val-ratio 0.3 --run {path}"


def _draw(run: Run, purpose: str, name: str | int) -> int:
    """A number in [0, 2**64) that depends only on the run's seed, the purpose and the name."""
    return int.from_bytes(blake2b(f"{run.seed}:{purpose}:{name}".encode(), digest_size=8).digest(), "big")
