"""SIGKILL to the command and all of its workers at once, as when a machine loses its power."""

from __future__ import annotations

import signal

from tests.faults.scene import Late, Place, Scene

WEIGHT = 36
PLACES = (
    Place("made", "generate"),
    Place("given", "attend"),
    Place("made", "masks"),
    Place("made", "filter"),
    Place("made", "shards"),
    Place("made", "pretrain"),
    Place("made", "evaluate"),
)


def available() -> bool:
    """Everywhere."""
    return True


def strike(scene: Scene, place: Place) -> str:
    """Kill it when the stage has come as far as the moment's share."""
    running = scene.start("--only", place.stage)
    scene.wait_for_moment(running, place.stage)
    running.kill()
    if running.wait().status != -signal.SIGKILL:
        raise Late
    return "killed"
