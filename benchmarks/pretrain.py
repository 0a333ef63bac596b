"""Images per second of masked-autoencoder training: synthgen compared with ``transformers``.

``python benchmarks/pretrain.py`` writes ``results/pretrain.json``; ``--compile`` adds a case that takes some minutes.
A step is forward, backward, and the fused AdamW that both use by default on a CPU. All contenders have the same
encoder, decoder, loss, number of hidden patches (a test checks that the losses are equal) and batch:

* ``synthgen``, and ``synthgen, guided``, whose masks say which patches to hide first.
* ``synthgen, nn.Linear``, in 32 bits: with torch's linear layers in place of ours, which differ on processors of other
  makers than Intel.
* ``transformers``, with torch's fused attention, its default.
* ``transformers, eager``, with attention written out, which in bfloat16 on a CPU is faster; there synthgen does so by
  default.

In a case with ``bf16`` all contenders run under autocast. In one with ``compiled`` each transformer block is compiled
by ``torch.compile``, without the contenders ``guided`` and ``eager``. They run on a GPU if there is one, by the wall
clock; otherwise on the CPU with OMP_NUM_THREADS threads, by processor time, which other programs change less.

Each case also has two figures on data loading: the loader alone, from a tar of JPEGs of the case's size to batches
(with and without masks), alternating with the steps; and a real ``pretrain`` on that tar, with the share of its time
that it waited for a batch.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import make_parser, rounds, write_result
from PIL import Image
from torch import Tensor, nn
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
from synthgen.models.linear import Linear
from synthgen.models.vit import VisionTransformer, encoder_config
from synthgen.run import Run
from synthgen.stores.tar import TarWriter

REPEATS = 12
CASES = {  # encoder, image size, batch, decoder width and depth
    "micro, 64 px": ("micro", 64, 64, 128, 2),
    "tiny, 128 px": ("tiny", 128, 16, 192, 4),
}
IMAGES, STEPS = 512, 40  # of the tar, and of the real training
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time

Step = Callable[[], None]


def make_tar(path: Path, size: int) -> None:
    """Blurred noise with a square, in files about as large as photos, with text, words and masks."""
    rng = np.random.default_rng(0)
    labels = np.zeros((size, size), np.uint8)
    labels[size // 4 : size // 4 * 3, size // 4 : size // 4 * 3] = 1
    metadata = json.dumps({"prompt": "a photo of a square", "words": ["square"], "label": "square"}).encode()
    with TarWriter(path) as tar:
        for number in range(IMAGES):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
            pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
            members = {"jpg": encode_jpeg(pixels), "mask.png": encode_png(labels), "json": metadata}
            tar.add(f"{number:010d}", members | {"txt": b"a photo of a square", "cls": b"0"})


def batches(tar: Path, size: int, count: int, *, masks: bool) -> Iterator[Batch]:
    """Endless batches, as in ``pretrain`` with ``mae``."""
    samples, config = open_dataset(tar, masks=masks), encoder_config("micro", size)
    order = Order(length=len(samples), batch_size=count, epochs=1000, seed=0)
    return iter(loader(samples, order, Augment(size=size), mean=config.mean, std=config.std))


def make_step(module: torch.nn.Module, loss: Callable[[], Tensor], *, bf16: bool, compiled: bool) -> Step:
    """A training step of a module."""
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
    """The training step of each contender."""
    encoder, size, _, dim, depth = CASES[case]
    config = encoder_config(encoder, size)
    batch = batch.to(DEVICE)

    def theirs(attention: str) -> Step:
        vitmae_config = ViTMAEConfig(
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
        model: Any = ViTMAEForPreTraining(vitmae_config).to(DEVICE)
        return make_step(model, lambda: model(batch.images).loss, bf16=bf16, compiled=compiled)

    def ours(share: float = 0.0, *, torch_linear: bool = False) -> Step:
        options = {"foreground_share": share, "decoder_dim": dim, "decoder_depth": depth}
        method = METHODS.build(Choice("mae", options), encoder=VisionTransformer(config)).to(DEVICE)
        for part in method.modules():
            if torch_linear and isinstance(part, Linear):
                part.forward = partial(nn.Linear.forward, part)  # type: ignore[method-assign]
        return make_step(method, lambda: method(batch, 1.0).loss, bf16=bf16, compiled=compiled)

    if compiled:  # each contender takes minutes to compile, and guidance does not change the blocks
        return {"synthgen": ours(), "transformers": theirs("sdpa")}
    others = {} if bf16 else {"synthgen, nn.Linear": ours(torch_linear=True)}
    both = {"transformers": theirs("sdpa"), "transformers, eager": theirs("eager")}
    return {"synthgen": ours(), "synthgen, guided": ours(0.5)} | others | both


def measure(case: str, tar: Path, *, bf16: bool = False, compiled: bool = False) -> dict[str, Any]:
    """The rates of a case; in the plain case also those of the loader and of a real training."""
    _, size, count, _, _ = CASES[case]
    loaders = {
        name: batches(tar, size, count, masks=masks) for name, masks in (("images", False), ("with masks", True))
    }
    steps = contenders(case, next(loaders["with masks"]), bf16=bf16, compiled=compiled)
    is_plain = not (bf16 or compiled)
    timed: dict[str, Callable[[], object]] = {**steps}
    if is_plain:
        timed |= {name: iterator.__next__ for name, iterator in loaders.items()}
    seconds = rounds(timed, REPEATS, CLOCK)
    rates = {name: round(count / statistics.median(times), 1) for name, times in seconds.items()}
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["synthgen"], seconds[name], strict=True)]
        for name in steps
        if name.startswith("transformers")
    }
    figures = {
        "batch": count,
        "images_per_second": {name: rates[name] for name in steps},
        "best_images_per_second": {name: round(count / min(seconds[name]), 1) for name in steps},
        "synthgen_over_transformers": round(statistics.median(ratios["transformers"]), 3),  # of the rounds' ratios
        "quartiles": [round(value, 3) for value in statistics.quantiles(ratios["transformers"], n=4)[::2]],
    }
    if not compiled:
        figures["synthgen_over_eager"] = round(statistics.median(ratios["transformers, eager"]), 3)
    if is_plain:
        figures["loader_images_per_second"] = {name: rates[name] for name in loaders}
        figures["loader_over_training"] = {name: round(rates[name] / rates["synthgen"], 2) for name in loaders}
        figures["pretrain"] = pretrain(case, tar)
    return figures


def pretrain(case: str, tar: Path) -> dict[str, float]:
    """A training of STEPS steps by ``synthgen pretrain``, without what precedes the second log record."""
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
    parser = make_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="add a case with compiled blocks")
    args = parser.parse_args()
    torch.manual_seed(0)
    figures: dict[str, Any] = {"device": DEVICE, "threads": torch.get_num_threads(), "rounds": REPEATS}
    with tempfile.TemporaryDirectory() as folder:
        tars = {case: Path(folder) / f"{case}.tar" for case in CASES}
        for case, tar in tars.items():
            make_tar(tar, CASES[case][1])
            figures[case] = measure(case, tar)
            figures[f"{case}, bf16"] = measure(case, tar, bf16=True)
        if args.compile:
            case = next(iter(CASES))
            figures[f"{case}, compiled"] = measure(case, tars[case], compiled=True)
    print(write_result("pretrain", figures))


if __name__ == "__main__":
    main()
