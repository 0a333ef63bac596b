"""EvalData for evaluators of which it is known what it must score: all can be read off it, or nothing."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from synthgen.evaluators import (
    DenseFeatures,
    EvalData,
    ImageTextPairs,
    LabelledFeatureMaps,
    LabelledFeatures,
    LabelledImages,
    Latents,
)
from synthgen.models.vit import EncoderConfig, VisionTransformer
from synthgen.records import WordMasks

if TYPE_CHECKING:
    from synthgen.diffusion.features import FeatureReader

CLASSES = ("background", "disc", "square")
GRID = 8


def make_labelled(count: int, seed: int, *, known: bool) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    features = 0.1 * torch.randn(count, 6, generator=generator)
    if known:
        features[torch.arange(count), labels] += 1
    return LabelledFeatures(features, labels, tuple(f"{image:04d}" for image in range(count)))


def make_mapped(count: int, seed: int, *, known: bool) -> LabelledFeatureMaps:
    """Two blocks at two timesteps; the class is the bright channel of the second block at the second timestep."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    coarse, fine = (0.1 * torch.randn(count, 2, 5, side, side, generator=generator) for side in (2, 4))
    if known:
        fine[torch.arange(count), 1, labels] += 1
    keys = tuple(f"{image:04d}" for image in range(count))
    return LabelledFeatureMaps((coarse.half(), fine.half()), labels, keys)


def make_latents(count: int, seed: int, *, known: bool) -> Latents:
    """The class is the bright channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    values = 0.1 * torch.randn(count, 4, 4, 4, generator=generator)
    if known:
        values[torch.arange(count), labels] += 3
    return Latents(values, labels, tuple(f"{image:04d}" for image in range(count)))


def make_pictured(count: int, seed: int, *, known: bool) -> LabelledImages:
    """Noise of 16 x 16 pixels; the class is the colour of a bright square somewhere in it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(80, 120, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
    corners = torch.randint(0, 9, (count, 2), generator=generator).tolist()
    for image, (top, left) in enumerate(corners if known else ()):
        pixels[image, top : top + 8, left : left + 8, labels[image]] = 220
    return LabelledImages(pixels, labels, tuple(f"{image:04d}" for image in range(count)))


def make_encoder(seed: int = 0) -> VisionTransformer:
    """For images of 16 x 16 pixels, untrained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(EncoderConfig(image_size=16, patch_size=4, dim=16, depth=2, num_heads=2)).eval()


@cache
def make_reader() -> FeatureReader:
    """Of a small Stable Diffusion of random weights."""
    from synthgen.backbones.diffusers import Diffusers
    from synthgen.diffusion.features import FeatureReader
    from tests.models import make_stable_diffusion

    with tempfile.TemporaryDirectory() as folder:
        backbone = Diffusers(model=str(make_stable_diffusion(Path(folder))))
    return FeatureReader(backbone, timesteps=[10])


def make_scenes(count: int, seed: int, *, known: bool, scale: int = 1) -> DenseFeatures:
    """One or two boxes an image; ``scale`` pixels to a cell. Known features tell class and distances to the sides."""
    rng = np.random.default_rng(seed)
    pixels = torch.zeros(count, GRID, GRID, dtype=torch.int16)
    patches = torch.zeros(count, 7, GRID, GRID)
    middle = torch.arange(GRID) + 0.5
    boxes, box_classes = [], []
    for image in range(count):
        edges, classes = [], []
        for column in range(1 + image % 2):
            width, height = rng.integers(2, 4 if image % 2 else 7), rng.integers(2, 7)
            left, top = column * 4 + rng.integers(0, (4 if image % 2 else 8) - width + 1), rng.integers(0, 9 - height)
            number = int(rng.integers(1, 3))
            inside = (slice(top, top + height), slice(left, left + width))
            pixels[image][inside] = number
            sides = torch.zeros(4, GRID, GRID)
            sides[0], sides[1] = (middle - left)[None], (middle - top)[:, None]
            sides[2], sides[3] = (left + width - middle)[None], (top + height - middle)[:, None]
            patches[image, 3:][:, *inside] = sides[:, *inside]
            edges.append([left, top, left + width, top + height])
            classes.append(number)
        boxes.append(torch.tensor(edges).float() * scale)
        box_classes.append(torch.tensor(classes))
    patches[:, :3] = torch.nn.functional.one_hot(pixels.long(), 3).permute(0, 3, 1, 2)
    if not known:
        patches = torch.randn(patches.shape, generator=torch.Generator().manual_seed(seed))
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    keys = tuple(f"{seed:03d}{image:07d}" for image in range(count))
    return DenseFeatures(patches.half(), pixels, tuple(boxes), tuple(box_classes), keys, CLASSES)


def make_pairs(count: int, *, known: bool) -> ImageTextPairs:
    """Two texts an image."""
    generator = torch.Generator().manual_seed(7)
    images, others = torch.randn(2, count, 16, generator=generator)
    texts = torch.cat([images, 2 * images]) if known else torch.cat([others, -others])
    numbers = torch.arange(count)
    return ImageTextPairs(images, texts, torch.cat([numbers, numbers]), torch.arange(2 * count))


def make_word_masks(count: int, *, known: bool) -> tuple[dict[str, WordMasks], dict[str, WordMasks]]:
    """Predicted and true masks: the same, or discs' masks in opposite corners."""
    predicted, truth = {}, {}
    for image in range(count):
        values = np.zeros((2, 1, 8, 8), bool)
        values[0, 0, :4, :4], values[1, 0, 4:, 4:] = True, True
        first, second = (WordMasks(("disc",), value, np.zeros(1, np.float32)) for value in values)
        truth[f"{image}"], predicted[f"{image}"] = first, first if known else second
    return predicted, truth


def make_data(*, known: bool, train: int = 48, test: int = 24) -> EvalData:
    """From it every evaluator must read everything (``known``), or nothing."""
    return EvalData(
        make_labelled(train, 1, known=known),
        make_labelled(test, 2, known=known),
        *make_word_masks(test, known=known),
        make_scenes(train, 3, known=known),
        make_scenes(test, 4, known=known),
        make_pairs(test, known=known),
        make_mapped(train, 5, known=known),
        make_mapped(test, 6, known=known),
        make_latents(train, 7, known=known),
        make_latents(test, 8, known=known),
        make_reader(),
        make_pictured(train, 9, known=known),
        make_pictured(test, 10, known=known),
        make_encoder(),
    )


def reordered(data: EvalData) -> EvalData:
    """The same images in another order."""
    generator = torch.Generator().manual_seed(0)

    def labelled(split: LabelledFeatures) -> LabelledFeatures:
        order = torch.randperm(len(split.labels), generator=generator)
        return LabelledFeatures(split.features[order], split.labels[order], tuple(split.keys[i] for i in order))

    def mapped(split: LabelledFeatureMaps) -> LabelledFeatureMaps:
        order = torch.randperm(len(split.labels), generator=generator)
        maps = tuple(block[order] for block in split.maps)
        return LabelledFeatureMaps(maps, split.labels[order], tuple(split.keys[i] for i in order))

    def latents(split: Latents) -> Latents:
        order = torch.randperm(len(split.labels), generator=generator)
        return Latents(split.values[order], split.labels[order], tuple(split.keys[i] for i in order))

    def pictured(split: LabelledImages) -> LabelledImages:
        order = torch.randperm(len(split.labels), generator=generator)
        return LabelledImages(split.pixels[order], split.labels[order], tuple(split.keys[i] for i in order))

    def scenes(split: DenseFeatures) -> DenseFeatures:
        order = torch.randperm(len(split), generator=generator)
        parts = (tuple(part[i] for i in order) for part in (split.boxes, split.box_classes, split.keys))
        boxes, box_classes, keys = parts
        return DenseFeatures(split.patches[order], split.pixels[order], boxes, box_classes, keys, split.classes)

    pairs = data.pairs
    place = torch.randperm(len(pairs.images), generator=generator)
    shuffle = torch.randperm(len(pairs.of_image), generator=generator)
    images = torch.empty_like(pairs.images)
    images[place] = pairs.images
    return dataclasses.replace(
        data,
        train=labelled(data.train),
        test=labelled(data.test),
        predicted=dict(reversed(data.predicted.items())),
        train_scenes=scenes(data.train_scenes),
        test_scenes=scenes(data.test_scenes),
        pairs=ImageTextPairs(images, pairs.texts, place[pairs.of_image][shuffle], pairs.of_text[shuffle]),
        train_maps=mapped(data.train_maps),
        test_maps=mapped(data.test_maps),
        train_latents=latents(data.train_latents),
        test_latents=latents(data.test_latents),
        train_images=pictured(data.train_images),
        test_images=pictured(data.test_images),
    )
