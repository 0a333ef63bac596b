"""Evaluators: each turns what an encoder says of images, or masks beside the truth, into named numbers."""

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
OF_LABELLED: frozenset[Need] = frozenset(
    {"features", "maps", "latents", "images"}
)  # the needs that are of images with labels
OF_SCENES: frozenset[Need] = frozenset({"patches", "boxes"})  # of images with masks; of the second, boxes alone will do
Baseline = Literal["random", "random generator", "pixels"]
Row = Literal["encoder", "generator", "random", "random generator", "pixels"]  # of the table


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """Features of images whose class is known."""

    features: Float32[Tensor, "n d"]
    labels: Int[Tensor, " n"]  # a class number, the same in training and test; -1 is a class not seen in training
    keys: tuple[
        str, ...
    ] = ()  # names of the images; without them their order counts where training images are held out

    def by_key(self) -> LabelledFeatures:
        """The same in the order of the keys."""
        if not self.keys:
            return self
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        return LabelledFeatures(self.features[order], self.labels[order], tuple(self.keys[row] for row in order))


@dataclass(frozen=True, slots=True)
class LabelledFeatureMaps:
    """What blocks of a network make of images whose class is known, each block at its own size (16 x 16 at most)."""

    maps: tuple[Float16[Tensor, "n t _ _ _"], ...]  # of each block, at each timestep; of an encoder one, once
    labels: Int[Tensor, " n"]  # as in LabelledFeatures
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Latents:
    """Images whose class is known, as a diffusion model's autoencoder gives them."""

    values: Float32[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]  # as in LabelledFeatures
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images whose class is known, at the size at which the encoder or the generator sees them."""

    pixels: UInt8[Tensor, "n S S 3"]
    labels: Int[Tensor, " n"]  # as in LabelledFeatures
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DenseFeatures:
    """Patch features of square images in which it is known what is where.

    Where boxes alone are asked for there may be images without masks: of those all pixels are background.
    ``classes`` begins with the background. Those of test images are those of training, and behind them the classes
    that training lacks: nothing can find them, and they count.
    """

    patches: Float16[Tensor, "n d h w"]
    pixels: Int16[Tensor, "n S S"]  # the class of each pixel
    boxes: tuple[Float32[Tensor, "_ 4"], ...]  # of each image: left, top, right, bottom in pixels
    box_classes: tuple[Int[Tensor, " _"], ...]
    keys: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class ImageTextPairs:
    """Images and what is said of them, as vectors of one space. A text may be said of several images."""

    images: Float32[Tensor, "n d"]
    texts: Float32[Tensor, "m d"]  # each text once
    of_image: Int[Tensor, " p"]  # pair i: image of_image[i] has text of_text[i]
    of_text: Int[Tensor, " p"]


@dataclass(frozen=True, slots=True)
class EvalData:
    """What there is to judge; each evaluator takes its part (see its ``needs``)."""

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
    reader: FeatureReader | None = None  # of the generator, whose latents they are
    train_images: LabelledImages | None = None
    test_images: LabelledImages | None = None
    encoder: Encoder | None = None  # of the row; its weights are for all, and a training takes a copy
    pool: str = "mean"  # what of its tokens is a feature: see Encoder.features
    device: str = "cpu"  # where heads are trained
    describe: Callable[[str], None] = lambda text: None  # how far a long evaluation is
    random_init: bool = False  # the row is of the generator with random weights

    def labelled(self) -> tuple[LabelledFeatures, LabelledFeatures]:
        """Training and test images of known class.

        Raises:
            ConfigError: there are none, or their features are not numbers.
        """
        train, test = _with_labels(self.train, self.test)
        _finite(train.features, test.features)
        return train, test

    def mapped(self) -> tuple[LabelledFeatureMaps, LabelledFeatureMaps]:
        """Training and test images of known class, as the blocks of a network give them.

        Raises:
            ConfigError: there are none, or what blocks give are not numbers.
        """
        train, test = _with_labels(self.train_maps, self.test_maps)
        _finite(*train.maps, *test.maps)
        return train, test

    def latents(self) -> tuple[Latents, Latents, FeatureReader]:
        """Training and test images of known class as latents, and the generator that they are of.

        Raises:
            ConfigError: there are none, or they are not numbers.
        """
        train, test = _with_labels(self.train_latents, self.test_latents)
        if self.reader is None:
            raise ConfigError("there is no generator that the latents are of")
        _finite(train.values, test.values)
        return train, test, self.reader

    def images(self) -> tuple[LabelledImages, LabelledImages, Encoder | FeatureReader]:
        """Training and test images of known class, and the encoder, or where there is none what reads the generator.

        Raises:
            ConfigError: there are none, or the encoder's weights are not numbers.
        """
        train, test = _with_labels(self.train_images, self.test_images)
        network = self.encoder or self.reader
        if network is None:
            raise ConfigError("there is neither an encoder nor a generator to evaluate")
        if self.encoder is not None:
            _finite(*(weight.detach().reshape(1, -1) for weight in self.encoder.parameters()), what="weights")
        return train, test, network

    def scenes(self) -> tuple[DenseFeatures, DenseFeatures]:
        """Training and test images in which it is known what is where.

        Raises:
            ConfigError: there are none, no class is in both, or their features are not numbers.
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
        """Images with their texts.

        Raises:
            ConfigError: there are none, or their vectors are not numbers.
        """
        if self.pairs is None or not len(self.pairs.of_image):
            raise ConfigError("there are no images with texts to evaluate on")
        _finite(self.pairs.images, self.pairs.texts)
        return self.pairs


_Labelled = TypeVar("_Labelled", LabelledFeatures, LabelledFeatureMaps, Latents, LabelledImages)


def _with_labels(train: _Labelled | None, test: _Labelled | None) -> tuple[_Labelled, _Labelled]:
    """Both, if there are images in them.

    Raises:
        ConfigError: there are none in one of them.
    """
    if train is None or test is None or not len(train.labels) or not len(test.labels):
        raise ConfigError("there are no labelled images to train on, or none to evaluate on")
    return train, test


class Evaluator(Protocol):
    """A frozen dataclass whose fields are its settings."""

    needs: ClassVar[Need]
    baselines: ClassVar[tuple[Baseline, ...]]  # what stands beside: random ones, the pixels themselves

    def evaluate(self, data: EvalData) -> dict[str, float]:
        """Named numbers, the same each time; the order of the images does not matter.

        The first one is the score; ``low`` and ``high`` bound it (95 %, bootstrap over test images), NaN where there
        is one test image. Where a head is trained it is the mean over ``seeds`` trainings, and ``spread`` their
        standard deviation.

        Raises:
            ConfigError: the data lacks what is needed; says what.
        """
        ...


EVALUATORS: Registry[Evaluator] = Registry(__name__, "evaluate.evaluators")


def named(choices: Sequence[Choice]) -> dict[str, Choice]:
    """Evaluators by the names of their scores: one that is listed twice is told apart by the options that differ.

    Raises:
        ConfigError: two are the same.
    """
    found: dict[str, Choice] = {}
    for choice in choices:
        others = [other.options for other in choices if other.name == choice.name]
        differing = [
            f"{key}={value}"
            for key, value in choice.options.items()
            if any(other.get(key, None) != value for other in others)
        ]
        name = " ".join([choice.name, *differing])
        if name in found:
            raise ConfigError(f"the evaluator {name} is listed twice with the same options; take one away")
        found[name] = choice
    return found


def json_safe(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """What an evaluator found as JSON can hold it: bounds that there are none of, those of one image, are None."""
    return {name: None if name in ("low", "high") and math.isnan(value) else value for name, value in numbers.items()}


def _finite(*tensors: Tensor, what: str = "features") -> None:
    if not all(bool(part.isfinite().all()) for tensor in tensors for part in torch.split(tensor, 256)):
        raise ConfigError(f"the encoder's {what} are not finite numbers; its training has diverged")
