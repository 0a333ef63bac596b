"""No space left on the device, in the middle of a stage; then there is some again.

The run lies on a small file system of its own (tmpfs). Where this user may mount none, a limit on the size of files is
in its place: writes fail then as well, though not all of them.
"""

from __future__ import annotations

from tests.faults.kinds.kill_run import PLACES
from tests.faults.scene import PAGE, Late, Place, Scene, Wrong, pages

__all__ = ["PLACES", "WEIGHT", "available", "strike"]

WEIGHT = 18


def available() -> bool:
    """Everywhere."""
    return True


def strike(scene: Scene, place: Place) -> str:
    """Leave room for ``share`` of what the stage writes."""
    before, adds = scene.whole.before(place.stage), scene.whole.pages[place.stage]
    limit = 0
    if scene.make_small(pages(before) + 1 + int(scene.share * adds)):
        scene.restore(place.stage)
    else:
        largest = max(path.stat().st_size for path in scene.whole.folder.glob("run/**/*.*"))
        limit = max(PAGE, int(scene.share * largest))
    ended = scene.start("--only", place.stage, file_size=limit).wait()
    scene.make_large()
    if not ended.status:
        raise Late
    if not ended.refused:
        raise Wrong(f"it ended with {ended.status}: {ended.said[-3000:]}")
    return ended.last_line
