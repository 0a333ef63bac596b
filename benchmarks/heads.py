"""The accuracy of classification heads on the activations of the shipped model.

``python benchmarks/heads.py --data DATA`` writes ``results/heads.json``; DATA is the folder that
``synthgen.tiny.fetch`` prepared. Compared are a linear probe, the attention head, DifFormer, and DifFeed with and
without feedback, on the same held-out composites (one of 32 objects each) and the same noise. One set trains the heads
and another evaluates them, by the stage ``evaluate``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import multiprocessing as mp
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import make_parser, write_result
from _composites import write_composites

from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.tiny.compositor import FAMILIAR, LAYOUTS, Compositor, Names
from synthgen.tiny.truth import SEED

BLOCK, BLOCKS = "up_blocks.1.attentions.0", ("mid_block", "up_blocks.0.attentions.0", "up_blocks.1.attentions.0")
STAGE = Evaluate(generator=Choice("tiny"), baselines=False, batch_size=32)
HEADS: dict[str, tuple[Choice, tuple[str, ...], tuple[int, ...]]] = {  # evaluator, blocks and timesteps
    "linear layer": (Choice("linear_probe"), (BLOCK,), (50,)),
    "attention head": (Choice("attentive_probe"), (BLOCK,), (50,)),
    "three blocks": (Choice("attentive_probe"), BLOCKS, (50,)),
    "three timesteps": (Choice("attentive_probe"), (BLOCK,), (30, 50, 100)),
    "DifFormer: both": (Choice("attentive_probe"), BLOCKS, (30, 50, 100)),
    "DifFeed without feedback": (Choice("diffeed", {"feedback": False}), (BLOCK,), (50,)),
    "DifFeed": (Choice("diffeed"), (BLOCK,), (50,)),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--images", type=int, nargs=2, default=(768, 768), help="images to train and to evaluate on")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    names = Names.load()
    compositor = Compositor(args.data, names, held_out=True)
    compositor.weights = torch.tensor([float(name in FAMILIAR) for name in names.own])
    with tempfile.TemporaryDirectory() as folder:
        for number, (split, num) in enumerate(zip(("train", "test"), args.images, strict=True), start=1):
            path, seed = Path(folder) / f"{split}.tar", SEED + 20_000 * number
            write_composites(path, compositor, num, seed=seed, prefix=str(number), layouts=LAYOUTS[:1])
        with ProcessPoolExecutor(args.workers, mp_context=mp.get_context("spawn")) as pool:
            heads = dict(zip(HEADS, pool.map(evaluate, HEADS, [folder] * len(HEADS)), strict=True))
    print(write_result("heads", {"images": list(args.images), "classes": len(FAMILIAR), "heads": heads}))


def evaluate(name: str, folder: str) -> dict[str, Any]:
    """The scores of a head, and the seconds that extraction and training took."""
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
    result = json.loads(stage.path(run).read_text(encoding="utf-8"))
    scores: dict[str, Any] = dict(result["scores"]["generator"][evaluator.name])
    return {**scores, "blocks": len(blocks), "timesteps": len(timesteps), "seconds": result["seconds"]}


if __name__ == "__main__":
    main()
