"""The image quality, mask quality and speed of the shipped model.

``python benchmarks/tiny.py --data DATA`` writes ``results/tiny.json``; DATA is the folder that ``synthgen.tiny.fetch``
prepared. Generated images are evaluated by a classifier, ``tiny_judge.safetensors``, which
``synthgen.tiny.classifier`` trained on training composites in 29 minutes; ``--classifier FILE`` uses another. Its
accuracy on held-out composites is reported as well. Masks are compared with the exact masks of held-out composites.
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
from _common import make_parser, write_result

from synthgen import api, tiny
from synthgen.engines.local import Local
from synthgen.prompts import sample_seed
from synthgen.records import Generation, Prompt, Request, sample_key
from synthgen.run import Run
from synthgen.tiny import score
from synthgen.tiny.classifier import Classifier, matches
from synthgen.tiny.compositor import LAYOUTS, Compositor, Names
from synthgen.tiny.truth import BATCH_SIZE, SEED, held_out

CLASSIFIER = Path(__file__).with_name("tiny_judge.safetensors")
STEPS = (4, 8, 12, 16, 25)
GUIDANCE = (2.0, 3.0, 4.0, 5.0)
NUM_PAIRS = 512
CHUNK = 16  # images per batch
UNIT_SIZE = 1000  # images per unit, for their keys


@dataclass(frozen=True)
class Sampler:
    """Generates images in this process or in those of ``pool``, with one thread each."""

    weights: Path
    workers: int
    pool: ProcessPoolExecutor | None = None

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, settings: tuple[int, float] | None = None
    ) -> tuple[list[Generation], float]:
        """One image per prompt, and images per second; ``settings`` are steps and guidance scale."""
        keys = [sample_key(*divmod(row, UNIT_SIZE)) for row in range(len(prompts))]
        requests = [Request(key, one, sample_seed(seed, key)) for key, one in zip(keys, prompts, strict=True)]
        work = functools.partial(generate, self.weights, settings or (tiny.DEFAULT_STEPS, tiny.DEFAULT_GUIDANCE))
        batches = [requests[row : row + CHUNK] for row in range(0, len(requests), CHUNK)]
        parts, seconds = zip(*(self.pool.map if self.pool else map)(work, batches), strict=True)
        return list(itertools.chain.from_iterable(parts)), self.workers * len(requests) / sum(seconds)


@contextmanager
def make_sampler(weights: Path, workers: int) -> Iterator[Sampler]:
    """A sampler with ``workers`` processes; a single worker is this process."""
    if workers == 1:
        yield Sampler(weights, 1)
        return
    with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool:
        yield Sampler(weights, workers, pool)


@functools.lru_cache(maxsize=1)
def backbone(weights: Path) -> Any:
    torch.set_num_threads(1)
    return score.backbone(weights)


def generate(weights: Path, settings: tuple[int, float], requests: Sequence[Request]) -> tuple[list[Generation], float]:
    """One image per request, and the seconds taken."""
    model = backbone(weights)
    model.sampling = replace(model.sampling, num_steps=settings[0], guidance_scale=settings[1])
    start = time.perf_counter()
    return model.generate(requests), time.perf_counter() - start


def one_object(sampler: Sampler, classifier: Classifier, names: Sequence[str], per_name: int) -> dict[str, Any]:
    """Top-1 accuracy of "a photo of a X"; ``missed`` are the objects that were never recognised."""
    expected = list(names) * per_name
    generations, _ = sampler.sample([score.photo_prompt(name) for name in expected], seed=1)
    correct = matches(score.classify(classifier, [generation.image for generation in generations]), expected)
    recognised = {name for name, hit in zip(expected, correct, strict=True) if hit}
    return {
        "top1": share(correct),
        "images": len(correct),
        "objects": len(names),
        "missed": [name for name in names if name not in recognised],
    }


def two_objects(sampler: Sampler, classifier: Classifier, names: Sequence[str], num: int) -> dict[str, Any]:
    """The share of images of "a photo of a X and a Y" in which the masks of both words show their objects."""
    generator = torch.Generator().manual_seed(SEED)
    pairs = [torch.randperm(len(names), generator=generator)[:2].tolist() for _ in range(num)]
    generations, _ = sampler.sample([score.photo_prompt(names[one], names[other]) for one, other in pairs], seed=2)
    hits = [score.find_words(classifier, generation) for generation in generations]
    return {
        "both": share([len(hit) == 2 and all(hit) for hit in hits]),
        "each": round(sum(map(sum, hits)) / (2 * len(hits)), 4),
        "images": len(hits),
    }


def composites(classifier: Classifier, compositor: Compositor, num: int) -> dict[str, Any]:
    """Both figures on composites with their exact masks: an upper bound for generated images."""
    generator = torch.Generator().manual_seed(SEED - 1)
    sizes = [min(BATCH_SIZE, num - start) for start in range(0, num, BATCH_SIZE)]
    one, two = list[bool](), list[bool]()
    for size in sizes:
        batch = compositor.sample(size, generator, LAYOUTS[:1])
        one += matches(score.classify(classifier, batch.images), [name for (name,) in batch.objects])
    for size in sizes:
        batch = compositor.sample(size, generator, LAYOUTS[1:2])
        rows = zip(batch.images, batch.objects, batch.masks[:, :2], strict=True)
        two += [all(score.check_masks(classifier, *row)) for row in rows]
    return {"top1": share(one), "both": share(two), "images": num}


def speed(names: Sequence[str], num: int, workers: int) -> dict[str, Any]:
    """Images per second of ``synthgen generate``, with attention recorded: while its workers run, and as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, run = Path(folder) / "prompts.txt", Run.create(Path(folder) / "run")
        texts = [score.photo_prompt(name).text for name in names]
        lines = [f"{text.removesuffix(name)}[{name}]\n" for text, name in zip(texts, names, strict=True)]
        prompts.write_text("".join(itertools.islice(itertools.cycle(lines), num)), encoding="utf-8")
        size = max(1, num // (4 * workers))  # so that no worker waits long for the others at the end
        summary = api.generate(run, engine=Local(workers=workers), prompts=str(prompts), unit_size=size)
        marks = [run.mark("images", unit) for unit in run.units("images")]
    seconds = sum(mark["seconds"] for mark in marks if mark)
    return {
        "images_per_second": round(workers * summary.samples / seconds, 2),
        "with_start": round(summary.samples / summary.seconds, 2),
        "images": summary.samples,
        "workers": workers,
    }


def samplers(
    sampler: Sampler, classifier: Classifier, names: Sequence[str], settings: Iterable[tuple[int, float]]
) -> list[dict[str, Any]]:
    """Top-1 accuracy and images per second by steps and guidance, with the same objects and the same noise."""
    rows = []
    prompts = [score.photo_prompt(name) for name in names]
    for steps, guidance in settings:
        generations, rate = sampler.sample(prompts, seed=3, settings=(steps, guidance))
        correct = matches(score.classify(classifier, [generation.image for generation in generations]), names)
        row = {"steps": steps, "guidance": guidance, "images": len(correct), "top1": share(correct)}
        rows.append({**row, "images_per_second": round(rate, 2)})
        print(rows[-1], flush=True)
    return rows


def share(values: Sequence[bool]) -> float:
    """The share of true values."""
    return round(sum(values) / max(len(values), 1), 4)


def subset(names: Sequence[str], num: int) -> list[str]:
    """``num`` of the names, the same in every run."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [names[k] for k in sorted(order[:num])]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    classifier = Classifier.load(args.classifier)
    compositor = Compositor(args.data, Names.load(), held_out=True)
    names = [name for name, rows in zip(compositor.names.own, compositor.plain, strict=True) if rows]
    if unknown := set(names) - set(classifier.names):
        raise SystemExit(f"error: {args.classifier} was not trained on {sorted(unknown)[:5]}; train it on this data")
    model: Any = score.backbone(args.weights)
    batches = list(held_out(args.data, args.num))
    quick = args.quick
    figures: dict[str, Any] = {
        "size_mb": score.size_mb(args.weights),
        "objects": len(names),
        "num_steps": tiny.DEFAULT_STEPS,
        "guidance_scale": tiny.DEFAULT_GUIDANCE,
    }

    def add(name: str, value: Any) -> None:
        figures[name] = value
        print(f"{name}: {value}", flush=True)

    add("vae_psnr_db", score.vae_psnr(model.pipeline.vae, batches))
    add("held_out", composites(classifier, compositor, args.num))
    add("masks", score.mask_ious(score.attend(model, batches)))
    with make_sampler(args.weights, args.workers) as sampler:
        objects = subset(names, 4) if quick else names
        add("one_object", one_object(sampler, classifier, objects, 1 if quick else args.per_object))
        add("two_objects", two_objects(sampler, classifier, names, 4 if quick else NUM_PAIRS))
        cells = itertools.product(STEPS[:1] if quick else STEPS, GUIDANCE[:2] if quick else GUIDANCE)
        add("samplers", samplers(sampler, classifier, subset(names, 4 if quick else args.table_objects), cells))
    if args.weights == tiny.WEIGHTS:
        add("speed", speed(names, 4 if quick else 256, args.workers))
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and, without ``--quick``, write ``results/tiny.json``."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="file that synthgen.tiny.classifier wrote")
    parser.add_argument("--weights", type=Path, default=tiny.WEIGHTS, help="folder of a pipeline (the shipped one)")
    parser.add_argument("--num", type=int, default=512, help="held-out composites")
    parser.add_argument("--per-object", type=int, default=2, help="images per object")
    parser.add_argument("--table-objects", type=int, default=200, help="objects per cell of the table of samplers")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="use a few images and write nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = measure(args)
    if not args.quick:
        print(write_result("tiny", figures))
    return figures


if __name__ == "__main__":
    main()
