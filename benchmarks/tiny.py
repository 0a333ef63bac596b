"""The shipped model's image quality, mask quality and speed.

``python benchmarks/tiny.py --data DATA`` writes ``results/tiny.json``. DATA is what ``synthgen.tiny.fetch`` prepared.
The classifier that evaluates images lies beside this file; ``synthgen.tiny.classifier`` trained it on training
composites in 29 minutes, and ``--classifier FILE`` takes another. All composites measured are held-out ones, and the
classifier's own accuracy on them is reported too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import itertools
import multiprocessing as mp
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import write_result

from synthgen import api, tiny
from synthgen.engines.local import Local
from synthgen.prompts import sample_seed
from synthgen.records import Generation, Prompt, Request, sample_key
from synthgen.run import Run
from synthgen.tiny import score
from synthgen.tiny.classifier import Classifier
from synthgen.tiny.compositor import LAYOUTS, Compositor, Names
from synthgen.tiny.truth import BATCH, SEED, held_out

JUDGE = Path(__file__).with_name("tiny_judge.safetensors")
STEPS = (4, 8, 12, 16, 25)
GUIDANCE = (2.0, 3.0, 4.0, 5.0)
NUM_PAIRS = 512
CHUNK = 16  # images a batch
ROWS = 1000  # images of one run of keys


@dataclass(frozen=True)
class Artist:
    """Draws in this process or, where there is a ``pool``, in its processes, one thread each."""

    weights: Path
    workers: int
    pool: ProcessPoolExecutor | None = None

    def draw(
        self, prompts: Sequence[Prompt], *, seed: int, settings: tuple[int, float] | None = None
    ) -> tuple[list[Generation], float]:
        """One image a prompt, and images a second; ``settings`` are steps and guidance, else the defaults."""
        keys = [sample_key(*divmod(row, ROWS)) for row in range(len(prompts))]
        requests = [Request(key, one, sample_seed(seed, key)) for key, one in zip(keys, prompts, strict=True)]
        work = functools.partial(draw, self.weights, settings or (tiny.DEFAULT_STEPS, tiny.DEFAULT_GUIDANCE))
        batches = [requests[row : row + CHUNK] for row in range(0, len(requests), CHUNK)]
        parts, seconds = zip(*(self.pool.map if self.pool else map)(work, batches), strict=True)
        return list(itertools.chain.from_iterable(parts)), self.workers * len(requests) / sum(seconds)


@contextmanager
def artist(weights: Path, workers: int) -> Iterator[Artist]:
    """One with so many processes; with one it draws here."""
    if workers == 1:
        yield Artist(weights, 1)
        return
    with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool:
        yield Artist(weights, workers, pool)


@functools.lru_cache(maxsize=1)
def backbone(weights: Path) -> Any:
    torch.set_num_threads(1)
    return score.backbone(weights)


def draw(weights: Path, settings: tuple[int, float], requests: Sequence[Request]) -> tuple[list[Generation], float]:
    """One image a request, and the seconds that they took."""
    model = backbone(weights)
    model.sampling = replace(model.sampling, num_steps=settings[0], guidance_scale=settings[1])
    start = time.perf_counter()
    return model.generate(requests), time.perf_counter() - start


def one_object(artist: Artist, classifier: Classifier, names: Sequence[str], per_name: int) -> dict[str, Any]:
    """Top-1 of "a photo of a X" by the objects' own names; ``missed`` are those that no image of theirs showed."""
    asked = list(names) * per_name
    generations, _ = artist.draw([score.photo(name) for name in asked], seed=1)
    seen = score.classified(classifier, [generation.image for generation in generations])
    right = [one == other for one, other in zip(asked, seen, strict=True)]
    shown = {name for name, hit in zip(asked, right, strict=True) if hit}
    return {
        "top1": share(right),
        "images": len(right),
        "objects": len(names),
        "missed": [name for name in names if name not in shown],
    }


def two_objects(artist: Artist, classifier: Classifier, names: Sequence[str], num: int) -> dict[str, Any]:
    """Share of "a photo of a X and a Y" where the masks of both words show their objects."""
    generator = torch.Generator().manual_seed(SEED)
    pairs = [torch.randperm(len(names), generator=generator)[:2].tolist() for _ in range(num)]
    generations, _ = artist.draw([score.photo(names[one], names[other]) for one, other in pairs], seed=2)
    hits = [score.found(classifier, generation) for generation in generations]
    return {
        "both": share([len(hit) == 2 and all(hit) for hit in hits]),
        "each": round(sum(map(sum, hits)) / (2 * len(hits)), 4),
        "images": len(hits),
    }


def real(classifier: Classifier, compositor: Compositor, num: int) -> dict[str, Any]:
    """The same of held-out composites, by their exact masks: the most that the model's images could reach."""
    layouts = {"one object": LAYOUTS[:1], "two objects": LAYOUTS[1:2]}
    right: dict[str, list[bool]] = {name: [] for name in layouts}
    generator = torch.Generator().manual_seed(SEED - 1)
    for name, start in itertools.product(layouts, range(0, num, BATCH)):
        batch = compositor.draw(min(BATCH, num - start), generator, layouts[name])
        if name == "one object":
            seen = score.classified(classifier, batch.images)
            right[name] += [one == objects[0] for one, objects in zip(seen, batch.objects, strict=True)]
        else:
            rows = zip(batch.images, batch.objects, batch.masks[:, :2], strict=True)
            right[name] += [all(score.seen(classifier, *row)) for row in rows]
    return {"top1": share(right["one object"]), "both": share(right["two objects"]), "images": num}


def speed(names: Sequence[str], num: int, workers: int) -> dict[str, Any]:
    """Images a second of ``synthgen generate`` with its attention recorded: as a whole, and once its workers run."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, run = Path(folder) / "prompts.txt", Run.create(Path(folder) / "run")
        asked = [score.photo(name) for name in itertools.islice(itertools.cycle(names), num)]
        prompts.write_text("".join(f"{one.text[: one.spans[0][0]]}[{one.words[0]}]\n" for one in asked))
        size = max(1, num // (4 * workers))  # so that no worker waits long for the other
        summary = api.generate(run, engine=Local(workers=workers), prompts=str(prompts), unit_size=size)
        marks = [run.mark("images", unit) for unit in run.units("images")]
    seconds = sum(mark["seconds"] for mark in marks if mark)
    return {
        "images_per_second": round(workers * summary.samples / seconds, 2),
        "with_start": round(summary.samples / summary.seconds, 2),
        "images": summary.samples,
        "workers": workers,
    }


def defaults() -> dict[str, Any]:
    return {"num_steps": tiny.DEFAULT_STEPS, "guidance_scale": tiny.DEFAULT_GUIDANCE}


def samplers(
    artist: Artist, classifier: Classifier, names: Sequence[str], settings: Iterable[tuple[int, float]]
) -> list[dict[str, Any]]:
    """Top-1 and images a second by steps and guidance, of the same objects from the same noise."""
    rows = []
    for steps, guidance in settings:
        generations, rate = artist.draw([score.photo(name) for name in names], seed=3, settings=(steps, guidance))
        seen = score.classified(classifier, [generation.image for generation in generations])
        top1 = share([one == other for one, other in zip(names, seen, strict=True)])
        row = {"steps": steps, "guidance": guidance, "images": len(seen), "top1": top1}
        rows.append({**row, "images_per_second": round(rate, 2)})
        print(rows[-1], flush=True)
    return rows


def share(values: Sequence[bool]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def some(names: Sequence[str], num: int) -> list[str]:
    """``num`` of the names, always the same ones."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [names[k] for k in sorted(order[:num])]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    classifier = Classifier.load(options.classifier)
    compositor = Compositor(options.data, Names.load(), held_out=True)
    names = [name for name, rows in zip(compositor.names.own, compositor.plain, strict=True) if rows]
    if unknown := set(names) - set(classifier.names):
        raise SystemExit(f"error: {options.classifier} does not know {sorted(unknown)[:5]}; train it on this data")
    model: Any = score.backbone(options.weights)
    batches = list(held_out(options.data, options.num))
    quick = options.quick
    figures: dict[str, Any] = {"size_mb": score.size_mb(options.weights), "objects": len(names), **defaults()}

    def note(name: str, value: Any) -> None:
        figures[name] = value
        print(f"{name}: {value}", flush=True)

    note("vae_psnr_db", score.vae_psnr(model.pipeline.vae, batches))
    note("held_out", real(classifier, compositor, options.num))
    note("masks", score.mask_ious(score.attend(model, batches)))
    with artist(options.weights, options.workers) as drawing:
        drawn = some(names, 4) if quick else names
        note("one_object", one_object(drawing, classifier, drawn, 1 if quick else options.per_object))
        note("two_objects", two_objects(drawing, classifier, names, 4 if quick else NUM_PAIRS))
        cells = itertools.product(STEPS[:1] if quick else STEPS, GUIDANCE[:2] if quick else GUIDANCE)
        note("samplers", samplers(drawing, classifier, some(names, 4 if quick else options.table_objects), cells))
    if options.weights == tiny.WEIGHTS:
        note("speed", speed(names, 4 if quick else 256, options.workers))
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and, unless it was quick, write ``results/tiny.json``."""
    parser = argparse.ArgumentParser(prog="python benchmarks/tiny.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--classifier", type=Path, default=JUDGE, help="what synthgen.tiny.classifier wrote")
    parser.add_argument("--weights", type=Path, default=tiny.WEIGHTS, help="another pipeline to measure")
    parser.add_argument("--num", type=int, default=512, help="how many held-out composites")
    parser.add_argument("--per-object", type=int, default=2, help="images of each object")
    parser.add_argument("--table-objects", type=int, default=200, help="objects of each cell of the samplers' table")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="a handful of images, and nothing is written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = measure(options)
    if not options.quick:
        print(write_result("tiny", figures))
    return figures


if __name__ == "__main__":
    main()
