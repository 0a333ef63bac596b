"""A run in a store, over real HTTP and through faults: every stage, and the bytes of a local run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from synthgen import api
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import StaleArtifact
from synthgen.run import Run
from synthgen.runner import Progress, run_stage
from synthgen.status import status
from synthgen.stores import parse_location
from synthgen.stores.cache import cache_folder
from synthgen.units import list_units
from tests.factories import Drawn, TrueMasks, make_run
from tests.store_server import Store

HERE = Local(workers=1)
TRAINING = {"epochs": 6, "batch_size": 4, "save_every": 3, "log_every": 2, "export": False}


def hashes(run: Run, *patterns: str) -> dict[str, str]:
    """The sha256 of the files of a run that no clock or place has a say in."""
    found = [path for pattern in patterns or ("**/*.tar",) for path in run.path.glob(pattern)]
    return {path.relative_to(run.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def line(place: Path | str) -> Run:
    """Every stage, on drawn images."""
    run = make_run(place, units=2, unit_size=8)  # type: ignore[arg-type]
    api.shards(run, samples_per_shard=4, val_ratio=0.3, engine=HERE)
    api.pretrain(run, **TRAINING | {"export": True})
    api.evaluate(run, evaluators=["knn"])
    return run


ALL = (
    "**/*.tar",
    "shards/*/*.parquet",
    "shards/*/sizes.json",
    "pretrain/mae/*.safetensors",
    "pretrain/mae/config.json",
)


@pytest.mark.parametrize("kind", [pytest.param("s3", marks=pytest.mark.slow), "memory"])
def test_the_whole_line_gives_the_bytes_of_a_local_run_through_faults(
    store: Store, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = line(tmp_path / "demo")
    store.fault_rate = 0.02
    there = line(store.url("demo") if kind == "s3" else f"memory://{tmp_path.name}/demo")
    assert hashes(there, *ALL) == hashes(local, *ALL)
    assert len(hashes(there, *ALL)) > 12
    names = {path.relative_to(there.path).as_posix() for path in there.path.rglob("*") if path.is_file()}
    assert {"run.yaml", "shards/dataset.json", "pretrain/mae/done.json", "evaluate/mae.json"} <= names
    assert {"pretrain/mae/transformers/model.safetensors", "pretrain/mae/metrics.jsonl"} <= names
    assert (there.path / "shards/README.md").read_bytes() == (local.path / "shards/README.md").read_bytes()

    one, other = status(local), status(there)
    assert [(a.name, a.done, a.planned, a.samples, a.bytes) for a in one.artifacts] == [
        (a.name, a.done, a.planned, a.samples, a.bytes) for a in other.artifacts
    ]
    assert (one.labels, one.words, one.shards, one.problems) == (other.labels, other.words, other.shards, ())
    assert [item.curve for item in one.training] == [item.curve for item in other.training]
    if kind == "s3":
        assert sum(store.faults.values()) > 2
        assert store.unfinished_uploads() == 0
    assert api.view(there) == there.path / "view.html"
    assert api.export_dataset(there, "yolo").samples == 16
    assert hashes(there, "export-yolo/**/*.txt") == hashes(_exported(local), "export-yolo/**/*.txt")


def _exported(run: Run) -> Run:
    api.export_dataset(run, "yolo")
    return run


def test_only_damaged_units_are_made_again(store: Store) -> None:
    run = make_run(store.url("run"), units=3, unit_size=3)  # type: ignore[arg-type]
    before = hashes(run)
    store.put("run/images/000001.tar", store.objects()["run/images/000001.tar"][:2000])  # cut off
    store.delete("run/masks/000002.json")  # killed between the tar and its mark
    store.lines.clear()
    assert run_stage(Drawn(units=3, unit_size=3), run, HERE).samples == 3
    assert run_stage(TrueMasks(), run, HERE).samples == 3
    assert hashes(run) == before
    assert sorted(line for line in store.lines if line.startswith("PUT") and ".tar" in line) == [
        f"PUT /bucket/run/{name}.tar"
        for name in ("images/000001", "masks/000002")  # maps/000001 was whole
    ]


def test_other_settings_and_another_seed_are_refused(store: Store) -> None:
    run = make_run(store.url("run"), units=1, unit_size=3)  # type: ignore[arg-type]
    with pytest.raises(StaleArtifact, match=r"s3://bucket/run/images was made differently: unit_size is 4 and was 3"):
        run_stage(Drawn(units=1, unit_size=4), run, HERE)
    with pytest.raises(StaleArtifact, match="was made with seed 0, not 1"):
        Run.create(store.url("run"), seed=1)


class _Stop(Progress):
    """Ends the process, as far as training can tell, after so many samples."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_killed_training_resumes_on_another_machine(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(place, units=1, unit_size=8) for place in (tmp_path / "local", store.url("run"))]  # type: ignore[arg-type]
    for run in runs:
        api.shards(run, samples_per_shard=4, val_ratio=0.0, engine=HERE)
    api.pretrain(runs[0], **TRAINING)
    with pytest.raises(KeyboardInterrupt):
        api.pretrain(runs[1], progress=_Stop(after=4 * 7), **TRAINING)
    kept = sorted(path.name for path in runs[1].path.glob("pretrain/mae/checkpoints/*"))
    assert kept == ["step-00000003.safetensors", "step-00000006.safetensors"]
    monkeypatch.setenv("SYNTHGEN_CACHE", str(tmp_path / "another"))
    store.lines.clear()
    api.pretrain(runs[1], **TRAINING)
    assert any(line.startswith("GET") and "step-00000006" in line for line in store.lines)
    assert hashes(runs[1], "pretrain/mae/encoder.safetensors") == hashes(runs[0], "pretrain/mae/encoder.safetensors")
    steps = [item.curve for item in (*status(runs[0]).training, *status(runs[1]).training)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 6


def test_training_streams_within_a_small_cache(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(place, units=2, unit_size=8) for place in (tmp_path / "local", store.url("run"))]  # type: ignore[arg-type]
    for run in runs:
        api.shards(run, samples_per_shard=4, val_ratio=0.0, engine=HERE)
    sizes = [path.stat().st_size for path in runs[0].path.glob("shards/train/*.tar")]
    most = 3 * max(sizes)
    assert sum(sizes) > most
    monkeypatch.setenv("SYNTHGEN_CACHE", str(tmp_path / "small"))
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", str(most))
    largest = 0

    class Watch(Progress):
        def advance(self, count: int) -> None:
            nonlocal largest
            largest = max(largest, sum(file.stat().st_size for file in (cache_folder() / "files").iterdir()))

    quick = TRAINING | {"epochs": 2, "save_every": 100}
    for run in runs:
        api.pretrain(run, progress=Watch() if run is runs[1] else None, **quick)
    assert 0 < largest <= most
    assert hashes(runs[1], "pretrain/mae/encoder.safetensors") == hashes(runs[0], "pretrain/mae/encoder.safetensors")


def test_images_in_a_store_are_attended(store: Store, tmp_path: Path) -> None:
    source = make_run(store.url("source"), units=1, unit_size=2)  # type: ignore[arg-type]
    api.shards(source, val_ratio=0.0, engine=HERE)
    tiny = Choice("tiny")
    runs = [Run.create(tmp_path / "local"), Run.create(store.url("attended"))]
    for run in runs:
        api.attend(run, images=f"{source.path}/shards/train/*.tar", timesteps=[100], backbone=tiny, engine=HERE)
        api.masks(run, engine=HERE)
    assert hashes(runs[0]) == hashes(runs[1])
    assert len(hashes(runs[1])) == 3


def test_worker_processes_and_the_command_line_get_a_run_by_its_url(store: Store, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a [cat]\na [dog]\n")
    run = Run.create(store.url("run"))
    drawn = {"prompts": str(prompts), "unit_size": 1, "backbone": Choice("tiny", {"num_steps": 1})}
    api.generate(run, engine=HERE, **drawn)
    api.masks(run, engine=Local(workers=2))
    local = Run.create(tmp_path / "local")
    api.generate(local, engine=HERE, **drawn)
    api.masks(local, engine=HERE)
    assert hashes(run) == hashes(local)
    logs = [name for name in store.objects("run/logs/") if "masks" in name]
    assert {name.split("-")[1] for name in logs} == {"0", "1"}

    def told(*command: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | store.env
        return subprocess.run(
            [sys.executable, "-m", "synthgen", *command], env=env, capture_output=True, text=True, check=False
        )

    shown = told("status", store.url("run"))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "s3://bucket/run" in shown.stdout
    refused = told("masks", "--run", "s3://nowhere/run")
    assert refused.returncode == 2
    assert refused.stderr == "synthgen: there is no bucket 'nowhere' at s3://; make it, or correct the name\n"


def test_a_done_mark_that_is_replaced_within_the_resolution_of_its_time_is_read_again(store: Store) -> None:
    folder = parse_location(store.url("run/maps"))
    for fingerprint in ("a" * 16, "b" * 16):  # of the same length
        mark = {"fingerprint": fingerprint, "sha256": "", "count": 3, "bytes": 0}
        store.put("run/maps/000000.json", json.dumps(mark).encode())
        for item in store._objects():
            item.last_modified = datetime(2026, 1, 1)
        assert list_units(folder) == {0: (fingerprint, 3)}
