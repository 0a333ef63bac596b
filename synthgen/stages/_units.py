"""The units that a stage reads: their content, and the commands that make those that are missing."""

from __future__ import annotations

from collections.abc import Sequence

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.run import Run, digest

__all__ = ["content_of", "need_masks", "units_without_maps"]


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
    """The units with images and no maps, in order: a worker was killed between the two.

    Raises:
        MissingArtifact: no unit has images, or none has maps.
    """
    return sorted(set(run.units("images")) - set(run.units("maps")))


def need_masks(run: Run, units: Sequence[int], otherwise: str = "") -> None:
    """Check that all ``units`` have masks.

    Args:
        run: with images.
        units: that have images.
        otherwise: what else can be done, for the end of the error.

    Raises:
        MissingArtifact: some have none; names the commands that make them.
    """
    missing = sorted(set(units) - set(run.units("masks")))
    if not missing:
        return
    without_maps = sorted(set(missing) & set(units_without_maps(run)))
    named = without_maps or missing
    what = "neither masks nor maps" if without_maps else "no masks"
    commands = [run.remedy("images"), run.remedy("masks")] if without_maps else [run.remedy("masks")]
    raise MissingArtifact(
        f"{len(named)} of {len(units)} units of {run.path} have {what} yet (first: {named[0]:06d}); "
        f"run: {' and then: '.join(commands)}{otherwise}"
    )
