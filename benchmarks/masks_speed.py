"""Masks per second of each refiner.

``python benchmarks/masks_speed.py`` writes ``results/masks_speed.json``. Contenders are ``threshold``, ``grabcut``,
``attentioncut`` with and without numba, and ``whole``: AttentionCut without its bands, with the same energies solved by
SciPy's maximum flow on all pixels, from the same labels of the cells. All of them get the same drawn images and maps,
whose masks are known, and alternate on one core. Times are processor times, which other work on the machine changes
little. Compilation by numba, needed once per machine, is measured separately as ``compile_seconds``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from _common import iou, make_parser, rounds, write_result
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

from synthgen.graphcut import MaximumFlow, fastest
from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners import Refiner
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.refiners.grabcut import GrabCut
from synthgen.refiners.threshold import Threshold

GRID = 16  # cells a side of the maps


class Plain(AttentionCut):
    """AttentionCut without numba."""

    solver = MaximumFlow


class Whole(Plain):
    """AttentionCut that cuts all pixels, by SciPy."""

    def band_of(self, labels: Int[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
        """All pixels."""
        return np.ones(labels.shape, dtype=bool)


NUM_DISTRACTORS = 8  # spots in the background, of the colours of the objects
CONTENDERS: dict[str, Refiner] = {
    "threshold": Threshold(),
    "grabcut": GrabCut(),
    "attentioncut": AttentionCut(),
    "attentioncut without numba": Plain(),
    "whole": Whole(),
}
Scene = tuple[UInt8[np.ndarray, "H W 3"], Maps, Bool[np.ndarray, "words H W"]]


def draw_scene(seed: int, num_words: int, size: int) -> Scene:
    """Textured ellipses and boxes over spots of the same colours, with coarse, blurred, uneven and noisy maps.

    Textures are drawn at four pixels per cell and enlarged, so that a seed gives the same picture at any size.
    """
    rng = np.random.default_rng(seed)
    base = 4 * GRID
    palette = rng.permutation([(0.8, 0.2, 0.2), (0.2, 0.3, 0.8), (0.9, 0.8, 0.2), (0.2, 0.6, 0.3), (0.9, 0.9, 0.9)])
    canvas = texture(rng, base, size, muted(palette[0]), 0.15)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    for _ in range(NUM_DISTRACTORS):
        (row, column), radius, color = rng.uniform(0, 1, 2), rng.uniform(0.06, 0.15), palette[rng.integers(5)]
        spot = (y - row) ** 2 + (x - column) ** 2 < radius**2
        canvas = np.where(spot[..., None], texture(rng, base, size, muted(color), 0.15), canvas)
    masks: list[Bool[np.ndarray, "H W"]] = []
    for k in range(num_words):
        row, column = rng.uniform(0.4, 0.6), (k + 0.5) / num_words + rng.uniform(-0.04, 0.04)
        tall, wide = rng.uniform(0.15, 0.3, 2) / (1 if num_words == 1 else 1.4)
        dy, dx = (y - row) / tall, (x - column) / wide
        mask = dy**2 + dx**2 < 1 if rng.random() < 0.5 else np.maximum(abs(dy), abs(dx)) < 0.9
        for other in masks:
            mask = mask & ~other
        canvas = np.where(mask[..., None], texture(rng, base, size, muted(palette[k + 1]), 0.15), canvas)
        masks.append(mask)
    truth = np.stack(masks)
    canvas = gaussian_filter(canvas, (0.8 * size / base, 0.8 * size / base, 0))  # soft edges, as in photos
    return (canvas * 255).astype(np.uint8), draw_maps(rng, truth), truth


def muted(color: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """A colour closer to grey, so that colour alone does not separate objects."""
    return 0.3 * color + 0.35


def texture(
    rng: np.random.Generator, base: int, size: int, color: Float[np.ndarray, " 3"], grain: float
) -> Float[np.ndarray, "size size 3"]:
    """A colour with noise of several scales and a gradient."""
    layers = [gaussian_filter(rng.normal(size=(base, base)), s) * s for s in (1, 2, 3)]
    slope = rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, base)[:, None, None]
    noise = color + slope + grain * np.stack(layers, axis=2) + rng.normal(0, 0.02, (base, base, 3))
    enlarge = size // base
    return np.clip(noise, 0, 1).repeat(enlarge, axis=0).repeat(enlarge, axis=1)


def draw_maps(rng: np.random.Generator, truth: Bool[np.ndarray, "words H W"]) -> Maps:
    """Maps like those of a model: the truth on 16 x 16, uneven, blurred by a cell, with noise."""
    shrunk = [Image.fromarray(one.astype(np.float32)).resize((GRID, GRID), Image.Resampling.BOX) for one in truth]
    coarse = np.stack([np.asarray(one) for one in shrunk])
    weights = []
    for one in coarse:
        soft = gaussian_filter(one * rng.uniform(0.6, 1.0, one.shape), 1.0)
        weights.append(np.clip(soft / soft.max() + rng.normal(0, 0.12, one.shape), 0, None) * 0.2)
    where = gaussian_filter(coarse, (0, 0.7, 0.7))
    affinity = np.zeros((len(AFFINITY_OFFSETS), GRID, GRID))
    for edge, (dy, dx) in enumerate(AFFINITY_OFFSETS):
        far = np.square(where - np.roll(where, (-dy, -dx), axis=(1, 2))).sum(axis=0)
        affinity[edge] = 8 * np.exp(-2 * far - np.hypot(dy, dx) / 3 + rng.normal(0, 0.4, far.shape))
    words = tuple(f"word{k}" for k in range(len(truth)))
    return Maps(words, np.stack(weights).astype(np.float16), affinity.astype(np.float16))


def run(refiner: Refiner, scenes: list[Scene]) -> None:
    for image, maps, _ in scenes:
        refiner.refine(image, maps)


def mean_iou(refiner: Refiner, scenes: list[Scene]) -> float:
    """The mean IoU over all words of all scenes."""
    pairs = [zip(refiner.refine(image, maps), truth, strict=True) for image, maps, truth in scenes]
    return round(float(np.mean([iou(*pair) for scene in pairs for pair in scene])), 4)


def compile_seconds() -> float:
    """The processor time for compiling the solver by numba, in a process with an empty cache."""
    code = (
        "import time, numpy; from synthgen.maxflow import SearchTree; start = time.process_time(); "
        "tree, half = SearchTree((1, 2), [(0, 1)]), numpy.array([[1, 0]], numpy.int32); "
        "tree.cut(*tree.move(numpy.eye(2, dtype=numpy.int64), half, numpy.zeros(2, numpy.intp), 1)); "
        "print(time.process_time() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "NUMBA_CACHE_DIR": folder}
        done = subprocess.run([sys.executable, "-c", code], env=settings, check=True, capture_output=True, text=True)
    return round(float(done.stdout), 2)


def measure(size: int, num_words: int, num_scenes: int, repeats: int) -> dict[str, Any]:
    """The quality and speed of all contenders on the same scenes."""
    scenes = [draw_scene(seed, num_words, size) for seed in range(num_scenes)]
    contenders: dict[str, Callable[[], object]] = {
        name: functools.partial(run, refiner, scenes) for name, refiner in CONTENDERS.items()
    }
    seconds = rounds(contenders, repeats, time.process_time)
    num_masks = num_scenes * num_words
    return {
        name: {
            "iou": mean_iou(refiner, scenes),
            "masks_per_second": round(num_masks / min(seconds[name]), 1),
            "masks_per_second_median": round(num_masks / median(seconds[name]), 1),
            "ms_per_image": round(1e3 * min(seconds[name]) / num_scenes, 2),
            "ms_per_image_median": round(1e3 * median(seconds[name]) / num_scenes, 2),
        }
        for name, refiner in CONTENDERS.items()
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=20, help="images per case")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    args = parser.parse_args()
    if fastest() is MaximumFlow:
        parser.error("numba is not installed; install it with: pip install numba")
    figures: dict[str, Any] = {"grid": GRID, "scenes": args.scenes, "rounds": args.repeats, "threads": 1}
    figures["compile_seconds"] = compile_seconds()
    for size in (64, 128):
        for num_words in (1, 2):
            case = measure(size, num_words, args.scenes, args.repeats)
            figures[f"{size} px, {num_words} word{'s' if num_words > 1 else ''}"] = case
            for name, row in case.items():
                print(f"{size:4} px  {num_words} word(s)  {name:26}  {row}")
    print(write_result("masks_speed", figures))


if __name__ == "__main__":
    main()
