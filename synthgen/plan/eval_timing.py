"""How long an evaluator works on so many images: tried on a sample's features, repeated, and drawn out from there."""

from __future__ import annotations

import time
from dataclasses import fields, is_dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from synthgen.evaluators import (
        DenseFeatures,
        EvalData,
        Evaluator,
        ImageTextPairs,
        LabelledFeatureMaps,
        LabelledFeatures,
        LabelledImages,
        Latents,
    )

__all__ = ["LENGTHS", "enlarged", "tried"]

LENGTHS = ("steps", "max_steps")  # what evaluators call the length of a training; of the second it is the most
_SHORT = (4, 10)  # steps of the two trainings that are timed
_MOST = {
    "features": 4096,
    "patches": 256,
    "boxes": 256,
    "maps": 256,
    "latents": 64,
    "images": 64,
    "pairs": 1024,
}  # images of either side that are tried
_APART = 0.01  # how far features of one image that stands for several are moved, as a share of each number
_WARM = 16  # images on which everything is done once before


def tried(
    evaluator: Evaluator, data: EvalData, sizes: tuple[int, int], classes: int, rounds: int, affordable: float
) -> tuple[list[float], str]:
    """Seconds of an evaluation of ``sizes`` images, to learn from and to be judged on, in each round; and their basis.

    A round is left out where those before took what is affordable, in seconds; the mean of the others stands for it.
    """
    most = max(_MOST[evaluator.needs], getattr(evaluator, "batch_size", 0))  # or a step would be too small
    few = tuple(min(size, most) for size in sizes)
    _whole(evaluator, enlarged(data, (min(few[0], _WARM), min(few[1], _WARM)), classes))
    given = enlarged(data, (few[0], few[1]), classes)
    taken = list[float]()
    started = time.perf_counter()
    while len(taken) < rounds and (not taken or time.perf_counter() - started < affordable):
        taken.append(_whole(evaluator, given))
    growth, mean = 1.0, fmean(taken)
    for side, (size, held) in enumerate(zip(sizes, few, strict=True)):
        if size > held:
            half = (few[0] // 2, few[1]) if side == 0 else (few[0], few[1] // 2)
            share = 2 * (1 - _whole(evaluator, enlarged(data, half, classes)) / mean)
            growth *= 1 + (size / held - 1) * min(max(share, 0.0), 1.0)
    taken += [mean] * (rounds - len(taken))
    return [seconds * growth for seconds in taken], _basis(evaluator, sizes, (few[0], few[1]))


def _basis(evaluator: Evaluator, sizes: tuple[int, int], few: tuple[int, int]) -> str:
    told = f"{few[0]:,} x {few[1]:,} images" + (f" of {sizes[0]:,} x {sizes[1]:,}" if few != sizes else "")
    name, steps = _length(evaluator)
    if steps <= _SHORT[1]:
        return told
    most = "at most " if name.startswith("max") else ""
    return f"{told}, {_SHORT[1]} of {most}{steps} steps"


def _length(evaluator: Evaluator) -> tuple[str, int]:
    """What an evaluator calls the length of its training, and that length; 0 where it trains nothing."""
    names: list[str] = [field.name for field in fields(evaluator)] if is_dataclass(evaluator) else []
    name = next((name for name in LENGTHS if name in names), "")
    return name, int(getattr(evaluator, name)) if name else 0


def _whole(evaluator: Evaluator, data: EvalData) -> float:
    """Seconds of an evaluation with all its steps, of which a few are made."""
    name, steps = _length(evaluator)
    if steps <= _SHORT[1]:
        return _timed(evaluator, data)
    with_steps: Any = evaluator
    short, longer = (_timed(replace(with_steps, **{name: count}), data) for count in _SHORT)
    each = max(0.0, longer - short) / (_SHORT[1] - _SHORT[0])
    return short + each * (steps - _SHORT[0])


def _timed(evaluator: Evaluator, data: EvalData) -> float:
    started = time.perf_counter()
    evaluator.evaluate(data)
    return time.perf_counter() - started


# -- more of the same


def enlarged(data: EvalData, sizes: tuple[int, int], classes: int) -> EvalData:
    """The data with ``sizes`` images, to learn from and to be judged on: its own, over and over, of all classes.

    Of pairs the second are images and the first are texts.
    """
    train, test = sizes
    return replace(
        data,
        train=data.train and _labelled(data.train, train, classes),
        test=data.test and _labelled(data.test, test, classes),
        train_scenes=data.train_scenes and _scenes(data.train_scenes, train, classes),
        test_scenes=data.test_scenes and _scenes(data.test_scenes, test, classes),
        pairs=data.pairs and _pairs(data.pairs, train, test),
        train_maps=data.train_maps and _mapped(data.train_maps, train, classes),
        test_maps=data.test_maps and _mapped(data.test_maps, test, classes),
        train_latents=data.train_latents and _latents(data.train_latents, train, classes),
        test_latents=data.test_latents and _latents(data.test_latents, test, classes),
        train_images=data.train_images and _pictured(data.train_images, train, classes),
        test_images=data.test_images and _pictured(data.test_images, test, classes),
    )


def _labelled(given: LabelledFeatures, count: int, classes: int) -> LabelledFeatures:
    rows, features = torch.arange(count), _repeated(given.features, count)
    if count > len(given.features):  # images are not equally near, as copies would be: kNN looks longer at those
        features = features * (1 + _APART * torch.randn(features.shape, generator=torch.Generator().manual_seed(count)))
    return replace(given, features=features, labels=rows % max(1, classes), keys=_keys(count))


def _mapped(given: LabelledFeatureMaps, count: int, classes: int) -> LabelledFeatureMaps:
    maps, rows = tuple(_repeated(block, count) for block in given.maps), torch.arange(count)
    return replace(given, maps=maps, labels=rows % max(1, classes), keys=_keys(count))


def _latents(given: Latents, count: int, classes: int) -> Latents:
    rows = torch.arange(count)
    return replace(given, values=_repeated(given.values, count), labels=rows % max(1, classes), keys=_keys(count))


def _pictured(given: LabelledImages, count: int, classes: int) -> LabelledImages:
    rows = torch.arange(count)
    return replace(given, pixels=_repeated(given.pixels, count), labels=rows % max(1, classes), keys=_keys(count))


def _scenes(given: DenseFeatures, count: int, classes: int) -> DenseFeatures:
    """Boxes get other classes each time, so that all occur."""
    names = (*given.classes, *(f"class {number}" for number in range(len(given.classes), classes + 1)))
    held = len(given)
    return replace(
        given,
        patches=_repeated(given.patches, count),
        pixels=_repeated(given.pixels, count),
        boxes=tuple(given.boxes[row % held] for row in range(count)),
        box_classes=tuple((given.box_classes[row % held] - 1 + row) % (len(names) - 1) + 1 for row in range(count)),
        keys=_keys(count),
        classes=names,
    )


def _pairs(given: ImageTextPairs, texts: int, images: int) -> ImageTextPairs:
    rows = torch.arange(max(images, texts))
    return replace(
        given,
        images=_repeated(given.images, images),
        texts=_repeated(given.texts, texts),
        of_image=rows % images,
        of_text=rows % texts,
    )


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows[torch.arange(count) % len(rows)]


def _keys(count: int) -> tuple[str, ...]:
    return tuple(f"{number:09d}" for number in range(count))
