"""Stages whose units hold images; the content of units, and the commands that make missing ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.run import Run, digest
from synthgen.stages import Stage
from synthgen.units import sample_counts

__all__ = ["ImageMaker", "ImageStage", "content_hash", "need_masks", "units_without_maps"]

logger = logging.getLogger(__name__)


class ImageMaker(Stage):
    """A stage that makes images and their maps, in units of ``unit_size``; the last one may be smaller."""

    reads: ClassVar = ()
    writes: ClassVar = ("images", "maps")
    accelerated: ClassVar = True
    unit_size: int

    def plan(self, run: Run) -> list[int]:
        """As many units as the images of this command fill."""
        return list(range(-(-self.num_samples(run) // self.unit_size)))

    def total(self, run: Run) -> int:
        """Images of this command, or of the settings that the run records if these ask for more."""
        entry = run.claimed.get("images")
        return (self if entry is None else self.at_least(run, entry["settings"])).num_samples(run)

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        return self.sizes(run, [unit])[unit]

    def sizes(self, run: Run, units: Sequence[int]) -> dict[int, int]:
        """Images of each unit."""
        total = self.total(run)
        return {unit: min(self.unit_size, total - unit * self.unit_size) for unit in units}

    def min_samples(self, run: Run, artifact: str, units: Sequence[int]) -> Mapping[int, int]:
        """All images, and maps of the images that there are."""
        return self.sizes(run, units) if artifact == "images" else sample_counts(run.folder("images"), units)

    def warn_of_fewer(self, run: Run) -> None:
        """Warn that a run with more images than this command asks for keeps them."""
        wanted, total = self.num_samples(run), self.total(run)
        if wanted < total:
            logger.warning(
                "%s has more images than the %d of this command: none is deleted, and commands without a limit go on "
                "to %d",
                run.path, wanted, total,
            )  # fmt: skip


class ImageStage(Stage):
    """A stage that writes one sample for each image. A unit to which images were added since is made again."""

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        return self.sizes(run, [unit])[unit]

    def sizes(self, run: Run, units: Sequence[int]) -> dict[int, int]:
        """Images of each unit, from done marks read in one pass."""
        return dict.fromkeys(units, 0) | sample_counts(run.folder("images"), units)

    def min_samples(self, run: Run, artifact: str, units: Sequence[int]) -> Mapping[int, int]:
        """As many as there are images."""
        return self.sizes(run, units)


def content_hash(run: Run, artifact: str, units: Sequence[int]) -> str:
    """A hash of the content of these units, from the sha256 in their done marks.

    Raises:
        CorruptFile: a unit is missing, or has another length than in its mark.
    """
    found = {unit: mark["sha256"] for unit, mark in run.iter_marks(artifact)}
    for unit in units:
        if unit not in found:
            raise CorruptFile(
                f"{run.tar(artifact, unit)} is missing, cut off, or not the file of its done mark; "
                f"delete it and run: {run.remedy(artifact)}"
            )
    return digest([[unit, found[unit]] for unit in units])


def units_without_maps(run: Run) -> list[int]:
    """The units whose images lack maps, in order: a worker was killed between writing the two.

    Raises:
        MissingArtifact: no unit has images, or none has maps.
    """
    units, maps = run.units("images"), sample_counts(run.folder("maps"), run.units("maps"))
    return [unit for unit, count in sample_counts(run.folder("images"), units).items() if maps.get(unit, -1) < count]


def need_masks(run: Run, units: Sequence[int], otherwise: str = "") -> None:
    """Check that all ``units`` have masks.

    Args:
        run: with images.
        units: units that have images.
        otherwise: an alternative, for the end of the error message.

    Raises:
        MissingArtifact: some have none, or fewer masks than images; names the commands that make them.
    """
    masks, images = sample_counts(run.folder("masks"), run.units("masks")), sample_counts(run.folder("images"), units)
    missing = sorted(unit for unit in units if masks.get(unit, -1) < images.get(unit, 0))
    if not missing:
        return
    without_maps = sorted(set(missing) & set(units_without_maps(run)))
    named = without_maps or missing
    what = "neither masks nor maps" if without_maps else "no masks"
    if any(unit in masks for unit in named):  # the run has grown since
        what = "neither all masks nor all maps" if without_maps else "not all masks"
    commands = [run.remedy("images"), run.remedy("masks")] if without_maps else [run.remedy("masks")]
    raise MissingArtifact(
        f"{len(named)} of {len(units)} units of {run.path} have {what} yet (first: {named[0]:06d}); "
        f"run: {' and then: '.join(commands)}{otherwise}"
    )
