"""A finished tar, or the newest checkpoint, loses its end: what reads it must say so, or make it again."""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults.scene import Late, Place, Scene, Wrong

WEIGHT = 14
CHECKPOINTS = "pretrain/mae/checkpoints/step-*.safetensors"
PLACES = (
    Place("made", "masks", "images/*.tar"),
    Place("made", "masks", "maps/*.tar"),
    Place("made", "shards", "images/*.tar"),
    Place("made", "filter", "images/*.tar"),
    Place("made", "shards", "masks/*.tar"),
    Place("made", "pretrain", "shards/train/*.tar"),
    Place("made", "pretrain", CHECKPOINTS),
    Place("made", "evaluate", "shards/*/*.tar"),
    Place("made", "evaluate", "pretrain/mae/encoder.safetensors"),
    Place("given", "masks", "*/*.tar"),
    Place("given", "shards", "masks/*.tar"),
)


def available() -> bool:
    """Everywhere."""
    return True


def strike(scene: Scene, place: Place) -> str:
    """Cut a file off at ``share`` of its length, and run the stage that reads it."""
    path = choose(scene, place)
    os.truncate(path, int(scene.share * path.stat().st_size))
    return read_it(scene, place)


def choose(scene: Scene, place: Place) -> Path:
    """The file to spoil: one of the target's, or of a training that was killed its newest checkpoint."""
    if place.target == CHECKPOINTS:
        running = scene.start("--only", place.stage)
        while len(list(scene.run.glob(CHECKPOINTS))) < 2:  # what is before it must be there to go on from
            if running.ends_within(0.002):
                raise Late
        running.kill()
        running.wait()
        path = max(scene.run.glob(CHECKPOINTS))
    else:
        path = scene.pick(place.target)
    scene.damaged.add(path.relative_to(scene.run).as_posix())
    return path


def read_it(scene: Scene, place: Place) -> str:
    """Run the stage that reads what was damaged; what it said."""
    ended = scene.start("--only", place.stage).wait()
    if ended.status and not ended.refused:
        raise Wrong(f"it ended with {ended.status}: {ended.said[-3000:]}")
    return ended.last_line
