"""The accuracy of heads on the shipped model's own activations: ``python benchmarks/heads.py --data DATA``.

Held-out composites of one object out of 32, some to train a head on and others to evaluate it on, as ``evaluate`` has
it: a linear probe, the attention head, DifFormer and DifFeed with its control, on the same images and noise. Writes
``results/heads.json``. DATA is what ``synthgen.tiny.fetch`` prepared.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import multiprocessing as mp
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import write_result

from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.stores.tar import TarWriter
from synthgen.tiny.compositor import FAMILIAR, LAYOUTS, Compositor, Names
from synthgen.tiny.truth import SEED, png

MIDDLE, MIXED = "up_blocks.1.attentions.0", ("mid_block", "up_blocks.0.attentions.0", "up_blocks.1.attentions.0")
BATCH = 64  # composites drawn at once
STAGE = Evaluate(generator=Choice("tiny"), baselines=False, batch_size=32)
HEADS: dict[str, tuple[Choice, tuple[str, ...], tuple[int, ...]]] = {  # evaluator, blocks and timesteps
    "linear layer": (Choice("linear_probe"), (MIDDLE,), (50,)),
    "attention head": (Choice("attentive_probe"), (MIDDLE,), (50,)),
    "three blocks": (Choice("attentive_probe"), MIXED, (50,)),
    "three timesteps": (Choice("attentive_probe"), (MIDDLE,), (30, 50, 100)),
    "DifFormer: both": (Choice("attentive_probe"), MIXED, (30, 50, 100)),
    "DifFeed without feedback": (Choice("diffeed", {"feedback": False}), (MIDDLE,), (50,)),
    "DifFeed": (Choice("diffeed"), (MIDDLE,), (50,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--images", type=int, nargs=2, default=(768, 768), help="to learn from, to be judged on")
    parser.add_argument("--workers", type=int, default=2, help="heads at the same time, one thread each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number, (split, num) in enumerate(zip(("train", "test"), args.images, strict=True)):
            write_composites(args.data, Path(folder) / f"{split}.tar", num, SEED + 20_000 * (number + 1))
        with ProcessPoolExecutor(args.workers, mp_context=mp.get_context("spawn")) as pool:
            found = dict(zip(HEADS, pool.map(judged, HEADS, [folder] * len(HEADS)), strict=True))
    write_result("heads", {"images": list(args.images), "classes": len(FAMILIAR), "heads": found})


def write_composites(data: Path, path: Path, num: int, seed: int) -> None:
    """Composites of one familiar object each, with its name as the label."""
    names = Names.load()
    compositor = Compositor(data, names, held_out=True)
    compositor.weights = torch.tensor([float(name in FAMILIAR) for name in names.own])
    with TarWriter(path) as tar:
        for start in range(0, num, BATCH):
            generator = torch.Generator().manual_seed(seed + start // BATCH)
            drawn = compositor.draw(BATCH, generator, LAYOUTS[:1]).first(min(BATCH, num - start))
            for row, objects in enumerate(drawn.objects):
                members = {"json": json.dumps({"label": objects[0]}).encode(), "png": png(drawn.images[row].numpy())}
                tar.add(f"{start + row:010d}", members)


def judged(name: str, folder: str) -> dict[str, Any]:
    """The scores of one head, and the seconds that reading and learning took."""
    torch.set_num_threads(1)
    evaluator, blocks, timesteps = HEADS[name]
    stage = replace(
        STAGE,
        evaluators=(evaluator,),
        generator_blocks=blocks,
        generator_timesteps=timesteps,
        train=f"{folder}/train.tar",
        test=f"{folder}/test.tar",
        label=name.replace(" ", "-").replace(":", ""),
    )
    run = Run.create(Path(folder) / stage.label, seed=0)
    run_stage(stage, run, Local(workers=1))
    scores = json.loads(stage.path(run).read_text(encoding="utf-8"))
    numbers: dict[str, Any] = dict(scores["scores"]["generator"][evaluator.name])
    return {**numbers, "blocks": len(blocks), "timesteps": len(timesteps), "seconds": scores["seconds"]}


if __name__ == "__main__":
    main()
