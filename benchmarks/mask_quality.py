"""The cost of the figures that the stage ``masks`` computes for each mask, and the accuracy of the confidence.

``python benchmarks/mask_quality.py`` writes ``results/mask_quality.json``. It compares the processor time of the stage
with and without its figures, on drawn images of several sizes. With ``--data DATA`` (the folder that
``synthgen.tiny.fetch`` prepared) it also compares the confidence with the true IoU on held-out composites through the
shipped model, and fits the gain of the confidence on other composites.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import draw_generation, iou, make_parser, rounds, write_result
from jaxtyping import Float64
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from synthgen import codecs, mask_quality
from synthgen.image import encode_png
from synthgen.mask_shape import describe_masks
from synthgen.records import Prompt, Request, WordMasks
from synthgen.refiners import Refiner
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.refiners.threshold import Threshold
from synthgen.stages.masks import Masks

GRIDS = {128: 16, 512: 64, 1024: 128}  # pixels a side → cells a side of the maps, as in models of that size
TUNING_SEED, REPORTING_SEED = 7_500_000, 7_000_000  # of composites
REFINERS: dict[str, Refiner] = {"threshold": Threshold(), "attentioncut": AttentionCut()}


# -- cost


Stored = tuple[dict[str, bytes], dict[str, bytes]]  # members of a sample in the tars of images and of maps


def without_figures(refiner: Refiner, stored: Stored) -> None:
    """The work of the stage on one sample, without figures: read, refine, score, write."""
    generation = codecs.decode_generation("0", *stored)
    values = refiner.refine(generation.image, generation.maps)
    step = values.shape[1] // GRIDS[values.shape[1]]
    pairs = zip(generation.maps.weights, values[:, ::step, ::step], strict=True)
    scores = np.array([weights[mask].mean() for weights, mask in pairs], np.float32)
    codecs._npz(labels=codecs.masks_to_labels(values), scores=scores)
    codecs._json({"words": generation.maps.words, "dropped": ["", ""]})


def with_figures(refiner: Refiner, stored: Stored) -> None:
    """The work of the stage on one sample."""
    generation = codecs.decode_generation("0", *stored)
    codecs.encode_masks(Masks().mask(refiner, Threshold(), generation))


def run(work: Callable[[Refiner, Stored], None], refiner: Refiner, samples: Sequence[Stored]) -> None:
    for stored in samples:
        work(refiner, stored)


def cost(size: int, scenes: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of processor time per mask, the best of all rounds, and the ratio."""
    prompt = Prompt("one two", ("one", "two"), ((0, 3), (4, 7)))
    drawn = [draw_generation(Request("0", prompt, seed), size, GRIDS[size]) for seed in range(scenes)]
    stored = [
        ({"png": encode_png(one.image), "json": codecs.encode_image(one)["json"]}, codecs.encode_maps(one.maps))
        for one in drawn
    ]
    num_masks = 2 * scenes
    figures: dict[str, Any] = {}
    for name, refiner in REFINERS.items():
        contenders: dict[str, Callable[[], object]] = {
            "without": functools.partial(run, without_figures, refiner, stored),
            "with": functools.partial(run, with_figures, refiner, stored),
        }
        seconds = rounds(contenders, repeats, time.process_time)
        best = {kind: min(values) / num_masks for kind, values in seconds.items()}
        ratios = [more / less for more, less in zip(seconds["with"], seconds["without"], strict=True)]
        figures[name] = {kind: round(1e3 * value, 3) for kind, value in best.items()}
        figures[name] |= {"ratio": round(best["with"] / best["without"], 3), "ratio_median": round(median(ratios), 3)}
    masks = [Masks().mask(REFINERS["attentioncut"], Threshold(), one) for one in drawn]
    seconds = rounds({"describe": lambda: [describe_masks(one) for one in masks]}, repeats, time.process_time)
    figures["describe_ms"] = round(1e3 * min(seconds["describe"]) / num_masks, 3)
    return figures


# -- accuracy of the confidence


def supports(data: Path, num: int, seed: int) -> dict[str, Float64[np.ndarray, "masks 2"]]:
    """For each refiner the support (the confidence at gain 1) and the IoU of each mask of ``num`` composites."""
    from synthgen.tiny import score, truth

    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in REFINERS}
    for generation, exact in score.attend(score.backbone(), truth.held_out(data, num, seed=seed)):
        for name, refiner in REFINERS.items():
            kept = Masks().keep(refiner.refine(generation.image, generation.maps), generation.maps)
            rows[name] += supports_and_ious(kept, exact)
    return {name: np.array(values) for name, values in rows.items()}


def supports_and_ious(kept: WordMasks, exact: WordMasks) -> Iterator[tuple[float, float]]:
    """Support and IoU of the masks that were kept."""
    assert kept.confidence is not None
    for word, mask, confidence in zip(kept.words, kept.values, kept.confidence, strict=True):
        if mask.any():
            support = confidence / (mask_quality.GAIN - (mask_quality.GAIN - 1) * confidence)
            yield support, iou(mask, exact.values[exact.words.index(word)])


def confidence_of(support: Float64[np.ndarray, " n"], gain: float) -> Float64[np.ndarray, " n"]:
    """The confidence at a gain, see :func:`synthgen.mask_quality.attention_figures`."""
    return gain * support / (1 + (gain - 1) * support)


def fit(rows: Float64[np.ndarray, "n 2"]) -> float:
    """The gain with the smallest cross-entropy between confidence and IoU."""

    def loss(log_gain: float) -> float:
        p = np.clip(confidence_of(rows[:, 0], np.exp(log_gain)), 1e-6, 1 - 1e-6)
        return float(-(rows[:, 1] * np.log(p) + (1 - rows[:, 1]) * np.log(1 - p)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 5), method="bounded").x))


def accuracy(data: Path, num: int) -> dict[str, Any]:
    """The fitted gain, and on other composites how well the confidence predicts the IoU, over tenths of the masks."""
    tuning, reporting = (supports(data, num, seed) for seed in (TUNING_SEED, REPORTING_SEED))
    figures: dict[str, Any] = {"gain": mask_quality.GAIN, "composites": num}
    for name, rows in reporting.items():
        confidence, ious = confidence_of(rows[:, 0], mask_quality.GAIN), rows[:, 1]
        tenths = [
            (float(confidence[part].mean()), float(ious[part].mean()))
            for part in np.array_split(np.argsort(confidence), 10)
        ]
        good, bad = confidence[ious >= 0.5], confidence[ious < 0.5]
        figures[name] = {
            "masks": len(rows),
            "gain_that_fits": round(fit(tuning[name]), 2),
            "mean_confidence": round(float(confidence.mean()), 3),
            "mean_iou": round(float(ious.mean()), 3),
            "calibration_error": round(float(np.mean([abs(one - other) for one, other in tenths])), 3),
            "rank_correlation": round(float(spearmanr(confidence, ious)[0]), 3),
            "auc_of_iou_above_half": round(float((good[:, None] > bad[None]).mean()), 3),
            "tenths": [[round(one, 3), round(other, 3)] for one, other in tenths],
        }
    return figures


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder that synthgen.tiny.fetch prepared; without it only the cost is measured"
    )
    parser.add_argument("--num", type=int, default=256, help="composites to fit the gain on, and as many to report on")
    parser.add_argument("--scenes", type=int, default=8, help="images of two words for each size")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    args = parser.parse_args()
    figures: dict[str, Any] = {"milliseconds_per_mask": {}}
    for size in GRIDS:
        figures["milliseconds_per_mask"][f"{size} px"] = case = cost(size, args.scenes, args.repeats)
        print(f"{size} px: {case}", flush=True)
    if args.data:
        figures["confidence"] = accuracy(args.data, args.num)
        print(figures["confidence"])
    print(write_result("mask_quality", figures))


if __name__ == "__main__":
    main()
