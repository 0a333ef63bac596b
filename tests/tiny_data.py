"""Small stand-ins for what ``synthgen.tiny.fetch`` prepares: plain discs before grey panoramas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from synthgen.tiny.compositor import SCENES, Names
from synthgen.tiny.paint import COLOURS

NAMES = Names(
    ("apple", "ball", "car", "chair", "egg", "fir"),
    ((), ("beach ball",), ("taxi", "old car", "sports car", "van"), (), (), ()),
)
RED, GREEN, BLUE, YELLOW, CYAN, MAGENTA = (
    *((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    *((1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)),
)
PAINTS = ("green", "blue")  # that the car comes in
ROWS: tuple[
    tuple[int, tuple[float, float, float], int, bool], ...
] = (  # object, colour, its place in COLOURS, held out
    (0, RED, -1, False),
    (1, GREEN, -1, False),
    (2, MAGENTA, -1, False),
    *((2, tuple(x / 255 for x in COLOURS[name]), tuple(COLOURS).index(name), False) for name in PAINTS),
    (3, CYAN, -1, False),
    (3, BLUE, -1, True),
    (4, YELLOW, -1, False),
    (5, (0.0, 0.5, 0.0), -1, False),
)


def make_data(folder: Path, *, opacity: float = 1.0, panoramas: Mapping[str, Tensor] | None = None) -> Path:
    """``objects.safetensors`` with a disc a row of ROWS and ``panoramas.safetensors``, uint8 (h, w, 3), else grey."""
    folder.mkdir(parents=True, exist_ok=True)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    disc = ((axis[:, None] ** 2 + axis[None] ** 2) < 1).float()[..., None] * opacity
    rgba = [disc * torch.tensor([*colour, 1.0]) for _, colour, _, _ in ROWS]
    objects = {
        "rgba": (torch.stack(rgba) * 255).round().to(torch.uint8),
        "object": torch.tensor([row[0] for row in ROWS]),
        "colour": torch.tensor([row[2] for row in ROWS]),
        "held_out": torch.tensor([row[3] for row in ROWS]),
    }
    save_file(objects, folder / "objects.safetensors")
    grey = torch.full((8, 16, 3), 90, dtype=torch.uint8)
    save_file({scene: (panoramas or {}).get(scene, grey).clone() for scene in SCENES}, folder / "panoramas.safetensors")
    return folder
