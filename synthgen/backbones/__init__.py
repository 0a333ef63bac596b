"""Backbones: diffusion models that make images and tell where each word looked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from synthgen.records import Generation, Request
from synthgen.registry import Family

__all__ = ["BACKBONES", "Backbone"]


class Backbone(Protocol):
    """A diffusion model on one device. Its constructor's arguments are its settings; ``device`` is the worker's."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One image with its maps for each request. A request's result depends on the request alone."""
        ...

    def describe(self) -> dict[str, str]:
        """What the dataset card says of the model: ``model``, ``family``, ``licence``."""
        ...


BACKBONES: Family[Backbone] = Family(__name__)
