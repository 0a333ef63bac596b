"""Any record in one call, and runs full of drawn samples: no torch, no weights, milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from synthgen import codecs
from synthgen.engines.local import Local
from synthgen.records import AFFINITY_OFFSETS, Generation, Maps, Prompt, Report, Request, WordMasks, sample_key
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Stage, Work, Worker
from synthgen.tallies import Tallies

WORDS = ("disc", "square")


def make_prompt(words: tuple[str, ...] = ("disc",), label: str | None = "disc") -> Prompt:
    text = "a photo of " + " and ".join(f"a {word}" for word in words)
    spans, start = [], 0
    for word in words:
        start = text.index(word, start)
        spans.append((start, start + len(word)))
        start += len(word)
    return Prompt(text, words, tuple(spans), label)


def record_settings(run: Run, stage: Stage) -> None:
    """Give the folders of a stage its settings, as if it had begun."""
    with run.claim(stage):
        pass


def shape_mask(word: str, row: float, column: float, radius: float, size: int) -> np.ndarray:
    """A disc or a square as H W booleans; place and radius in pixels."""
    y, x = np.mgrid[:size, :size] + 0.5
    if word == "disc":
        return (y - row) ** 2 + (x - column) ** 2 < radius**2
    return np.maximum(abs(y - row), abs(x - column)) < radius * 0.8


def make_generation(
    key: str = "0000000000",
    words: tuple[str, ...] = ("disc",),
    size: int = 64,
    grid: int = 16,
    seed: int = 0,
    label: str | None = "disc",
) -> tuple[Generation, np.ndarray]:
    """A drawn sample and its true masks (words H W): shapes of one colour over noise, maps from the shrunk truth."""
    rng = np.random.default_rng(seed)
    image = rng.integers(60, 120, (size, size, 3)).astype(np.uint8)
    truth = np.zeros((len(words), size, size), bool)
    for index, word in enumerate(words):
        column = size * (index + 0.5) / len(words) + rng.uniform(-2, 2)
        radius = size * (0.3 if len(words) == 1 else 0.18)
        truth[index] = shape_mask(word, size / 2 + rng.uniform(-4, 4), column, radius, size)
        image[truth[index]] = (220, 40, 40) if word == "disc" else (40, 60, 220)
    step = size // grid
    weights = truth.reshape(len(words), grid, step, grid, step).mean((2, 4)) * 0.5
    weights = np.clip(weights + rng.normal(0, 0.03, weights.shape), 0, 1).astype(np.float16)
    label_of = (truth * np.arange(1, len(words) + 1)[:, None, None]).max(0)[step // 2 :: step, step // 2 :: step]
    affinity = np.zeros((len(AFFINITY_OFFSETS), grid, grid), np.float16)
    for edge, (down, right) in enumerate(AFFINITY_OFFSETS):
        for y in range(grid):
            for x in range(grid):
                if 0 <= y + down < grid and 0 <= x + right < grid:
                    affinity[edge, y, x] = 4.0 if label_of[y, x] == label_of[y + down, x + right] else 0.5
    prompt = make_prompt(words, label)
    return Generation(Request(key, prompt, seed), image, Maps(words, weights, affinity)), truth


@dataclass(frozen=True)
class Drawn(Stage):
    """Stands in for ``generate``: the same artifacts, drawn instead of dreamt. Labels alternate over ``WORDS``."""

    name: ClassVar = "generate"
    reads: ClassVar = ()
    writes: ClassVar = ("images", "maps")

    units: int = 2
    unit_size: int = 6
    image_size: int = 64
    distinct: int = 0  # so many images, again and again; 0: all are different

    def plan(self, run: Run) -> list[int]:
        return list(range(self.units))

    def size(self, run: Run, unit: int) -> int:
        return self.unit_size

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        def work(unit: int) -> Report:
            with run.write("maps", unit) as maps, run.write("images", unit) as images:
                for row in range(self.unit_size):
                    number = unit * self.unit_size + row
                    number %= self.distinct or number + 1
                    words = WORDS if number % 3 == 2 else (WORDS[number % 2],)
                    generation, _ = make_generation(
                        sample_key(unit, row), words, self.image_size, seed=number, label=words[0]
                    )
                    images.add(generation.request.key, codecs.encode_image(generation))
                    maps.add(generation.request.key, codecs.encode_maps(generation.maps))
                    worker.progress.advance(1)
            return Report(unit, self.unit_size)

        yield work


@dataclass(frozen=True)
class TrueMasks(Stage):
    """Stands in for ``masks``: the exact masks of the drawn samples."""

    name: ClassVar = "masks"
    reads: ClassVar = ("images", "maps")
    writes: ClassVar = ("masks",)

    def plan(self, run: Run) -> list[int]:
        return run.units("maps")

    def size(self, run: Run, unit: int) -> int:
        return len(run.keys("maps", unit))

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        def work(unit: int) -> Report:
            tallies = Tallies()
            with run.write("masks", unit) as masks:
                for key, members in run.read("images", unit):
                    request, image, _ = codecs.decode_image(key, members)
                    _, truth = make_generation(key, request.prompt.words, len(image), seed=request.seed)
                    words = request.prompt.words
                    scores = np.full(len(words), 0.5, np.float32)
                    masks.add(key, codecs.encode_masks(WordMasks(words, truth, scores, ("",) * len(words))))
                    tallies.count(request.prompt.label or "", words, ("",) * len(words))
                masks.about["tallies"] = tallies.plain()
            return Report(unit, self.size(run, unit))

        yield work


def make_run(
    path: Path, *, units: int = 2, unit_size: int = 6, image_size: int = 64, masks: bool = True, distinct: int = 0
) -> Run:
    """A run with images, maps and (unless ``masks`` is False) masks of drawn discs and squares."""
    run = Run.create(path)
    run_stage(Drawn(units, unit_size, image_size, distinct), run, Local(workers=1))
    if masks:
        run_stage(TrueMasks(), run, Local(workers=1))
    return run
