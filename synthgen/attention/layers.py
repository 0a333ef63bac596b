"""The grids of a network's attention layers, from the names of their processors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from synthgen.errors import ConfigError

__all__ = ["levels_of"]


def levels_of(network: Any, layers: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """The grids of cross-attention, and those of self-attention, in the layers that ``layers`` name.

    Grids are factors relative to the network's finest. ``layers`` are prefixes of the names of attention processors. In
    a U-Net each block halves the grid of the one before; in a transformer every layer has the finest grid, and joint
    layers over text and image count as both kinds.

    Raises:
        ConfigError: one of ``layers`` is a prefix of no name; the message suggests the closest.
    """
    names = list(network.attn_processors)
    for beginning in layers:
        if not any(name.startswith(beginning) for name in names):
            raise _unknown(beginning, names)
    found = [name for name in names if name.startswith(layers)]
    if not hasattr(network, "up_blocks"):
        joint = any(".attn2." not in name for name in found)  # a second attention is over the image alone
        return {1} if joint else set(), {1}
    num_levels = len(network.down_blocks)
    cross = {_level(name, num_levels) for name in found if ".attn2." in name}
    return cross, {_level(name, num_levels) for name in found if ".attn2." not in name}


def _level(name: str, num_levels: int) -> int:
    """The factor of a U-Net's layer, such as ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor``."""
    part, number, *_ = name.split(".")
    if part == "down_blocks":
        return int(2 ** int(number))
    coarsest = num_levels - 1
    return int(2 ** (coarsest - int(number) if part == "up_blocks" else coarsest))


def _unknown(beginning: str, names: Iterable[str]) -> ConfigError:
    parts = [name.split(".") for name in names]
    known = dict.fromkeys(".".join(part[:depth]) for part in parts for depth in range(1, len(part)))
    near = difflib.get_close_matches(beginning, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    first = ", ".join(dict.fromkeys(part[0] for part in parts))
    return ConfigError(f"no attention layer has a name that begins with {beginning!r}; {hint}they begin with: {first}")
