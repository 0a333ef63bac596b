"""Class conditioning of denoisers: labels in training, and classifier-free guidance in sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from synthgen.datasets import ImageDataset, Sample
from synthgen.errors import ConfigError, SynthgenError
from synthgen.methods._processes import world_size
from synthgen.models.classes import ClassEmbedding
from synthgen.models.draws import uniform

__all__ = [
    "Labels",
    "check_labels",
    "class_numbers",
    "class_vectors",
    "classifier_free_guidance",
    "labels_of",
    "sampled_classes",
]

Labels = str | int | Sequence[str | int | None] | None  # one class for all images, or one each; None: no class


def check_labels(samples: Sequence[Sample]) -> None:
    """Check that there are class labels.

    Raises:
        ConfigError: no sample has a label.
    """
    if not any(sample.label is not None for sample in samples):
        raise ConfigError(
            f"no label in the {len(samples)} samples looked at, and class_labels conditions on each image's class; "
            "give shards with a member cls, or a label in their json, or leave class_labels out"
        )


@lru_cache(maxsize=1)  # called for the checks before a training, and again at its start
def labels_of(data: ImageDataset) -> frozenset[str]:
    """All classes of the data; each process reads a part of the labels and gathers those of the others.

    Raises:
        SynthgenError: a label cannot be read; every process raises the error, so that none waits forever.
    """
    rank, size = (dist.get_rank(), world_size()) if world_size() > 1 else (0, 1)
    part = range(len(data) * rank // size, len(data) * (rank + 1) // size)
    parts: list[Any] = [None] * size  # of each process: its labels, or its error
    try:
        parts[rank] = {label for number in part if (label := data.label(number)) is not None}
    except SynthgenError as error:
        parts[rank] = error
    if size > 1:
        dist.all_gather_object(parts, parts[rank])
    if errors := [found for found in parts if isinstance(found, SynthgenError)]:
        raise errors[0]
    return frozenset().union(*parts)


def class_numbers(
    classes: ClassEmbedding | None,
    labels: Sequence[str | None],
    seeds: Int[Tensor, " b"],
    dropout: float,
    *,
    stream: int,
) -> tuple[Int[Tensor, " b"] | None, dict[str, Tensor]]:
    """The class number of each image (None without classes), and the metric ``with_class``, the share that has one.

    The number is that of "no class" where an image has no label, and for a random share ``dropout`` of the images.
    """
    if classes is None:
        return None, {}
    true, none = classes.numbers(labels), classes.none(len(labels))
    numbers = torch.where(uniform(seeds, stream=stream) < dropout, none, true)
    return numbers, {"with_class": (numbers != none).float().mean()}


def class_vectors(
    classes: ClassEmbedding | None, numbers: Int[Tensor, " b"] | None, count: int
) -> Float[Tensor, "b d"] | None:
    """The class vectors of ``count`` images; without ``numbers`` that of "no class"."""
    if classes is None:
        return None
    vectors: Tensor = classes(classes.none(count) if numbers is None else numbers)
    return vectors


def sampled_classes(
    classes: ClassEmbedding | None, labels: Labels, count: int, guidance_scale: float
) -> Int[Tensor, " b"] | None:
    """The class number of each of ``count`` images to sample; None without labels.

    Raises:
        ValueError: labels without class conditioning, guidance without labels, or another number of labels.
        UnknownName, ConfigError: no class has this name or number.
    """
    if not 0 <= guidance_scale < torch.inf:
        raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
    if labels is None:
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} has no effect without labels; give labels too")
        return None
    if classes is None:
        raise ValueError("this network was trained without classes; pretrain with class_labels: true, or omit labels")
    labels = [labels] * count if isinstance(labels, str | int) else list(labels)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} seeds; give one for each, or one for all")
    return classes.numbers(labels)


def classifier_free_guidance(
    predict: Callable[[Int[Tensor, " b"] | None], Tensor], numbers: Int[Tensor, " b"] | None, guidance_scale: float
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): none + w (class - none); w = 1 needs no second evaluation.

    ``predict`` is the network's output for images of these class numbers, or of "no class" where it gets None.
    """
    conditional = predict(numbers)
    if numbers is None or guidance_scale == 1:
        return conditional
    unconditional = predict(None)
    return unconditional + guidance_scale * (conditional - unconditional)
