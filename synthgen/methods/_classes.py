"""Classes that a denoiser is told, and drawing by them: with labels, and with guidance away from none."""

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
    "asked",
    "check_dropout",
    "check_labels",
    "class_numbers",
    "classifier_free_guidance",
    "labels_of",
    "vectors",
]

Labels = str | int | Sequence[str | int | None] | None  # a class for all images, or one for each; None is no class


def check_dropout(label_dropout: float) -> float:
    """The share as it is.

    Raises:
        ValueError: it is not at least 0 and below 1.
    """
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout must be at least 0 and below 1 (nothing would be told), not {label_dropout}")
    return label_dropout


def check_labels(samples: Sequence[Sample]) -> None:
    """See that there are classes to be told.

    Raises:
        ConfigError: no sample has one.
    """
    if not any(sample.label is not None for sample in samples):
        raise ConfigError(
            f"no label in the {len(samples)} samples looked at, and class_labels tells the network each image's class; "
            "give shards with a member cls, or a label in their json, or leave class_labels out"
        )


@lru_cache(maxsize=1)  # a training asks before it begins, and again when it does
def labels_of(data: ImageDataset) -> frozenset[str]:
    """The classes there are. Each of several processes reads the labels of its share, and all are told all.

    Raises:
        SynthgenError: a label cannot be read; every process raises it, so that none waits for another in vain.
    """
    rank, size = (dist.get_rank(), world_size()) if world_size() > 1 else (0, 1)
    share = range(len(data) * rank // size, len(data) * (rank + 1) // size)
    every: list[Any] = [None] * size
    try:
        every[rank] = {label for number in share if (label := data.label(number)) is not None}
    except SynthgenError as error:
        every[rank] = error
    if size > 1:
        dist.all_gather_object(every, every[rank])
    if failed := [found for found in every if isinstance(found, SynthgenError)]:
        raise failed[0]
    return frozenset().union(*every)


def class_numbers(
    classes: ClassEmbedding | None,
    labels: Sequence[str | None],
    seeds: Int[Tensor, " b"],
    dropout: float,
    *,
    stream: int,
) -> tuple[Int[Tensor, " b"] | None, dict[str, Tensor]]:
    """The number of each image's class, and the share that is told one, for ``metrics.jsonl``; without classes nothing.

    It is the number of no class where an image has none, and by lot in a share of the images.
    """
    if classes is None:
        return None, {}
    true, none = classes.numbers(labels), classes.none(len(labels))
    numbers = torch.where(uniform(seeds, stream=stream) < dropout, none, true)
    return numbers, {"told": (numbers != none).float().mean()}


def vectors(
    classes: ClassEmbedding | None, numbers: Int[Tensor, " b"] | None, count: int
) -> Float[Tensor, "b d"] | None:
    """What is told of ``count`` images of these classes; without numbers that they have none."""
    if classes is None:
        return None
    found: Tensor = classes(classes.none(count) if numbers is None else numbers)
    return found


def asked(
    classes: ClassEmbedding | None, labels: Labels, count: int, guidance_scale: float
) -> Int[Tensor, " b"] | None:
    """The number of the class of each of ``count`` images to be drawn, where any are wanted.

    Raises:
        ValueError: there are labels and no classes, guidance and no labels, or labels for other than ``count`` images.
        UnknownName, ConfigError: there is no such class.
    """
    if not 0 <= guidance_scale < torch.inf:
        raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
    if labels is None:
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} leads towards a class; give labels too")
        return None
    if classes is None:
        raise ValueError("this network was told no classes; pretrain with class_labels: true, or leave labels out")
    each = [labels] * count if isinstance(labels, str | int) else list(labels)
    if len(each) != count:
        raise ValueError(f"{len(each)} labels for {count} seeds; give one for each, or one for all")
    return classes.numbers(each)


def classifier_free_guidance(
    ask: Callable[[Int[Tensor, " b"] | None], Tensor], numbers: Int[Tensor, " b"] | None, guidance_scale: float
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): none + w (class - none), which at w = 1 asks for one of them.

    ``ask`` says the network's answer for images of these classes, or of none.
    """
    answer = ask(numbers)
    if numbers is None or guidance_scale == 1:
        return answer
    none = ask(None)
    return none + guidance_scale * (answer - none)
