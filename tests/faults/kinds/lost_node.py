"""A Ray cluster loses one of two machines, which are sets of Ray's processes here, while its worker has a unit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.faults.scene import Late, Place, Scene, Wrong

WEIGHT = 2
PLACES = (Place("made", "masks"), Place("given", "masks"))


def available() -> bool:
    """Where ray is installed."""
    return find_spec("ray") is not None


def strike(scene: Scene, place: Place) -> str:
    """Kill all that runs on the machine whose worker was the first to open the stage; the other does the rest."""
    with _cluster() as (address, nodes):
        running = scene.start("--only", place.stage, "--engine", "ray", "--address", address)
        while not (pids := _opened(scene.run, place.stage)):
            if running.ends_within(0.002):
                raise Late
        if running.ends_within(scene.share * scene.whole.seconds[place.stage] / 2):
            raise Late
        lost = next((node for node in nodes if _raylet(node) == _parent(pids[0])), None)
        if lost is None:  # the worker has ended
            raise Late
        workers = scene.children(_raylet(lost))
        for pid in (*(process.process.pid for some in lost.all_processes.values() for process in some), *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended = running.wait()
    if ended.status and not ended.refused:
        raise Wrong(f"it ended with {ended.status}: {ended.said[-3000:]}")
    return "went on" if not ended.status else ended.last_line


@contextmanager
def _cluster() -> Iterator[tuple[str, list[Any]]]:
    """A head that does no work, and two machines with one CPU each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}  # the least that Ray takes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    try:
        yield cluster.address, [cluster.add_node(num_cpus=1, **memory) for _ in range(2)]
    finally:
        cluster.shutdown()


def _opened(run: Path, stage: str) -> list[int]:
    """The workers that have opened the stage."""
    texts = [log.read_text() for log in sorted(run.glob(f"logs/{stage}-*.jsonl"))]
    return [int(json.loads(text.splitlines()[0])["pid"]) for text in texts if "\n" in text]


def _raylet(node: Any) -> int:
    """The process of a machine that begins its workers."""
    return int(node.all_processes["raylet"][0].process.pid)


def _parent(pid: int) -> int:
    """The process that began another; 0 where that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0
