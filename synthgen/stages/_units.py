"""The units that a stage reads: their content, and the commands that make those that are missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.run import Run, digest
from synthgen.stages import Stage
from synthgen.units import counts_of

__all__ = ["content_of", "images_of", "least_of_pair", "need_masks", "units_without_maps", "warn_of_fewer"]

logger = logging.getLogger(__name__)


def images_of(stage: Stage, run: Run) -> int:
    """How many images ``stage`` or a command before it asks for; the sizes of the units follow from that."""
    entry = run.claimed.get("images")
    return (stage if entry is None else stage.at_least(run, entry["settings"])).asked(run)


def warn_of_fewer(stage: Stage, run: Run) -> None:
    """Say that fewer images are asked for than a command before asked for; none is deleted."""
    asked, before = stage.asked(run), images_of(stage, run)
    if asked < before:
        logger.warning(
            "%s was already asked for %d images, more than the %d of this command: nothing is deleted, and commands "
            "without a limit go on to all %d",
            run.path, before, asked, before,
        )  # fmt: skip


def least_of_pair(stage: Stage, run: Run, artifact: str, units: Sequence[int]) -> Mapping[int, int]:
    """How many samples a unit of images must hold to be done; one of maps must hold those of its images."""
    return stage.sizes(run, units) if artifact == "images" else counts_of(run.folder("images"), units)


def content_of(run: Run, artifact: str, units: Sequence[int]) -> str:
    """A hash of the content of these units (see :meth:`Run.units`), from their done marks.

    Raises:
        CorruptFile: a unit is not there, or not as long as its mark says.
    """
    found = {unit: mark["sha256"] for unit, mark in run.iter_marks(artifact)}
    for unit in units:
        if unit not in found:
            raise CorruptFile(
                f"{run.tar(artifact, unit)} is missing, cut off, or not the one that was made; "
                f"delete it and run: {run.remedy(artifact)}"
            )
    return digest([[unit, found[unit]] for unit in units])


def units_without_maps(run: Run) -> list[int]:
    """The units whose images have no maps, or not all of them, in order: a worker was killed between the two.

    Raises:
        MissingArtifact: no unit has images, or none has maps.
    """
    units, maps = run.units("images"), counts_of(run.folder("maps"), run.units("maps"))
    return [unit for unit, count in counts_of(run.folder("images"), units).items() if maps.get(unit, -1) < count]


def need_masks(run: Run, units: Sequence[int], otherwise: str = "") -> None:
    """Check that all ``units`` have masks.

    Args:
        run: with images.
        units: that have images.
        otherwise: what else can be done, for the end of the error.

    Raises:
        MissingArtifact: some have none, or fewer than images; names the commands that make them.
    """
    masks, images = counts_of(run.folder("masks"), run.units("masks")), counts_of(run.folder("images"), units)
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
