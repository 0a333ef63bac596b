"""Ask a backbone for images and keep where each word looked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from synthgen import codecs
from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.prompts import read_prompts, request_for, to_jsonl
from synthgen.records import Generation, Prompt
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker, free
from synthgen.stages._generations import write_unit
from synthgen.stores.tar import write_bytes

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate(Stage):
    """Make ``images_per_prompt`` images of every prompt, with the attention of its marked words.

    Image ``i`` shows prompt ``i mod P`` of the ``P`` prompts, so a part of a run holds all of them. Its seed comes
    from the run's seed and its key alone: order and workers change no byte, and ``batch_size`` no more than rounding.
    """

    name: ClassVar = "generate"
    reads: ClassVar = ()
    writes: ClassVar = ("images", "maps")
    accelerated: ClassVar = True

    prompts: str = field(metadata={"free": True})  # a file; its content counts, not its name
    template: str = free("")  # a file of templates, or none
    images_per_prompt: int = 1
    limit: int = 0  # at most so many images; 0: all
    unit_size: int = 64  # images a unit: what is lost at most when a worker is killed
    batch_size: int = free(16)
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

    def complete(self) -> Generate:
        """With every option of the backbone."""
        return replace(self, backbone=BACKBONES.complete(self.backbone, "device"))

    def inputs(self, run: Run) -> dict[str, str]:
        """The content of the prompt file after templates."""
        return {"prompts": hashlib.sha256(self._copy()).hexdigest()}

    def prepare(self, run: Run) -> None:
        """Put the run's own copy of its prompts down."""
        write_bytes(run.path / "prompts.jsonl", self._copy())

    def plan(self, run: Run) -> list[int]:
        """Units of ``unit_size`` images; the last may be smaller."""
        return list(range(-(-self._total() // self.unit_size)))

    def size(self, run: Run, unit: int) -> int:
        """Images of one unit."""
        return min(self.unit_size, self._total() - unit * self.unit_size)

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Load the backbone; then a unit is its requests in batches."""
        from synthgen.diffusion import one_thread

        prompts = self._prompts()
        backbone = BACKBONES.build(self.backbone, device=worker.device)

        def batches(unit: int) -> Iterator[list[Generation]]:
            requests = [
                request_for(prompts, run.seed, unit, row, self.unit_size) for row in range(self.size(run, unit))
            ]
            for start in range(0, len(requests), self.batch_size):
                yield backbone.generate(requests[start : start + self.batch_size])

        with one_thread(worker.device):
            yield lambda unit: write_unit(run, unit, batches(unit), worker.tick)

    def _prompts(self) -> list[Prompt]:
        files = [Path(name) for name in (self.prompts, self.template) if name]
        return _read(tuple((str(path), path.stat().st_mtime_ns if path.exists() else 0) for path in files))

    def _copy(self) -> bytes:
        return to_jsonl([codecs.prompt_to_json(prompt) for prompt in self._prompts()])

    def _total(self) -> int:
        total = len(self._prompts()) * self.images_per_prompt
        return min(total, self.limit) if self.limit else total


@lru_cache(maxsize=2)
def _read(files: tuple[tuple[str, int], ...]) -> list[Prompt]:
    """Prompts by the names and dates of their files: a million lines are read once, not for every unit."""
    return read_prompts(*(name for name, _ in files))
