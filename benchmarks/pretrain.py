"""Images a second of masked-autoencoder training: synthgen beside ``transformers``, the same shapes and the same batch.

``python benchmarks/pretrain.py`` writes ``results/pretrain.json``; with ``--compile`` it adds a case that takes some
minutes more. A round is one step each: forward, backward, and the fused AdamW that both use by default on a CPU. Both
have the same encoder, decoder, loss and number of hidden patches (a test holds that the losses are equal), read one
batch as synthgen's loader lays it out, and run on the CPU with the threads that OMP_NUM_THREADS says, or on a GPU where
there is one. ``transformers`` takes torch's fused attention, its default; ``transformers, eager`` writes attention out,
which is the faster of the two on a CPU in bfloat16, where synthgen writes it out unasked. ``guided`` is synthgen with
masks that say which patches to hide first. In a case with ``bf16`` all run under autocast; with ``compiled`` the
transformer blocks go through ``torch.compile``, one by one, and what is eager is left out.

Seconds are those of the processor on a CPU, which other programs disturb less, and of the clock on a GPU.

Each case also has the loader alone, from a tar of JPEGs as large as the case's images to batches, taking turns with the
steps (``loader``; with ``masks`` as guidance needs them), and a real ``pretrain`` on that tar: its images a second by
the clock, and the share of that time in which the loop waited for a batch.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import rounds, write_result
from PIL import Image
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer

from synthgen import api
from synthgen.augment import Augment
from synthgen.config import Choice
from synthgen.datasets import open_dataset
from synthgen.engines.local import Local
from synthgen.image import encode_jpeg, encode_png
from synthgen.loader import Batch, Order, loader
from synthgen.methods import METHODS
from synthgen.models.layers import Block
from synthgen.models.vit import VisionTransformer, encoder_config
from synthgen.run import Run
from synthgen.stores.tar import TarWriter

REPEATS = 12
CASES = {  # encoder, image size, batch, decoder width and depth
    "micro, 64 px": ("micro", 64, 64, 128, 2),
    "tiny, 128 px": ("tiny", 128, 16, 192, 4),
}
IMAGES, STEPS = 512, 40  # in the tar, and of the real training
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Step = Callable[[], None]


def make_tar(path: Path, size: int) -> None:
    """Blurred noise with a square: files of about the length of a photo's, with text, words and masks."""
    source = np.random.default_rng(0)
    labels = np.zeros((size, size), np.uint8)
    labels[size // 4 : size // 4 * 3, size // 4 : size // 4 * 3] = 1
    about = json.dumps({"prompt": "a photo of a square", "words": ["square"], "label": "square"}).encode()
    with TarWriter(path) as tar:
        for number in range(IMAGES):
            coarse = Image.fromarray(source.integers(0, 256, (8, 8, 3), np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
            pixels = (smooth + source.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
            members = {"jpg": encode_jpeg(pixels), "mask.png": encode_png(labels), "json": about}
            tar.add(f"{number:010d}", members | {"txt": b"a photo of a square", "cls": b"0"})


def batches(tar: Path, size: int, count: int, *, masks: bool) -> Iterator[Batch]:
    """Batches without end, as ``pretrain`` makes them for ``mae``."""
    samples, config = open_dataset(tar, masks=masks), encoder_config("micro", size)
    order = Order(length=len(samples), batch_size=count, epochs=1000, seed=0)
    return iter(loader(samples, order, Augment(size=size), mean=config.mean, std=config.std))


def trainer(module: torch.nn.Module, loss: Callable[[], Tensor], *, bf16: bool, compiled: bool) -> Step:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, betas=(0.9, 0.95), fused=True)
    for part in module.modules():
        if compiled and isinstance(part, Block | ViTMAELayer):
            part.compile()

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def contenders(case: str, batch: Batch, *, bf16: bool = False, compiled: bool = False) -> dict[str, Step]:
    encoder, size, _, dim, depth = CASES[case]
    config = encoder_config(encoder, size)
    batch = batch.to(DEVICE)

    def theirs(attention: str) -> Step:
        config_of_twin = ViTMAEConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.dim,
            image_size=config.image_size,
            patch_size=config.patch_size,
            decoder_hidden_size=dim,
            decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=dim // 32,
            decoder_intermediate_size=4 * dim,
            norm_pix_loss=True,
            attn_implementation=attention,
        )
        twin: Any = ViTMAEForPreTraining(config_of_twin).to(DEVICE)
        return trainer(twin, lambda: twin(batch.images).loss, bf16=bf16, compiled=compiled)

    def ours(share: float) -> Step:
        options = {"foreground_share": share, "decoder_dim": dim, "decoder_depth": depth}
        method = METHODS.build(Choice("mae", options), encoder=VisionTransformer(config)).to(DEVICE)
        return trainer(method, lambda: method(batch, 1.0).loss, bf16=bf16, compiled=compiled)

    steps = {
        "synthgen": ours(0.0),
        "synthgen, guided": ours(0.5),
        "transformers": theirs("sdpa"),
    }
    if compiled:  # each contender compiles for minutes, and guidance is not in the blocks
        del steps["synthgen, guided"]
    else:
        steps["transformers, eager"] = theirs("eager")
    return steps


class Clock:
    """A step, and how long it took each time."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run, self.seconds = run, list[float]()

    def step(self) -> None:
        """Once more."""
        now = time.perf_counter if DEVICE == "cuda" else time.process_time
        start = now()
        self.run()
        self.seconds.append(now() - start)


def measure(case: str, tar: Path, *, bf16: bool = False, compiled: bool = False) -> dict[str, Any]:
    """The rates of a case, the loader's among them where it is the plain one."""
    _, size, count, _, _ = CASES[case]
    makers = {name: batches(tar, size, count, masks=masks) for name, masks in (("images", False), ("with masks", True))}
    steps: dict[str, Callable[[], object]] = {
        **contenders(case, next(makers["with masks"]), bf16=bf16, compiled=compiled)
    }
    trained = list(steps)
    if not (bf16 or compiled):
        steps |= {name: made.__next__ for name, made in makers.items()}
    clocks = {name: Clock(step) for name, step in steps.items()}
    rounds({name: clock.step for name, clock in clocks.items()}, REPEATS)
    seconds = {name: clock.seconds[1:] for name, clock in clocks.items()}  # the first is to warm up
    rates = {name: round(count / statistics.median(times), 1) for name, times in seconds.items()}
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["synthgen"], seconds[name], strict=True)]
        for name in trained
        if name.startswith("transformers")
    }
    figures = {
        "batch": count,
        "images_per_second": {name: rates[name] for name in trained},
        "best_images_per_second": {name: round(count / min(seconds[name]), 1) for name in trained},
        "synthgen_over_transformers": round(statistics.median(ratios["transformers"]), 3),  # of the rounds' ratios
        "quartiles": [round(value, 3) for value in statistics.quantiles(ratios["transformers"], n=4)[::2]],
    }
    if not compiled:
        figures["synthgen_over_eager"] = round(statistics.median(ratios["transformers, eager"]), 3)
    if not (bf16 or compiled):
        figures["loader_images_per_second"] = {name: rates[name] for name in makers}
        figures["loader_over_training"] = {name: round(rates[name] / rates["synthgen"], 2) for name in makers}
        figures["pretrain"] = pretrain(case, tar)
    return figures


def pretrain(case: str, tar: Path) -> dict[str, float]:
    """A real training of STEPS steps, as a user starts it; what comes before the second record is left out."""
    encoder, _, count, dim, depth = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run")
        api.pretrain(
            run,
            engine=Local(workers=1),
            method=Choice("mae", {"decoder_dim": dim, "decoder_depth": depth}),
            encoder=Choice(encoder),
            batch_size=count,
            samples_seen=count * STEPS,
            log_every=4,
            data=(str(tar),),
            export=False,
            threads=torch.get_num_threads(),
        )
        lines = (run.folder("pretrain/mae") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[1:]]
    return {
        "images_per_second": round(statistics.median(record["images_per_second"] for record in records), 1),
        "waiting_percent": round(100 * statistics.fmean(record["waiting"] for record in records), 2),
    }


def main() -> None:
    torch.manual_seed(0)
    figures: dict[str, Any] = {"device": DEVICE, "threads": torch.get_num_threads(), "rounds": REPEATS}
    with tempfile.TemporaryDirectory() as folder:
        tars = {case: Path(folder) / f"{case}.tar" for case in CASES}
        for case, tar in tars.items():
            make_tar(tar, CASES[case][1])
            figures[case] = measure(case, tar)
            figures[f"{case}, bf16"] = measure(case, tar, bf16=True)
        if "--compile" in sys.argv[1:]:
            case = next(iter(CASES))
            figures[f"{case}, compiled"] = measure(case, tars[case], compiled=True)
    print(write_result("pretrain", figures))


if __name__ == "__main__":
    main()
