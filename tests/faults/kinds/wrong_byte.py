"""One bit of a finished file is turned over: nothing may be made from it unnoticed."""

from __future__ import annotations

from tests.faults.kinds.cut_tar import PLACES, choose, read_it
from tests.faults.scene import Place, Scene

__all__ = ["PLACES", "WEIGHT", "available", "strike"]

WEIGHT = 16


def available() -> bool:
    """Everywhere."""
    return True


def strike(scene: Scene, place: Place) -> str:
    """Turn a bit over at ``share`` of the file, and run the stage that reads it."""
    path = choose(scene, place)
    data = bytearray(path.read_bytes())
    data[int(scene.share * len(data))] ^= 1 << scene.rng.randrange(8)
    with open(path, "r+b") as file:  # the same file: only its content differs
        file.write(data)
    return read_it(scene, place)
