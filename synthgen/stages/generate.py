"""Generate images and record the cross-attention map of each marked word."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from synthgen.backbones import BACKBONES
from synthgen.config import Choice, check_range
from synthgen.errors import MissingArtifact, StaleArtifact
from synthgen.prompt_copy import Content, PromptCopy, check_copy, content_of, ensure_copy, open_copy
from synthgen.prompts import iter_prompts, request_for
from synthgen.records import Generation, Request
from synthgen.run import Run
from synthgen.stages import Work, Worker, growing, unhashed
from synthgen.stages._generations import write_unit
from synthgen.stages._units import ImageMaker

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate(ImageMaker):
    """Make ``images_per_prompt`` images of every prompt, with the attention of its marked words.

    Image ``i`` shows prompt ``i mod P`` of the ``P`` prompts, so the first images of a run cover all prompts. Its seed
    depends only on the run's seed and its key: order and workers change no byte, ``batch_size`` changes only rounding.
    So a larger ``limit`` or ``images_per_prompt`` adds images to a run; a last unit that is not full is made again.
    """

    name: ClassVar = "generate"

    prompts: str = field(metadata={"unhashed": True})  # a file, whose content counts; "": the run's own copy
    template: str = unhashed("")  # a file of templates, or none
    images_per_prompt: int = growing(1)
    limit: int = growing(0)  # at most so many images; 0: all
    unit_size: int = 64  # images a unit: what is lost at most when a worker is killed
    batch_size: int = unhashed(16)
    backbone: Choice = Choice("tiny")

    def __post_init__(self) -> None:
        check_range(ge=1, images_per_prompt=self.images_per_prompt, batch_size=self.batch_size)
        check_range(ge=0, limit=self.limit)
        check_range(ge=1, le=10_000, unit_size=self.unit_size)
        if self.template and not self.prompts:
            raise ValueError("a template is applied to a prompt file; give prompts as well")

    def source_names(self) -> tuple[str, ...]:
        """The files of prompts and templates."""
        return tuple(self._files()) or ("prompts",)

    def complete(self) -> Generate:
        """The same with every option of the backbone filled in."""
        return replace(self, backbone=BACKBONES.complete(self.backbone, "device"))

    def inputs(self, run: Run) -> dict[str, str]:
        """The content of the prompt file after templates, or of the run's own copy.

        Raises:
            MissingArtifact, PromptError: there is no such file, it cannot be read, or the run has no copy yet.
        """
        return {"prompts": self._content().sha256 if self.prompts else _images_entry(run)["inputs"]["prompts"]}

    def recorded_settings(self, run: Run) -> dict[str, Any]:
        """The settings; without a prompt file, with the names of the files that the run's own prompts came from."""
        before = {} if self.prompts else _images_entry(run)["settings"]
        return self.settings() | {name: before[name] for name in ("prompts", "template") if name in before}

    def own_prompts(self, run: Run) -> PromptCopy | None:
        """The run's own copy of its prompts; None if the stage has a prompt file.

        Raises:
            MissingArtifact, StaleArtifact: the run has no copy yet, or a copy of other prompts.
        """
        return None if self.prompts else open_copy(run.path, _images_entry(run)["inputs"]["prompts"])

    def check_sources(self, run: Run) -> None:
        """Check the prompt file, or the run's own copy.

        Raises:
            MissingArtifact, PromptError, CorruptFile: it is missing, or cannot be read.
        """
        self.inputs(run)
        if not self.prompts:
            self.prepare(run)

    def prepare(self, run: Run) -> Self:
        """Write the run's own copy of its prompts, which workers read; without a prompt file, check that copy.

        Raises:
            MissingArtifact, CorruptFile: the copy is missing or damaged; names the command that writes it anew.
        """
        if self.prompts:
            ensure_copy(run.path, iter_prompts(*self._files()), self._content())
        else:
            check_copy(run.path, run.artifact("images")["inputs"]["prompts"])
        self.warn_of_fewer(run)
        return self

    def num_units(self, run: Run) -> int:
        """How many units there are, by the run's copy of its prompts if it has one."""
        return -(-self.total(run) // self.unit_size)

    def total(self, run: Run) -> int:
        """See :meth:`ImageMaker.total`; of a run that is not claimed, by its copy of the prompts if it has one."""
        if "images" not in run.claimed:
            with suppress(MissingArtifact, StaleArtifact):
                return self._images(len(_copy_of(run)))
        return super().total(run)

    def requests(self, run: Run, unit: int) -> list[Request]:
        """The images of one unit, in order.

        Raises:
            MissingArtifact, StaleArtifact, CorruptFile: the run's copy of its prompts has changed since
                :meth:`prepare`.
        """
        prompts = _copy_of(run)
        return [request_for(prompts, run.seed, unit, row, self.unit_size) for row in range(self.size(run, unit))]

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Load the backbone; a unit is then generated batch by batch."""
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
        """The content of the prompt file, templates applied."""
        return _content(tuple((name, _mtime(Path(name))) for name in self._files()))

    def num_samples(self, run: Run) -> int:
        """Images in total; of a claimed run, from its own copy of the prompts."""
        own = "images" in run.claimed or not self.prompts
        return self._images(len(_copy_of(run)) if own else self._content().count)

    def _images(self, prompts: int) -> int:
        total = prompts * self.images_per_prompt
        return min(total, self.limit) if self.limit else total


def _images_entry(run: Run) -> dict[str, Any]:
    """What the run's images are made with.

    Raises:
        MissingArtifact: the run has no images yet, or they are not made from prompts.
    """
    entry = run.find_artifact("images")
    if entry is None or "prompts" not in entry["inputs"]:
        raise MissingArtifact(
            f"{run.path} has no prompts yet; give some with: "
            f"synthgen generate --prompts FILE --run {shlex.quote(str(run.path))}"
        )
    return entry


def _copy_of(run: Run) -> PromptCopy:
    """The run's copy of the prompts that its images show."""
    return open_copy(run.path, run.artifact("images")["inputs"].get("prompts", ""))


def _mtime(path: Path) -> int:
    """When a file was last written, in nanoseconds; 0 if that is unknown: reading the file will say why."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=2)
def _content(files: tuple[tuple[str, int], ...]) -> Content:
    """Cached by names and times of the files, so that a million lines are read once per command."""
    return content_of(iter_prompts(*(name for name, _ in files)))
