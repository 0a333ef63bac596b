"""One request in twenty to the store fails: 500, 503, no answer, or a connection that is cut in the middle."""

from __future__ import annotations

import atexit
import shutil
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec

from tests.faults.scene import Place, Scene, Wrong
from tests.store_server import Store, start_store

WEIGHT = 8
RATE = 0.05
PLACES = (
    Place("made", "generate"),
    Place("made", "masks"),
    Place("made", "shards"),
    Place("made", "pretrain"),
    Place("given", "attend"),
    Place("made", "evaluate"),
    Place("given", "shards"),
)


def available() -> bool:
    """Where the client and the server are installed."""
    return find_spec("s3fs") is not None and find_spec("moto") is not None


def strike(scene: Scene, place: Place) -> str:
    """Run the stage on a run in the store while requests fail; they do so no longer when it is run again."""
    store, name = _store(), f"{scene.folder.name}/run"
    for path in scene.run.rglob("*"):
        if path.is_file():
            store.put(f"{name}/{path.relative_to(scene.run).as_posix()}", path.read_bytes())
    shutil.rmtree(scene.run)
    line = scene.whole.line.file.replace("run: run\n", f"run: {store.url(name)}\n")
    (scene.folder / "line.yaml").write_text(line)
    scene.env = {**store.env, "SYNTHGEN_CACHE": str(scene.folder / "cache")}

    def fetch() -> None:
        for key, data in store.objects(f"{name}/").items():
            path = scene.folder / "run" / key.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            store.delete(key)

    scene.fetch = fetch
    before, store.fault_rate = store.faults.total(), RATE
    try:
        ended = scene.start("--only", place.stage).wait()
    finally:
        store.fault_rate = 0.0
    if ended.status and not ended.refused:
        raise Wrong(f"it ended with {ended.status}: {ended.said[-3000:]}")
    return f"{store.faults.total() - before} requests failed: {ended.last_line}"


@cache
def _store() -> Store:
    """A server for as long as this process lives."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(start_store(seed=0))
