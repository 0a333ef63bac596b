"""Backbones: diffusion models that generate images and record the cross-attention map of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
from jaxtyping import UInt8

from synthgen.records import Generation, Request
from synthgen.registry import Registry

__all__ = ["BACKBONES", "Backbone"]


class Backbone(Protocol):
    """A diffusion model on one device. Its constructor's arguments are its settings; ``device`` is the worker's."""

    licence: ClassVar[str]  # one sentence for the dataset card: what may be done with the images

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One image with its maps for each request. A request's result depends on the request alone."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        ...

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of existing images must be multiples."""
        ...

    def attend(
        self,
        images: UInt8[np.ndarray, "b H W 3"],
        requests: Sequence[Request],
        timesteps: Sequence[int],
        inversion_steps: int = 0,
    ) -> list[Generation]:
        """Record attention for existing images: noised to ``timesteps``, or inverted in ``inversion_steps`` steps.

        Their sides must be multiples of ``multiple``; the model works best at the area of ``size``.
        """
        ...


BACKBONES: Registry[Backbone] = Registry(__name__, "generate.backbone")
