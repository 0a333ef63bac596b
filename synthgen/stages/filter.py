"""Choose the samples that are left out of the shards."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any, ClassVar, Self

from synthgen import codecs
from synthgen.config import Choice, check_range
from synthgen.errors import CorruptFile
from synthgen.filters import FILTERS, Candidate
from synthgen.filters import Filter as Contract
from synthgen.records import Report
from synthgen.rejected import FILTER, write_rejected
from synthgen.run import Run, digest
from synthgen.stages import Work, Worker, unhashed
from synthgen.stages._units import ImageStage, need_masks
from synthgen.units import sample_counts

__all__ = ["Filter"]

logger = logging.getLogger(__name__)

_DEFAULT = tuple(Choice(name) for name in ("blank", "unsafe", "unmasked", "duplicate"))


@dataclass(frozen=True)
class Filter(ImageStage):
    """Measure every image, and list the ones that shards and exports leave out, each with its reason.

    Filters apply in the given order; each sees only what the ones before it kept. Nothing is deleted: the figures of
    every image are stored in ``filter/``, and ``filter/rejected.json`` lists the rejected samples.
    """

    name: ClassVar = "filter"
    writes: ClassVar = (FILTER,)

    filters: tuple[Choice, ...] = _DEFAULT  # in the order in which they apply
    batch_size: int = unhashed(16)  # images measured at once

    def __post_init__(self) -> None:
        names = [Choice.of(choice).name for choice in self.filters]
        if not names:
            raise ValueError(f"filters must name at least one of {', '.join(FILTERS.names())}")
        if len(set(names)) < len(names):
            raise ValueError(f"filters may name each filter once, not {', '.join(names)}")
        check_range(ge=1, batch_size=self.batch_size)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Images, and masks if a filter uses them."""
        return ("images", "masks") if any(part.uses_masks for part in self._parts()) else ("images",)

    @property
    def accelerated(self) -> bool:  # type: ignore[override]
        """Whether a filter runs a network."""
        return any(part.accelerated for part in self._parts())

    def _parts(self) -> list[type[Contract]]:
        return [FILTERS.load(Choice.of(choice).name) for choice in self.filters]

    def complete(self) -> Self:
        """The same with every option of the filters spelled out."""
        return replace(self, filters=tuple(FILTERS.complete(choice) for choice in self.filters))

    def inputs(self, run: Run) -> dict[str, str]:
        """What the filters read besides the run."""
        found: dict[str, str] = {}
        for choice in self.filters:
            found |= FILTERS.build(choice).inputs()
        return found

    def plan(self, run: Run) -> list[int]:
        """The units that have images.

        Raises:
            MissingArtifact: there are none, or some have no masks yet and a filter reads masks.
        """
        units = run.units("images")
        if "masks" in self.reads:
            need_masks(run, units, otherwise="; or name filters that need no masks")
        return units

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Open the filters once; a unit is then measured batch by batch."""
        measures = {choice.name: FILTERS.build(choice).open(worker.device) for choice in self.filters}

        def work(unit: int) -> Report:
            candidates = self.candidates(run, unit)
            with run.write(FILTER, unit) as writer:
                while batch := list(islice(candidates, self.batch_size)):
                    figures = {name: measure(batch) for name, measure in measures.items()}
                    for row, candidate in enumerate(batch):
                        of_sample = {name: values[row] for name, values in figures.items()}
                        writer.add(candidate.request.key, {"json": json.dumps(of_sample).encode()})
                    worker.progress.advance(len(batch))
                count = writer.count
            return Report(unit, count)

        yield work

    def candidates(self, run: Run, unit: int) -> Iterator[Candidate]:
        """The samples of a unit in order; without masks unless a filter reads them.

        Raises:
            CorruptFile: a tar is unreadable, or images and masks hold different keys.
        """
        if "masks" not in self.reads:
            for key, image in run.read("images", unit):
                yield Candidate(*codecs.decode_image(key, image))
            return
        both = run.read("images", unit), run.read("masks", unit)
        for (key, image), (other, masks) in zip_longest(*both, fillvalue=("", {})):
            if key != other:
                raise CorruptFile(
                    f"{run.tar('images', unit)} and {run.tar('masks', unit)} hold different samples ({key or 'none'} "
                    f"and {other or 'none'}); delete the second and run: {run.remedy('masks')}"
                )
            yield Candidate(*codecs.decode_image(key, image), codecs.decode_masks(key, masks))

    def finish(self, run: Run) -> None:
        """Let the filters decide, and write ``rejected.json``."""
        reasons = dict[str, str]()
        for choice in self.filters:
            kept = ((key, figure) for key, figure in self.figures(run, choice.name) if key not in reasons)
            found = FILTERS.build(choice).reject(kept)
            reasons |= {key: f"{choice.name}: {reason}" for key, reason in found.items()}
        write_rejected(run, reasons, sum(sample_counts(run.folder(FILTER), self.plan(run)).values()))
        shards = run.find_artifact("shards")
        if shards is None or not shards["settings"].get("filtered", True):
            return
        if shards["inputs"].get("rejected samples", "") != (digest(reasons) if reasons else ""):
            logger.warning(
                "the shards of %s were packed without this filter, and training reads them as they are; delete %s and "
                "run: %s",
                run.path, run.folder("shards"), run.remedy("shards"),
            )  # fmt: skip

    def figures(self, run: Run, name: str) -> Iterator[tuple[str, Any]]:
        """Key and figure of every sample, by the filter ``name``; read unit by unit.

        Raises:
            CorruptFile: they cannot be read.
        """
        for unit in self.plan(run):
            for key, members in run.read(FILTER, unit):
                figures = codecs.decode_meta(key, members)
                if name not in figures:
                    path = run.tar(FILTER, unit)
                    raise CorruptFile(f"{path} lacks figures of {key}; delete it and run: {run.remedy(FILTER)}")
                yield key, figures[name]
