"""Images a second of masked-autoencoder training: synthgen beside ``transformers``, the same shapes and the same batch.

``python benchmarks/pretrain.py`` writes ``results/pretrain.json``. A round is one step each: forward, backward, AdamW.
Both have the same encoder, decoder, loss and number of hidden patches (a test holds that the losses are equal), use
fused attention, and run on the CPU with the threads that OMP_NUM_THREADS says, or on a GPU where there is one.
Seconds are those of the processor on a CPU, which other programs disturb less, and of the clock on a GPU. ``guided`` is
synthgen with masks that say which patches to hide first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import rounds, write_result
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from synthgen.config import Choice
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.models.vit import VisionTransformer, encoder_config

REPEATS = 12
CASES = {  # encoder, image size, batch, decoder width and depth
    "micro, 64 px": ("micro", 64, 64, 128, 2),
    "tiny, 128 px": ("tiny", 128, 16, 192, 4),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_batch(count: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    masks = torch.zeros(count, 1, size, size, dtype=torch.bool)
    masks[:, :, size // 4 : size // 4 * 3, size // 4 : size // 4 * 3] = True
    names = tuple(str(number) for number in range(count))
    return Batch(
        images, masks, masks.flatten(2).any(2), torch.arange(count), names, names, (("disc",),) * count, names
    ).to(DEVICE)


def trainer(module: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, betas=(0.9, 0.95))

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


class Clock:
    """A step, and how long it took each time."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.seconds = run, list[float]()

    def step(self) -> None:
        """Once more."""
        now = time.perf_counter if DEVICE == "cuda" else time.process_time
        start = now()
        self.run()
        self.seconds.append(now() - start)


def contenders(encoder: str, size: int, count: int, dim: int, depth: int) -> dict[str, Callable[[], None]]:
    batch, config = make_batch(count, size), encoder_config(encoder, size)
    twin: Any = ViTMAEForPreTraining(
        ViTMAEConfig(
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
        )
    ).to(DEVICE)

    def ours(share: float) -> Callable[[], None]:
        options = {"foreground_share": share, "decoder_dim": dim, "decoder_depth": depth}
        method = METHODS.build(Choice("mae", options), encoder=VisionTransformer(config)).to(DEVICE)
        return trainer(method, lambda: method(batch, 1.0).loss)

    return {
        "synthgen": ours(0.0),
        "synthgen, guided": ours(0.5),
        "transformers": trainer(twin, lambda: twin(batch.images).loss),
    }


def main() -> None:
    torch.manual_seed(0)
    figures: dict[str, Any] = {"device": DEVICE, "threads": torch.get_num_threads(), "rounds": REPEATS}
    for name, (encoder, size, count, dim, depth) in CASES.items():
        clocks = {who: Clock(step) for who, step in contenders(encoder, size, count, dim, depth).items()}
        rounds({who: clock.step for who, clock in clocks.items()}, REPEATS)
        seconds = {who: clock.seconds[1:] for who, clock in clocks.items()}  # the first is to warm up
        ratios = [theirs / ours for ours, theirs in zip(seconds["synthgen"], seconds["transformers"], strict=True)]
        figures[name] = {
            "batch": count,
            "images_per_second": {who: round(count / statistics.median(times), 1) for who, times in seconds.items()},
            "best_images_per_second": {who: round(count / min(times), 1) for who, times in seconds.items()},
            "synthgen_over_transformers": round(statistics.median(ratios), 3),  # median of the rounds' ratios
            "quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
        }
        print(name, figures[name])
    print(write_result("pretrain", figures))


if __name__ == "__main__":
    main()
