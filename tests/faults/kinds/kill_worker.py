"""SIGKILL to one of two workers, as when memory runs out: the command goes on, or says in one line what to do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable

from tests.faults.scene import Late, Place, Scene, Wrong
from tests.faults.zygote import Running

WEIGHT = 14
PLACES = (
    Place("made", "masks"),
    Place("made", "shards"),
    Place("made", "pretrain"),
    Place("given", "masks"),
    Place("made", "generate"),
    Place("given", "shards"),
    Place("given", "attend"),
)


def available() -> bool:
    """Everywhere."""
    return True


def strike(scene: Scene, place: Place) -> str:
    """Kill a worker of the engine; in training, which has none, the process that reads and decodes samples."""
    if place.stage == "pretrain":
        running = scene.start("--only", place.stage, "--set", "stages.pretrain.num_workers=1")
    else:
        running = scene.start("--only", place.stage, "--workers", "2")
    pid = _reader(scene, running) if place.stage == "pretrain" else _worker(scene, running, place.stage)
    if running.ends_within(scene.share * scene.whole.seconds[place.stage] / 2):
        raise Late
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    ended = running.wait()
    if ended.status and not ended.refused:
        raise Wrong(f"it ended with {ended.status}: {ended.said[-9000:]}")
    return "went on" if not ended.status else ended.last_line


def _worker(scene: Scene, running: Running, stage: str) -> int:
    """A worker that has opened the stage."""

    def opened() -> list[int]:
        texts = [log.read_text() for log in sorted(scene.run.glob(f"logs/{stage}-*.jsonl"))]
        return [int(json.loads(text.splitlines()[0])["pid"]) for text in texts if "\n" in text]

    return scene.rng.choice(_awaited(opened, running))


def _reader(scene: Scene, running: Running) -> int:
    return _awaited(lambda: scene.children(running.pid), running)[0]


def _awaited(look: Callable[[], list[int]], running: Running) -> list[int]:
    while not (found := look()):
        if running.ends_within(0.002):
            raise Late
    return found
