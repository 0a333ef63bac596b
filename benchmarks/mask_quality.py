"""The cost of computing mask figures, and the accuracy of the confidence.

``python benchmarks/mask_quality.py`` times the stage ``masks`` without its figures and with them, on drawn scenes, by
the processor's own clock; ``--data DATA`` (what ``synthgen.tiny.fetch`` prepared) also holds the confidence against
exact masks of composites of the shipped model: the gain that fits on one half, judged on the other. Writes
``results/mask_quality.json``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import write_result
from jaxtyping import Bool, Float64
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from synthgen import codecs, mask_quality
from synthgen.image import encode_png
from synthgen.mask_shape import describe_masks
from synthgen.records import AFFINITY_OFFSETS, Generation, Maps, Prompt, Request
from synthgen.refiners import Refiner
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.refiners.threshold import Threshold
from synthgen.stages.masks import Masks

GRIDS = {128: 16, 512: 64, 1024: 128}  # pixels a side → cells a side of the maps, as of the models at that size
SPLITS = {"tuning": 7_500_000, "reporting": 7_000_000}  # seeds of composites
REFINERS: dict[str, Refiner] = {"threshold": Threshold(), "attentioncut": AttentionCut()}


# -- what they cost


def draw(seed: int, size: int) -> Generation:
    """Two ellipses of their own colours on noise, with the maps of a model that sees them well."""
    rng, grid = np.random.default_rng(seed), GRIDS[size]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    image = rng.integers(60, 120, (size, size, 3)).astype(np.uint8)
    truth = np.zeros((2, size, size), bool)
    for k in range(2):
        row, column, tall, wide = rng.uniform((0.4, 0.2 + 0.5 * k, 0.12, 0.12), (0.6, 0.3 + 0.5 * k, 0.25, 0.2))
        truth[k] = ((y - row) / tall) ** 2 + ((x - column) / wide) ** 2 < 1
        image[truth[k]] = rng.integers(0, 256, 3)
    coarse = truth.reshape(2, grid, size // grid, grid, size // grid).mean((2, 4))
    weights = np.clip(0.4 * coarse + rng.normal(0, 0.02, coarse.shape), 0, 1).astype(np.float16)
    affinity = rng.uniform(0.5, 4, (len(AFFINITY_OFFSETS), grid, grid)).astype(np.float16)
    prompt = Prompt("one two", ("one", "two"), ((0, 3), (4, 7)))
    return Generation(Request("0", prompt, 0), image, Maps(prompt.words, weights, affinity))


def bare(refiner: Refiner, stored: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    """The stage's work on one sample without figures: read, refine, score, write."""
    generation = codecs.decode_generation("0", *stored)
    values = refiner.refine(generation.image, generation.maps)
    inside = [weights[small].mean() for weights, small in zip(generation.maps.weights, shrunk(values), strict=True)]
    codecs._npz(labels=codecs.masks_to_labels(values), scores=np.array(inside, np.float32))
    codecs._json({"words": generation.maps.words, "dropped": ["", ""]})


def shrunk(values: Bool[np.ndarray, "words H W"]) -> Bool[np.ndarray, "words h w"]:
    step = values.shape[1] // GRIDS[values.shape[1]]
    return values[:, ::step, ::step]


def whole(refiner: Refiner, stored: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    """The same as the stage does it now."""
    generation = codecs.decode_generation("0", *stored)
    codecs.encode_masks(Masks().mask(refiner, Threshold(), generation))


def cost(size: int, scenes: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of processor time for each mask, and the ratio: the best of all rounds, turn by turn."""
    drawn = [draw(seed, size) for seed in range(scenes)]
    stored = [
        ({"png": encode_png(one.image), "json": codecs.encode_image(one)["json"]}, codecs.encode_maps(one.maps))
        for one in drawn
    ]
    figures: dict[str, Any] = {}
    for name, refiner in REFINERS.items():
        works: dict[str, Callable[..., None]] = {"without": bare, "with": whole}
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(repeats + 1):  # the first round warms up
            for kind, work in works.items():
                start = time.process_time()
                for sample in stored:
                    work(refiner, sample)
                seconds[kind].append((time.process_time() - start) / (2 * scenes))
        best = {kind: min(values[1:]) for kind, values in seconds.items()}
        ratios = [more / less for more, less in zip(seconds["with"][1:], seconds["without"][1:], strict=True)]
        figures[name] = {kind: round(1e3 * value, 3) for kind, value in best.items()}
        figures[name] |= {"ratio": round(best["with"] / best["without"], 3), "ratio_median": round(median(ratios), 3)}
    found = [Masks().mask(REFINERS["attentioncut"], Threshold(), one) for one in drawn]
    figures["describe_ms"] = round(1e3 * timed(lambda: [describe_masks(one) for one in found], repeats) / scenes / 2, 3)
    return figures


def timed(work: Callable[[], object], repeats: int) -> float:
    """The least processor time of some rounds, in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


# -- accuracy of the confidence


def supports(data: Path, num: int, seed: int) -> dict[str, Float64[np.ndarray, "masks 2"]]:
    """For each refiner: support and true IoU of each mask of ``num`` composites through ``attend``."""
    from synthgen.tiny import score, truth

    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in REFINERS}
    for generation, exact in score.attend(score.backbone(), truth.held_out(data, num, seed=seed)):
        for name, refiner in REFINERS.items():
            kept = Masks().keep(refiner.refine(generation.image, generation.maps), generation.maps)
            rows[name] += pairs(kept.words, kept.values, kept.confidence, exact.words, exact.values)
    return {name: np.array(values) for name, values in rows.items()}


def pairs(words: Any, values: Any, confidence: Any, true_words: Any, true_values: Any) -> Iterator[tuple[float, float]]:
    """Support and IoU of the masks that were kept."""
    for word, mask, certain in zip(words, values, confidence, strict=True):
        if mask.any():
            true = true_values[true_words.index(word)]
            support = certain / (mask_quality.GAIN - (mask_quality.GAIN - 1) * certain)
            yield support, (mask & true).sum() / (mask | true).sum()


def confident(support: Float64[np.ndarray, " n"], gain: float) -> Float64[np.ndarray, " n"]:
    """The confidence, see :func:`synthgen.mask_quality.attention_figures`."""
    return gain * support / (1 + (gain - 1) * support)


def fit(rows: Float64[np.ndarray, "n 2"]) -> float:
    """The gain of the least cross-entropy between confidence and IoU."""

    def loss(log_gain: float) -> float:
        p = np.clip(confident(rows[:, 0], np.exp(log_gain)), 1e-6, 1 - 1e-6)
        return float(-(rows[:, 1] * np.log(p) + (1 - rows[:, 1]) * np.log(1 - p)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 5), method="bounded").x))


def worth(data: Path, num: int) -> dict[str, Any]:
    """The gain that fits, and on other composites how near the confidence comes to the IoU, in tenths of the masks."""
    tuning, reporting = (supports(data, num, seed) for seed in SPLITS.values())
    figures: dict[str, Any] = {"gain": mask_quality.GAIN, "composites": num}
    for name, rows in reporting.items():
        certain, iou = confident(rows[:, 0], mask_quality.GAIN), rows[:, 1]
        tenths = np.array_split(np.argsort(certain), 10)
        good, bad = certain[iou >= 0.5], certain[iou < 0.5]
        figures[name] = {
            "masks": len(rows),
            "gain_that_fits": round(fit(tuning[name]), 2),
            "mean_confidence": round(float(certain.mean()), 3),
            "mean_iou": round(float(iou.mean()), 3),
            "calibration_error": round(float(np.mean([abs(certain[t].mean() - iou[t].mean()) for t in tenths])), 3),
            "rank_correlation": round(float(spearmanr(certain, iou)[0]), 3),
            "auc_of_iou_above_half": round(float((good[:, None] > bad[None]).mean()), 3),
            "tenths": [[round(float(certain[t].mean()), 3), round(float(iou[t].mean()), 3)] for t in tenths],
        }
    return figures


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/mask_quality.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="what synthgen.tiny.fetch prepared; without it cost alone")
    parser.add_argument("--num", type=int, default=256, help="composites of each of the two splits")
    parser.add_argument("--scenes", type=int, default=8, help="pictures of two words, of each size")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which both take turns")
    args = parser.parse_args()
    figures: dict[str, Any] = {"milliseconds_per_mask": {}}
    for size in GRIDS:
        figures["milliseconds_per_mask"][f"{size} px"] = case = cost(size, args.scenes, args.repeats)
        print(f"{size} px: {case}", flush=True)
    if args.data:
        figures["confidence"] = worth(args.data, args.num)
        print(figures["confidence"])
    print(write_result("mask_quality", figures))


if __name__ == "__main__":
    main()
