"""Generate images and record the cross-attention map of each marked word."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import MissingArtifact, StaleArtifact
from synthgen.prompt_copy import Content, PromptCopy, check_copy, content_of, keep_copy, open_copy
from synthgen.prompts import iter_prompts, request_for
from synthgen.records import Generation, Request
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker, growing, unhashed
from synthgen.stages._generations import write_unit
from synthgen.stages._units import images_of, least_of_pair, warn_of_fewer

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate(Stage):
    """Make ``images_per_prompt`` images of every prompt, with the attention of its marked words.

    Image ``i`` shows prompt ``i mod P`` of the ``P`` prompts, so a part of a run holds all of them. Its seed comes
    from the run's seed and its key alone: order and workers change no byte, and ``batch_size`` no more than rounding.
    So with a larger ``limit`` or ``images_per_prompt``, images are added to those of a run; its last unit, if it is not
    full, is made again.
    """

    name: ClassVar = "generate"
    reads: ClassVar = ()
    writes: ClassVar = ("images", "maps")
    accelerated: ClassVar = True

    prompts: str = field(metadata={"unhashed": True})  # a file, whose content counts; "": the run's own copy
    template: str = unhashed("")  # a file of templates, or none
    images_per_prompt: int = growing(1)
    limit: int = growing(0)  # at most so many images; 0: all
    unit_size: int = 64  # images a unit: what is lost at most when a worker is killed
    batch_size: int = unhashed(16)
    backbone: Choice = Choice("tiny")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("images_per_prompt", 1, None),
            ("limit", 0, None),
            ("unit_size", 1, 10_000),
            ("batch_size", 1, None),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                raise ValueError(
                    f"{name} must be at least {least}{f' and at most {most}' if most else ''}, not {value}"
                )

        if self.template and not self.prompts:
            raise ValueError("a template is put over a prompt file; give prompts as well")

    def source_names(self) -> tuple[str, ...]:
        """The files of prompts and templates."""
        return tuple(self._files()) or ("prompts",)

    def complete(self) -> Generate:
        """With every option of the backbone."""
        return replace(self, backbone=BACKBONES.complete(self.backbone, "device"))

    def inputs(self, run: Run) -> dict[str, str]:
        """The content of the prompt file after templates, or of the run's own copy.

        Raises:
            MissingArtifact, PromptError: there is no such file, or it cannot be read; the run has no copy yet.
        """
        return {"prompts": self._content().sha256 if self.prompts else _begun(run)["inputs"]["prompts"]}

    def recorded_settings(self, run: Run) -> dict[str, Any]:
        """The settings; a run that goes on with its own prompts keeps the names of the files that those came from."""
        before = {} if self.prompts else _begun(run)["settings"]
        return self.settings() | {name: before[name] for name in ("prompts", "template") if name in before}

    def own_prompts(self, run: Run) -> PromptCopy | None:
        """The run's own copy of its prompts, where the stage goes on with that; None where it has a file.

        Raises:
            MissingArtifact, StaleArtifact: the run has none yet, or not the one that it was begun with.
        """
        return None if self.prompts else open_copy(run.path, _begun(run)["inputs"]["prompts"])

    def check_sources(self, run: Run) -> None:
        """Check the prompt file, or the run's own copy.

        Raises:
            MissingArtifact, PromptError, CorruptFile: it is not there, or cannot be read.
        """
        self.inputs(run)
        if not self.prompts:
            self.prepare(run)

    def prepare(self, run: Run) -> Self:
        """Put the run's own copy of its prompts down, which is what workers read; or see that it is whole.

        Raises:
            MissingArtifact, CorruptFile: it is not; names the command that writes it anew.
        """
        if self.prompts:
            keep_copy(run.path, iter_prompts(*self._files()), self._content())
        else:
            check_copy(run.path, run.artifact("images")["inputs"]["prompts"])
        warn_of_fewer(self, run)
        return self

    def plan(self, run: Run) -> list[int]:
        """Units of ``unit_size`` images; the last may be smaller."""
        return list(range(self._units(self.asked(run))))

    def planned(self, run: Run) -> int:
        """How many units there are, by the run's copy of its prompts where it has one."""
        return self._units(self._planned_images(run))

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit; of a run that was asked for more images before, as many as it has among those."""
        return min(self.unit_size, images_of(self, run) - unit * self.unit_size)

    def sizes(self, run: Run, units: Sequence[int]) -> dict[int, int]:
        """Images of each unit, by the run's copy of its prompts where it has one."""
        total = images_of(self, run) if "images" in run.claimed else self._planned_images(run)
        return {unit: min(self.unit_size, total - unit * self.unit_size) for unit in units}

    def least(self, run: Run, artifact: str, units: Sequence[int]) -> Mapping[int, int]:
        """See :func:`~synthgen.stages._units.least_of_pair`."""
        return least_of_pair(self, run, artifact, units)

    def requests(self, run: Run, unit: int) -> list[Request]:
        """The images of one unit, in order.

        Raises:
            MissingArtifact, StaleArtifact, CorruptFile: the run's copy of its prompts is not as :meth:`prepare` left
                it.
        """
        prompts = _copy_of(run)
        return [request_for(prompts, run.seed, unit, row, self.unit_size) for row in range(self.size(run, unit))]

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Load the backbone; then a unit is its requests in batches."""
        from synthgen.diffusion import one_thread

        backbone = BACKBONES.build(self.backbone, device=worker.device)

        def batches(unit: int) -> Iterator[list[Generation]]:
            requests = self.requests(run, unit)
            for start in range(0, len(requests), self.batch_size):
                yield backbone.generate(requests[start : start + self.batch_size])

        with one_thread(worker.device):
            yield lambda unit: write_unit(run, unit, batches(unit), worker.progress.advance)

    def _files(self) -> list[str]:
        return [name for name in (self.prompts, self.template) if name]

    def _content(self) -> Content:
        """What the prompt file holds, templates applied."""
        return _content(tuple((str(Path(name)), _date(Path(name))) for name in self._files()))

    def asked(self, run: Run) -> int:
        """Images in all; of a run that is worked on, by its own copy of the prompts."""
        own = "images" in run.claimed or not self.prompts
        return self._images(len(_copy_of(run)) if own else self._content().count)

    def _images(self, prompts: int) -> int:
        total = prompts * self.images_per_prompt
        return min(total, self.limit) if self.limit else total

    def _planned_images(self, run: Run) -> int:
        try:
            return self._images(len(_copy_of(run)))
        except (MissingArtifact, StaleArtifact):
            return self.asked(run)

    def _units(self, images: int) -> int:
        return -(-images // self.unit_size)


def _begun(run: Run) -> dict[str, Any]:
    """What is noted of the images that the run was begun with.

    Raises:
        MissingArtifact: nothing is, or they are not made from prompts.
    """
    entry = run.find_artifact("images") if run.is_there else None
    if entry is None or "prompts" not in entry["inputs"]:
        raise MissingArtifact(
            f"{run.path} has no prompts yet; give some with: "
            f"synthgen generate --prompts FILE --run {shlex.quote(str(run.path))}"
        )
    return entry


def _copy_of(run: Run) -> PromptCopy:
    """The run's copy of the prompts that its images show."""
    return open_copy(run.path, run.artifact("images")["inputs"].get("prompts", ""))


def _date(path: Path) -> int:
    """When a file was last written, in nanoseconds; 0 where that cannot be asked, which its reader says in a line."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=2)
def _content(files: tuple[tuple[str, int], ...]) -> Content:
    """By the names and dates of the files: a million lines are read once, not for every question."""
    return content_of(iter_prompts(*(name for name, _ in files)))
