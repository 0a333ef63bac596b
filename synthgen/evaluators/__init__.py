"""Evaluators: each turns what an encoder says of labelled images, or masks beside the truth, into named numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from jaxtyping import Float32, Int
from torch import Tensor

from synthgen.records import WordMasks
from synthgen.registry import Family

__all__ = ["EVALUATORS", "Evaluator", "Labelled", "Material"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Features of images whose class is known."""

    features: Float32[Tensor, "n d"]
    labels: Int[Tensor, " n"]  # a class number, the same in training and test; -1 is a class not seen in training


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to judge; each evaluator takes its part (see its ``needs``)."""

    train: Labelled | None = None
    test: Labelled | None = None
    predicted: Mapping[str, WordMasks] = field(default_factory=dict)  # by key
    truth: Mapping[str, WordMasks] = field(default_factory=dict)


class Evaluator(Protocol):
    """A frozen dataclass whose fields are its settings."""

    needs: ClassVar[Literal["features", "masks"]]

    def evaluate(self, material: Material) -> dict[str, float]:
        """Named numbers; ``low`` and ``high`` bound the first one (95 %, bootstrap over images). Repeats exactly."""
        ...


EVALUATORS: Family[Evaluator] = Family(__name__)
