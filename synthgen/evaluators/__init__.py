"""Evaluators: each scores an encoder's features, or masks against the truth, as named numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float16, Float32, Int, Int16, UInt8
from torch import Tensor

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.records import WordMasks
from synthgen.registry import Registry

if TYPE_CHECKING:
    from synthgen.diffusion.features import FeatureReader
    from synthgen.models.vit import Encoder

__all__ = [
    "EVALUATORS",
    "OF_LABELLED",
    "OF_SCENES",
    "Baseline",
    "DenseFeatures",
    "EvalData",
    "Evaluator",
    "ImageTextPairs",
    "LabelledFeatureMaps",
    "LabelledFeatures",
    "LabelledImages",
    "Latents",
    "Need",
    "Row",
    "json_safe",
    "named",
]

Need = Literal["features", "patches", "boxes", "maps", "latents", "images", "pairs", "masks"]
OF_LABELLED: frozenset[Need] = frozenset({"features", "maps", "latents", "images"})  # met by images with labels
OF_SCENES: frozenset[Need] = frozenset({"patches", "boxes"})  # met by images with masks; "boxes" also by boxes alone
Baseline = Literal["random", "random generator", "pixels"]
Row = Literal["encoder", "generator", "random", "random generator", "pixels"]  # rows of the results table


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """Features of labelled images."""

    features: Float32[Tensor, "n d"]
    labels: Int[Tensor, " n"]  # class number, shared by training and test; -1: a class that training lacks
    keys: tuple[str, ...] = ()  # image names; without them, the held-out training images depend on the order

    def by_key(self) -> LabelledFeatures:
        """These features sorted by key."""
        if not self.keys:
            return self
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        return LabelledFeatures(self.features[order], self.labels[order], tuple(self.keys[row] for row in order))


@dataclass(frozen=True, slots=True)
class LabelledFeatureMaps:
    """Feature maps of labelled images, one per block of a network, at the block's own size (16 x 16 at most)."""

    maps: tuple[Float16[Tensor, "n t _ _ _"], ...]  # per block, at each timestep; an encoder has one of each
    labels: Int[Tensor, " n"]  # as in LabelledFeatures
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Latents:
    """Labelled images as latents of a diffusion model's autoencoder."""

    values: Float32[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]  # as in LabelledFeatures
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Labelled images at the input size of the encoder or the generator."""

    pixels: UInt8[Tensor, "n S S 3"]
    labels: Int[Tensor, " n"]  # as in LabelledFeatures
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DenseFeatures:
    """Patch features of square images with ground-truth masks or boxes.

    If only boxes are needed, images may lack masks; all their pixels are then background. ``classes`` starts with the
    background. The test set has the training classes in the same order, followed by classes that training lacks:
    no head can predict these, and they count as missed.
    """

    patches: Float16[Tensor, "n d h w"]
    pixels: Int16[Tensor, "n S S"]  # class of each pixel
    boxes: tuple[Float32[Tensor, "_ 4"], ...]  # per image: left, top, right, bottom in pixels
    box_classes: tuple[Int[Tensor, " _"], ...]
    keys: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class ImageTextPairs:
    """Embeddings of images and their texts in one space. Several images may share a text."""

    images: Float32[Tensor, "n d"]
    texts: Float32[Tensor, "m d"]  # unique texts
    of_image: Int[Tensor, " p"]  # pair i: image of_image[i] has text of_text[i]
    of_text: Int[Tensor, " p"]


@dataclass(frozen=True, slots=True)
class EvalData:
    """The data to evaluate on; each evaluator uses the part that its ``needs`` names."""

    train: LabelledFeatures | None = None
    test: LabelledFeatures | None = None
    predicted: Mapping[str, WordMasks] = field(default_factory=dict)  # by key
    truth: Mapping[str, WordMasks] = field(default_factory=dict)
    train_scenes: DenseFeatures | None = None
    test_scenes: DenseFeatures | None = None
    pairs: ImageTextPairs | None = None
    train_maps: LabelledFeatureMaps | None = None
    test_maps: LabelledFeatureMaps | None = None
    train_latents: Latents | None = None
    test_latents: Latents | None = None
    reader: FeatureReader | None = None  # reads the generator that the latents belong to
    train_images: LabelledImages | None = None
    test_images: LabelledImages | None = None
    encoder: Encoder | None = None  # the row's encoder; its weights are shared, so training works on a copy
    pool: str = "mean"  # how its tokens become a feature: see Encoder.features
    device: str = "cpu"  # where heads are trained
    describe: Callable[[str], None] = lambda text: None  # receives the progress of a long evaluation
    random_init: bool = False  # the row is the generator with random weights

    def labelled(self) -> tuple[LabelledFeatures, LabelledFeatures]:
        """Features of labelled training and test images.

        Raises:
            ConfigError: there are no labelled images, or their features are not finite.
        """
        train, test = _with_labels(self.train, self.test)
        _finite(train.features, test.features)
        return train, test

    def feature_maps(self) -> tuple[LabelledFeatureMaps, LabelledFeatureMaps]:
        """Feature maps of labelled training and test images.

        Raises:
            ConfigError: there are no labelled images, or their feature maps are not finite.
        """
        train, test = _with_labels(self.train_maps, self.test_maps)
        _finite(*train.maps, *test.maps)
        return train, test

    def latents(self) -> tuple[Latents, Latents, FeatureReader]:
        """Latents of labelled training and test images, and the reader of the generator they belong to.

        Raises:
            ConfigError: there are no labelled images or no generator, or the latents are not finite.
        """
        train, test = _with_labels(self.train_latents, self.test_latents)
        if self.reader is None:
            raise ConfigError("there is no generator that the latents are of")
        _finite(train.values, test.values)
        return train, test, self.reader

    def images(self) -> tuple[LabelledImages, LabelledImages, Encoder | FeatureReader]:
        """Labelled training and test images, and the encoder or, without one, the generator's reader.

        Raises:
            ConfigError: there are no labelled images or no network, or the encoder's weights are not finite.
        """
        train, test = _with_labels(self.train_images, self.test_images)
        network = self.encoder or self.reader
        if network is None:
            raise ConfigError("there is neither an encoder nor a generator to evaluate")
        if self.encoder is not None:
            _finite(*(weight.detach().reshape(1, -1) for weight in self.encoder.parameters()), what="weights")
        return train, test, network

    def scenes(self) -> tuple[DenseFeatures, DenseFeatures]:
        """Training and test images with ground-truth masks or boxes.

        Raises:
            ConfigError: there are no such images, training has no class, or the features are not finite.
        """
        train, test = self.train_scenes, self.test_scenes
        if train is None or test is None or not len(train) or not len(test):
            raise ConfigError("there are no images with masks to train on, or none to evaluate on")
        if test.classes[: len(train.classes)] != train.classes:
            raise ValueError("the classes of the test images must begin with those of training")
        if len(train.classes) < 2:
            raise ConfigError(
                "no mask of the training images has a pixel, and no box lies in their middle: there is nothing to learn"
            )
        _finite(train.patches, test.patches)
        return train, test

    def image_text_pairs(self) -> ImageTextPairs:
        """Embeddings of images and their texts.

        Raises:
            ConfigError: there are no pairs, or their embeddings are not finite.
        """
        if self.pairs is None or not len(self.pairs.of_image):
            raise ConfigError("there are no images with texts to evaluate on")
        _finite(self.pairs.images, self.pairs.texts)
        return self.pairs


_Labelled = TypeVar("_Labelled", LabelledFeatures, LabelledFeatureMaps, Latents, LabelledImages)


def _with_labels(train: _Labelled | None, test: _Labelled | None) -> tuple[_Labelled, _Labelled]:
    """The training and the test set, neither of them empty.

    Raises:
        ConfigError: one of the sets is missing or empty.
    """
    if train is None or test is None or not len(train.labels) or not len(test.labels):
        raise ConfigError("there are no labelled images to train on, or none to evaluate on")
    return train, test


class Evaluator(Protocol):
    """A frozen dataclass whose fields are its settings."""

    needs: ClassVar[Need]
    baselines: ClassVar[tuple[Baseline, ...]]  # rows to compare with: random weights, raw pixels

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """Compute named numbers, deterministically and independent of the order of the images.

        The first one is the score; ``low`` and ``high`` are its 95 % bootstrap interval over test images, NaN for a
        single test image. If a head is trained, the score is the mean over ``seeds`` trainings and ``spread`` their
        standard deviation.

        Raises:
            ConfigError: the data lacks what the evaluator needs; the message says what.
        """
        ...


EVALUATORS: Registry[Evaluator] = Registry(__name__, "evaluate.evaluators")


def named(choices: Sequence[Choice]) -> dict[str, Choice]:
    """Evaluators by the names of their scores; the names of repeated ones include the options that differ.

    Raises:
        ConfigError: an evaluator is listed twice with the same options.
    """
    found: dict[str, Choice] = {}
    for choice in choices:
        others = [other.options for other in choices if other.name == choice.name]
        differing = [
            f"{key}={value}"
            for key, value in choice.options.items()
            if any(other.get(key) != value for other in others)
        ]
        name = " ".join([choice.name, *differing])
        if name in found:
            raise ConfigError(f"the evaluator {name} is listed twice with the same options; remove one")
        found[name] = choice
    return found


def json_safe(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """An evaluator's numbers for JSON; undefined bounds (of a single image) become None."""
    return {name: None if name in ("low", "high") and math.isnan(value) else value for name, value in numbers.items()}


def _finite(*tensors: Tensor, what: str = "features") -> None:
    if not all(bool(part.isfinite().all()) for tensor in tensors for part in torch.split(tensor, 256)):
        raise ConfigError(f"the encoder's {what} are not finite numbers; its training has diverged")
