"""The kinds of fault, one module each."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from tests.faults.scene import Place, Scene

__all__ = ["KINDS", "Kind"]


class Kind(Protocol):
    """What a module of this folder has."""

    #: how many of a hundred moments are of this kind
    WEIGHT: int
    #: where it strikes, in turn
    PLACES: tuple[Place, ...]

    def available(self) -> bool:
        """Whether this machine can do it."""

    def strike(self, scene: Scene, place: Place) -> str:
        """Disturb the command at ``place``, and let it end; what it ended with.

        Raises:
            Late: the command had ended before.
            Wrong: it ended as it must not.
        """


KINDS: dict[str, Kind] = {
    name: import_module(f"{__name__}.{name}")
    for name in ("kill_run", "kill_worker", "full_disk", "cut_tar", "wrong_byte", "store_errors", "lost_node")
}
