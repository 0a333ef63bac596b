"""The quality of masks: AttentionCut compared with simpler refiners, against exact masks.

``python benchmarks/masks.py --data DATA --photos TAR`` writes ``results/masks.json``. Two sets of images are measured:

* held-out composites, recorded by ``attend`` with the shipped model; DATA is the folder that ``synthgen.tiny.fetch``
  prepared;
* the photos in TAR, which have label images. Their attention is simulated: it is the truth, made as coarse, blurred
  and noisy as the shipped model's maps of the tuning composites are.

Free parameters of the simpler refiners are chosen on the tuning composites, which are not among the reported ones;
``otsu``, ``grabcut`` and ``attentioncut`` use their defaults.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import iou, make_parser, write_result
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from synthgen.datasets import ShardDataset
from synthgen.evaluators._bootstrap import mean_with_interval
from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners import Refiner
from synthgen.refiners._words import resize, scaled
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.refiners.grabcut import GrabCut
from synthgen.refiners.propagation import Propagation
from synthgen.refiners.threshold import Threshold
from synthgen.tiny import score
from synthgen.tiny.sheet import overlay, write_sheet
from synthgen.tiny.truth import SEED, held_out

TUNING_SEED = 9_000_000  # of composites that are used neither in training nor in any report
LEVELS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
WALKS = ((1, 0.3), (1, 0.7), (2, 0.5), (4, 0.5), (8, 0.5), (4, 1.0))  # num_steps and spread of ``propagation``
TOLERANCE = 2.0  # pixels between matching outlines
GRID = 16  # cells of the simulated maps along a photo's longer side
MIN_AREA = 0.02  # share of a photo; smaller classes are lost on such a grid
FIGURE_ROWS = 8


@dataclass(frozen=True)
class Scene:
    """An image, its recorded maps, and the exact masks of its words."""

    image: UInt8[np.ndarray, "H W 3"]
    maps: Maps
    truth: Bool[np.ndarray, "words H W"]


@dataclass(frozen=True)
class Damage:
    """How a model's maps differ from the truth on their grid."""

    blur: float  # sigma in cells
    uneven: float  # standard deviation on the object, relative to the mean on it
    noise: float  # standard deviation off the object, relative to the mean on it
    grain: float  # sigma in cells: the correlation length of both


def composites(data: Path, num: int, seed: int) -> list[Scene]:
    """Held-out composites through ``attend`` with its defaults; only those with all words recorded."""
    pairs = score.attend(score.backbone(), held_out(data, num, seed=seed))
    scenes = [Scene(generation.image, generation.maps, exact.values) for generation, exact in pairs]
    return [scene for scene in scenes if len(scene.truth) == len(scene.maps.words)]


def photos(tar: Path, damage: Damage) -> list[Scene]:
    """Photos with simulated maps of their larger classes, and without self-attention."""
    scenes = []
    samples = ShardDataset([tar])
    for number in range(len(samples)):
        sample, rng = samples[number], np.random.default_rng(number)
        words = samples.word_masks(number).words
        if sample.label_map is None or not words:
            continue
        truth = sample.label_map == np.arange(1, len(words) + 1)[:, None, None]
        large = truth.mean(axis=(1, 2)) >= MIN_AREA
        if not large.any():
            continue
        shape = grid_of(sample.label_map.shape)
        weights = np.stack([damaged(one, shape, damage, rng) for one in truth[large]])
        affinity = np.ones((len(AFFINITY_OFFSETS), *shape), np.float16)  # uniform, so without effect
        names = tuple(word for word, keep in zip(words, large, strict=True) if keep)
        scenes.append(Scene(sample.image, Maps(names, weights.astype(np.float16), affinity), truth[large]))
    return scenes


def grid_of(size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the maps of an image of (height, width), GRID along its longer side."""
    height, width = (max(1, round(side * GRID / max(size))) for side in size)
    return height, width


def coarse(mask: Bool[np.ndarray, "H W"], shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """The share of each cell that a mask covers."""
    image = Image.fromarray(mask.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BOX)
    cells: Float[np.ndarray, "h w"] = np.asarray(image, dtype=np.float64)
    return cells


def damaged(
    mask: Bool[np.ndarray, "H W"], shape: tuple[int, int], damage: Damage, rng: np.random.Generator
) -> Float[np.ndarray, "h w"]:
    """A mask with the damage of a model's map."""
    soft = gaussian_filter(coarse(mask, shape), damage.blur)
    uneven, noise = (gaussian_filter(rng.normal(size=shape), damage.grain, mode="wrap") for _ in range(2))
    gain = np.exp(np.sqrt(np.log1p(damage.uneven**2)) * uneven / max(uneven.std(), 1e-9))
    background = damage.noise * soft.max() * noise / max(noise.std(), 1e-9)
    result: Float[np.ndarray, "h w"] = np.maximum(soft * gain + background, 0.0)
    return result


def measured_damage(scenes: Sequence[Scene]) -> Damage:
    """The blur with which the truth fits the maps best, and the remaining differences on and off the objects."""
    pairs = [
        (map_, coarse(mask, (map_.shape[0], map_.shape[1])))
        for scene in scenes
        for map_, mask in zip(scaled(scene.maps.weights), scene.truth, strict=True)
        if mask.any()
    ]
    maps = np.stack([map_ for map_, _ in pairs])

    def blurred(blur: float) -> Float[np.ndarray, "n h w"]:
        soft = [gaussian_filter(true, blur) for _, true in pairs]
        return np.stack([one / one.max() for one in soft])

    def residual(blur: float) -> Float[np.ndarray, "n h w"]:
        soft = blurred(blur)
        rest: Float[np.ndarray, "n h w"] = maps - soft * (maps * soft).sum() / np.square(soft).sum()
        return rest

    blur = min((0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0), key=lambda sigma: float(np.square(residual(sigma)).mean()))
    soft, rest = blurred(blur), residual(blur)
    inside, outside = maps[soft > 0.8], maps[soft < 0.05]
    correlation = float((rest[:, :, 1:] * rest[:, :, :-1]).mean() / np.square(rest).mean())  # of neighbours
    # that of white noise blurred by sigma is exp(-1 / (4 sigma^2))
    grain = float(np.sqrt(-1 / (4 * np.log(np.clip(correlation, 1e-3, 0.99)))))
    mean = float(inside.mean())
    return Damage(blur, round(float(inside.std()) / mean, 3), round(float(outside.std()) / mean, 3), round(grain, 3))


# -- figures of one image


def boundary_f(mask: Bool[np.ndarray, "H W"], true: Bool[np.ndarray, "H W"]) -> float:
    """The F-score of the outline, with matches within TOLERANCE."""
    edge, other = (one & ~binary_erosion(one) for one in (mask, true))
    if not edge.any() or not other.any():
        return 0.0
    precision = float((distance_transform_edt(~other)[edge] <= TOLERANCE).mean())
    recall = float((distance_transform_edt(~edge)[other] <= TOLERANCE).mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def confusion(masks: Bool[np.ndarray, "words H W"], truth: Bool[np.ndarray, "words H W"]) -> tuple[float, float]:
    """The number of object pixels in the mask of another word, and of all object pixels."""
    common = masks.reshape(len(masks), -1).astype(np.float64) @ truth.reshape(len(truth), -1).T  # pixels in both
    return float(common.sum() - np.trace(common)), float(truth.sum())


# -- contenders


def mean_iou(refiner: Refiner, scenes: Sequence[Scene]) -> float:
    """The mean IoU over words, without those whose truth is empty."""
    found = [(refiner.refine(scene.image, scene.maps), scene.truth) for scene in scenes]
    return float(
        np.mean([iou(*pair) for masks, truth in found for pair in zip(masks, truth, strict=True) if pair[1].any()])
    )


def tuned(scenes: Sequence[Scene]) -> dict[str, Refiner]:
    """All contenders, their free parameters chosen on ``scenes``."""
    levels = [Threshold(method="fixed", level=level) for level in LEVELS]
    walks = [
        Propagation(num_steps=steps, spread=spread, method="fixed", level=level)
        for (steps, spread), level in itertools.product(WALKS, LEVELS)
    ]
    best = functools.partial(max, key=lambda refiner: mean_iou(refiner, scenes))
    return {
        "level": best(levels),
        "otsu": Threshold(),
        "propagation": best(walks),
        "grabcut": GrabCut(),
        "attentioncut": AttentionCut(),
    }


def measure(refiners: Mapping[str, Refiner], scenes: Sequence[Scene]) -> dict[str, Any]:
    """The figures of all contenders, over all images and by the number of words."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, refiner in refiners.items():
        rows[name] = [scene_figures(refiner.refine(scene.image, scene.maps), scene.truth) for scene in scenes]
    counts = sorted({len(scene.truth) for scene in scenes})
    groups: dict[str, Callable[[Scene], bool]] = {"all": lambda scene: True}
    if len(counts) <= 3:
        groups |= {str(count): lambda scene, count=count: len(scene.truth) == count for count in counts}  # type: ignore[misc]
    figures = {}
    for group, belongs in groups.items():
        members = [number for number, scene in enumerate(scenes) if belongs(scene)]
        ours = [rows["attentioncut"][number] for number in members]
        figures[group] = {
            "images": len(members),
            **{name: summarize([row[number] for number in members], ours) for name, row in rows.items()},
        }
    return figures


def scene_figures(masks: Bool[np.ndarray, "words H W"], truth: Bool[np.ndarray, "words H W"]) -> dict[str, Any]:
    """The figures of one image: a value per word, and the confusion of words."""
    pairs = [(mask, true) for mask, true in zip(masks, truth, strict=True) if true.any()]
    return {
        "iou": [iou(*pair) for pair in pairs],
        "f": [boundary_f(*pair) for pair in pairs],
        "confusion": confusion(masks, truth),
    }


def summarize(rows: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over words, and the gain of ``ours`` in IoU with its 95 % interval over images."""
    words = np.array([float(len(row["iou"])) for row in rows])
    gains = np.array([sum(own["iou"]) - sum(row["iou"]) for own, row in zip(ours, rows, strict=True)])
    gain, low, high = mean_with_interval(gains, words)
    wrong, pixels = np.sum([row["confusion"] for row in rows], axis=0)
    return {
        "iou": round(float(np.mean([value for row in rows for value in row["iou"]])), 4),
        "boundary_f": round(float(np.mean([value for row in rows for value in row["f"]])), 4),
        "wrong_word": round(float(wrong / max(pixels, 1)), 4),
        "attentioncut_gains": [round(value, 4) for value in (gain, low, high)],
    }


def draw_figure(path: Path, refiners: Mapping[str, Refiner], scenes: Iterable[Scene]) -> None:
    """One row per image: the image, its attention maps, the masks of each refiner, the exact masks."""
    tiles = []
    for scene in scenes:
        size = (scene.image.shape[0], scene.image.shape[1])
        heat = resize(scaled(scene.maps.weights), size).max(axis=0)
        heated = (scene.image * (0.25 + 0.75 * heat[..., None])).astype(np.uint8)
        found = [refiner.refine(scene.image, scene.maps) for refiner in refiners.values()]
        tiles += [scene.image, heated, *(overlay(scene.image, masks) for masks in (*found, scene.truth))]
    write_sheet(path, torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255, columns=len(refiners) + 3)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and, without ``--quick``, write ``results/masks.json``."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--photos", type=Path, help="a tar of photos with label images")
    parser.add_argument("--num", type=int, default=512, help="composites to report on")
    parser.add_argument("--tuning", type=int, default=192, help="composites to choose parameters on")
    parser.add_argument("--figure", type=Path, help="PNG of the first composites and their masks, to write")
    parser.add_argument("--quick", action="store_true", help="use a few images and write nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tuning = composites(args.data, 8 if args.quick else args.tuning, TUNING_SEED)
    refiners = tuned(tuning)
    damage = measured_damage(tuning)
    settings = {name: {"refiner": type(one).__name__, **asdict(one)} for name, one in refiners.items()}  # type: ignore[call-overload]
    figures: dict[str, Any] = {
        "settings": settings,
        "tuning": len(tuning),
        "tolerance": TOLERANCE,
        "damage": asdict(damage),
    }
    scenes = composites(args.data, 8 if args.quick else args.num, SEED)
    figures["composites"] = measure(refiners, scenes)
    if args.photos is not None:
        found = photos(args.photos, damage)
        figures["photos"] = measure(refiners, found[:4] if args.quick else found)
    if args.figure is not None:
        draw_figure(args.figure, refiners, scenes[:FIGURE_ROWS])
    for part in ("composites", "photos"):
        for group, rows in figures.get(part, {}).items():
            for name in refiners:
                print(part, group, name, rows[name], flush=True)
    if not args.quick:
        print(write_result("masks", figures))
    return figures


if __name__ == "__main__":
    main()
