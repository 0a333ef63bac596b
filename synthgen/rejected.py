"""The samples that the ``filter`` stage rejected: ``filter/rejected.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from synthgen.errors import CorruptFile, MissingArtifact, StaleArtifact
from synthgen.run import Run, digest
from synthgen.stores.tar import write_json
from synthgen.units import sample_counts
from synthgen.untrusted import read_file, read_json

__all__ = ["FILTER", "REJECTED", "count_rejected", "read_rejected", "rejected_summary", "write_rejected"]

FILTER = "filter"  # the artifact and the stage
REJECTED = "rejected.json"  # in its folder
_MAX_BYTES = 2**32  # of that file; ten million rejected samples are about 1e9


def write_rejected(run: Run, reasons: Mapping[str, str], samples: int) -> None:
    """Write the decision on all images of a run.

    Args:
        run: whose images are all measured.
        reasons: of each rejected sample by its key, as "filter: detail".
        samples: how many there are, rejected or not.
    """
    listed = {"units": _content(run), "samples": samples, "rejected": dict(sorted(reasons.items()))}
    write_json(run.folder(FILTER) / REJECTED, listed)


def read_rejected(run: Run) -> dict[str, str]:
    """The rejected samples of a run, each with its reason as "filter: detail"; none if the run has no filter.

    Raises:
        MissingArtifact: the filter has not seen all images that the run has by now.
        StaleArtifact: it has seen other images or masks.
        CorruptFile: the list cannot be read.
    """
    entry = run.find_artifact(FILTER)
    if entry is None:
        return {}
    for name in ("images", "masks"):
        if name in entry["inputs"] and entry["inputs"][name] != run.artifact(name)["fingerprint"]:
            raise StaleArtifact(
                f"the {name} of {run.path} are not those that were filtered; delete {run.folder(FILTER)} and run: "
                f"{run.remedy(FILTER)}"
            )
    path = run.folder(FILTER) / REJECTED
    try:
        listed = read_json(read_file(path, _MAX_BYTES), _MAX_BYTES)
        units, rejected = listed["units"], listed["rejected"]
        if not isinstance(rejected, dict) or not all(isinstance(reason, str) for reason in rejected.values()):
            raise ValueError("it is no list of samples with reasons")
    except FileNotFoundError:
        units, rejected = "", {}
    except (ValueError, LookupError, TypeError):
        raise CorruptFile(f"{path} cannot be read; delete it and run: {run.remedy(FILTER)}") from None
    images, measured = (sample_counts(run.folder(name), run.units("images")) for name in ("images", FILTER))
    if units != _content(run) or any(measured.get(unit, -1) < count for unit, count in images.items()):
        raise MissingArtifact(
            f"the filter of {run.path} has not seen all images; run: {run.remedy(FILTER)}; "
            f"or delete {run.folder(FILTER)} to keep every sample"
        )
    return rejected


def count_rejected(reasons: Iterable[str]) -> dict[str, int]:
    """How many samples each filter rejected, most first."""
    return dict(Counter(reason.partition(":")[0] for reason in reasons).most_common())


def rejected_summary(run: Run) -> str:
    """How many samples were rejected, in all and by each filter.

    Raises:
        MissingArtifact, CorruptFile: see :func:`read_rejected`.
    """
    rejected = read_rejected(run)
    counts = ", ".join(f"{name} {count:,}" for name, count in count_rejected(rejected.values()).items())
    total = sum(sample_counts(run.folder(FILTER), run.units(FILTER)).values())
    return f"{len(rejected):,} of {total:,} samples{f' ({counts})' if counts else ''}"


def _content(run: Run) -> str:
    return digest(sorted([unit, mark["sha256"]] for unit, mark in run.iter_marks(FILTER)))
