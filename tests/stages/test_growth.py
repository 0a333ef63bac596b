"""More images for a run that is there: the same bytes as those of a run that asked for all of them at once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from synthgen import api
from synthgen.codecs import encode_png
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import MissingArtifact, StaleArtifact, UnitsFailed
from synthgen.options import resume_settings
from synthgen.pipeline import read_pipeline
from synthgen.plan.count import count
from synthgen.prompts import survey_prompts
from synthgen.run import Run
from synthgen.stages import Worker
from synthgen.stages.generate import Generate
from synthgen.status import status
from synthgen.units import UnitWriter
from tests.factories import record_settings

PROMPTS = "a photo of a [dog]\na [car] and a [cat]\na red [bird]\n"
HERE = Local(workers=1)
ALL = ("images", "maps", "masks")


def sums(run: Run, *artifacts: str) -> dict[str, str]:
    return {
        path.relative_to(run.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for artifact in artifacts or ALL
        for path in sorted(run.folder(artifact).glob("**/*.tar"))
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prompts = tmp_path_factory.mktemp("prompts") / "p.txt"
    prompts.write_text(PROMPTS)
    backbone = Choice("tiny", {"num_steps": 1})
    return {"prompts": str(prompts), "unit_size": 4, "batch_size": 4, "backbone": backbone}


def make(run: Run, given: dict[str, Any], **limits: int) -> Run:
    api.generate(run, engine=HERE, **given, **limits)
    api.masks(run, engine=HERE)
    return run


@pytest.fixture(scope="module")
def nine(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nine images made at once: two units of 4, and one of 1."""
    return make(Run.create(tmp_path_factory.mktemp("runs") / "nine"), given, images_per_prompt=3)


@pytest.fixture(scope="module")
def six_once(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six images made at once: a unit of 4, and one of 2."""
    return make(Run.create(tmp_path_factory.mktemp("runs") / "six"), given, images_per_prompt=2)


@pytest.fixture
def six(six_once: Run, tmp_path: Path) -> Run:
    """A copy of that run, to grow."""
    shutil.copytree(six_once.path, tmp_path / "r")
    return Run.open(tmp_path / "r")


def work_on(run: Run, stage: Generate, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Make unit 1 in this process, after something else was done in the run."""
    with run.claim(stage) as claimed:
        prepared = stage.prepare(claimed)
        meanwhile()
        with prepared.open(claimed, Worker()) as work:
            work(1)


def limit_of(run: Run) -> tuple[int, int]:
    found = [run.artifact(name)["settings"] for name in ("images", "maps")]
    assert found[0] == found[1]
    return found[0]["images_per_prompt"], found[0]["limit"]


@pytest.mark.parametrize("limits", [{"images_per_prompt": 3}, {"images_per_prompt": 5, "limit": 9}])
def test_added_images_equal_those_of_a_run_made_at_once(
    six: Run, nine: Run, given: dict[str, Any], limits: dict[str, int]
) -> None:
    before = sums(six, "images")
    summary = api.generate(six, engine=HERE, **given, **limits)
    assert (summary.units, summary.done_before, summary.samples) == (3, 1, 5)
    assert sums(six, "images", "maps") == sums(nine, "images", "maps")
    assert sums(six, "images")["images/000000.tar"] == before["images/000000.tar"]
    summary = api.masks(six, engine=HERE)
    assert (summary.done_before, summary.samples) == (1, 5)
    assert sums(six) == sums(nine)
    assert limit_of(six) == (limits["images_per_prompt"], limits.get("limit", 0))
    assert api.generate(six, engine=HERE, **given, **limits).samples == 0


def test_a_lifted_limit_adds_the_remaining_images(nine: Run, given: dict[str, Any], tmp_path: Path) -> None:
    run = make(Run.create(tmp_path / "r"), given, images_per_prompt=3, limit=2)
    assert len(list(api.samples(run))) == 2
    make(run, given, images_per_prompt=3, limit=0)
    assert sums(run) == sums(nine)
    assert limit_of(run) == (3, 0)


def test_a_command_without_limits_uses_the_newest_ones(six: Run, nine: Run, given: dict[str, Any]) -> None:
    api.generate(six, engine=HERE, **given, images_per_prompt=3)
    six.tar("images", 2).unlink()
    settings = resume_settings(six, "generate", {"prompts": ""})
    assert settings["images_per_prompt"] == 3
    assert api.generate(six, engine=HERE, **settings).samples == 1
    assert sums(six, "images", "maps") == sums(nine, "images", "maps")


def test_a_smaller_limit_deletes_nothing_and_says_so(
    six: Run, six_once: Run, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert api.generate(six, engine=HERE, **given, images_per_prompt=2, limit=5).samples == 0
    (line,) = [record.getMessage() for record in caplog.records if "more images" in record.getMessage()]
    assert (
        "has more images than the 5 of this command: none is deleted, and commands without a limit go on to 6" in line
    )
    assert sums(six) == sums(six_once)
    assert limit_of(six) == (2, 0)
    api.generate(six, engine=HERE, **given)  # one image of each prompt, which is what settings say by default
    assert limit_of(six) == (2, 0)
    six.tar("images", 1).unlink()
    api.generate(six, engine=HERE, **given, limit=5, images_per_prompt=2)  # its unit is as large as it was
    assert sums(six) == sums(six_once)


@pytest.mark.parametrize("after", ["images", "maps"])
def test_a_kill_between_the_two_tars_of_a_unit_that_grows(
    six: Run, nine: Run, given: dict[str, Any], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = UnitWriter.__exit__

    def leave_and_die(self: UnitWriter, *how: Any) -> None:
        leave(self, *how)
        if self.artifact == after and how[0] is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "__exit__", leave_and_die)
        with pytest.raises(KeyboardInterrupt):
            work_on(six, Generate(**given, images_per_prompt=3).complete())
    counts = [(six.mark(name, 1) or {"count": 0})["count"] for name in ("images", "maps")]
    assert counts == ([4, 0] if after == "images" else [4, 4])
    if after == "images":  # the maps are those of two images
        assert api.masks(six, engine=HERE).units == 1
        with pytest.raises(MissingArtifact, match=r"1 of 2 units .* have neither all masks nor all maps yet"):
            api.shards(six, engine=HERE)
        with pytest.raises(MissingArtifact, match=r"maps/000001\.tar has no maps of 0000010002; run: synthgen gen"):
            list(api.samples(six))
    assert status(six).advice.startswith("synthgen generate --run")
    make(six, given, images_per_prompt=3)
    assert sums(six) == sums(nine)


def test_a_kill_while_growing_leaves_no_maps_of_other_images(
    six: Run, nine: Run, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try makes as many good images as there were, but others; its maps are still to come."""
    add, leave = UnitWriter.add, UnitWriter.__exit__

    def fail_some(self: UnitWriter, key: str, members: Any) -> None:
        if self.artifact == "images" and key in ("0000010001", "0000010003"):
            self.fail(key, "out of memory")
        elif not (self.artifact == "maps" and key in ("0000010001", "0000010003")):
            add(self, key, members)

    def leave_and_die(self: UnitWriter, *how: Any) -> None:
        leave(self, *how)
        if self.artifact == "images" and how[0] is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "add", fail_some)
        patch.setattr(UnitWriter, "__exit__", leave_and_die)
        with pytest.raises(KeyboardInterrupt):
            work_on(six, Generate(**given, images_per_prompt=3).complete())
    assert six.keys("images", 1) == ["0000010000", "0000010002"]
    assert six.keys("maps", 1) == ["0000010000", "0000010001"]
    api.generate(six, engine=HERE, **given, images_per_prompt=3)
    assert six.keys("images", 1) == six.keys("maps", 1)
    assert list(six.read("maps", 1)) == list(nine.read("maps", 1))


def test_a_killed_command_resumes(six: Run, given: dict[str, Any], tmp_path: Path) -> None:
    once = Run.create(tmp_path / "once")
    api.generate(once, engine=HERE, **given, images_per_prompt=8)
    command = [sys.executable, "-m", "synthgen", "generate", "--run", str(six.path), "--workers", "1"]
    process = subprocess.Popen([*command, "--images-per-prompt", "8"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (six.mark("maps", 1) or {"count": 0})["count"] < 4:
        assert process.poll() is None, "the process had ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert limit_of(six) == (8, 0)
    subprocess.run(command, capture_output=True, check=True)
    assert sums(six, "images", "maps") == sums(once, "images", "maps")


@pytest.mark.slow  # two workers are those of test_generate, growth that of the tests above
def test_two_workers_grow_a_run_to_the_same_bytes(six: Run, nine: Run, given: dict[str, Any]) -> None:
    api.generate(six, engine=Local(workers=2), **given, images_per_prompt=3)
    api.masks(six, engine=Local(workers=2))
    assert sums(six) == sums(nine)


@pytest.mark.slow
def test_two_commands_with_different_limits(nine: Run, given: dict[str, Any], tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r")
    command = [
        sys.executable, "-m", "synthgen", "generate", "--prompts", given["prompts"], "--run", str(run.path),
        "--workers", "1", "--steps", "1", "--set", "unit_size=4", "--batch-size", "4", "--images-per-prompt", "3",
    ]  # fmt: skip
    both = [subprocess.Popen([*command, "--limit", limit]) for limit in ("6", "9")]
    assert [process.wait() for process in both] == [0, 0]
    assert sums(run, "images", "maps") == sums(nine, "images", "maps")


@pytest.mark.parametrize("artifact", ["images", "masks"])
def test_fewer_samples_never_replace_more(six: Run, artifact: str) -> None:
    before = six.mark(artifact, 0)
    rows = list(six.read(artifact, 0))
    with six.write(artifact, 0) as unit:
        for key, members in rows[:3]:
            unit.add(key, members)
    assert six.mark(artifact, 0) == before
    assert list(six.read(artifact, 0)) == rows


def test_a_command_that_began_when_less_was_asked_for_keeps_what_another_made(
    six: Run, nine: Run, given: dict[str, Any]
) -> None:
    small = Generate(**given, images_per_prompt=2).complete()
    work_on(six, small, lambda: make(six, given, images_per_prompt=3))
    assert sums(six) == sums(nine)
    assert limit_of(six) == (3, 0)


def test_shards_of_fewer_images_are_refused_and_status_leads_on(six: Run, nine: Run, given: dict[str, Any]) -> None:
    api.shards(six, engine=HERE)
    assert "pretrain" in status(six).advice
    api.generate(six, engine=HERE, **given, images_per_prompt=3)
    found = {one.name: (one.done, one.planned) for one in status(six).artifacts}
    assert found["images"] == found["maps"] == (3, 3)
    assert found["masks"] == (1, 3)
    assert status(six).advice.startswith("synthgen masks --run")
    with pytest.raises(MissingArtifact, match=r"2 of 3 units of .* have not all masks yet \(first: 000001\)"):
        api.shards(six, engine=HERE)
    api.masks(six, engine=HERE)
    folder = six.folder("shards")
    assert status(six).advice.startswith(f"delete {folder} and run: synthgen shards --run")
    with pytest.raises(StaleArtifact) as error:
        api.shards(six, engine=HERE)
    assert str(error.value) == (
        f"{folder} was made differently: the units of images have changed since; the units of masks have changed "
        f"since; choose another --run folder, or delete {folder} to make it anew"
    )
    shutil.rmtree(folder)
    assert api.shards(six, engine=HERE).samples == 9
    assert "pretrain" in status(six).advice


def test_status_counts_a_growing_unit_as_not_done(six: Run, given: dict[str, Any]) -> None:
    record_settings(six, Generate(**given, images_per_prompt=3).complete())
    found = {one.name: (one.done, one.planned, one.samples) for one in status(six).artifacts}
    assert found["images"] == (1, 3, 6)
    assert status(six).advice.startswith("synthgen generate --run")


@pytest.mark.parametrize("made", [6, 8])
def test_growth_that_was_stopped_can_be_given_up(
    six: Run, nine: Run, given: dict[str, Any], made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any) -> Any:
        raise KeyboardInterrupt

    if made == 8:
        work_on(six, Generate(**given, images_per_prompt=3).complete())
    with monkeypatch.context() as patch:
        patch.setattr(Generate, "requests", stop)
        with pytest.raises(KeyboardInterrupt):
            api.generate(six, engine=HERE, **given, images_per_prompt=3)
    assert limit_of(six) == (3, 0)
    for limit in (made, made - 1):  # the second one is fewer than there are
        assert api.generate(six, engine=HERE, **given, images_per_prompt=3, limit=limit).samples == 0
        assert limit_of(six) == (3, made)
    assert status(six).advice.startswith("synthgen shards" if made == 6 else "synthgen masks")
    make(six, given, images_per_prompt=3)
    assert sums(six) == sums(nine)


def test_a_failure_to_grow_is_reported(six: Run, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(Generate, "requests", fail)
        with pytest.raises(UnitsFailed, match="2 of 3 units failed"):
            api.generate(six, engine=HERE, **given, images_per_prompt=3)
    assert set({one.name: one for one in status(six).artifacts}["images"].failures) == {1, 2}
    assert len(list(api.samples(six))) == 6


def test_other_prompts_and_unit_sizes_are_refused(six: Run, given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StaleArtifact, match=r"differently: unit_size is 5 and was 4; use"):
        api.generate(six, engine=HERE, **given | {"unit_size": 5}, images_per_prompt=3)
    (tmp_path / "p.txt").write_text(PROMPTS + "a [cow]\n")
    with pytest.raises(StaleArtifact, match=r"its input 'prompts' has changed"):
        api.generate(six, engine=HERE, **given | {"prompts": str(tmp_path / "p.txt")}, images_per_prompt=3)
    assert limit_of(six) == (2, 0)


def test_a_plan_counts_what_is_missing(six: Run, given: dict[str, Any], tmp_path: Path) -> None:
    settings = {name: value for name, value in given.items() if name != "backbone"} | {
        "images_per_prompt": 3, "backbone": {"name": "tiny", "num_steps": 1},
    }  # fmt: skip
    line = {"run": str(six.path), "seed": 0, "stages": {"generate": settings, "masks": {}, "shards": {}}}
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(line))

    notes: list[str] = []

    def left() -> list[tuple[int, int]]:
        pipeline = read_pipeline(tmp_path / "line.yaml")
        found = count(pipeline, survey_prompts(given["prompts"]), notes)
        return [(one.units_left, one.images_left) for one in found]

    api.shards(six, engine=HERE)
    assert left()[:2] == [(2, 5), (2, 5)]
    assert notes == [f"{six.folder('shards')} has the images made so far; when there are more, delete it first"]
    api.generate(six, engine=HERE, **given, images_per_prompt=3)
    assert left()[:2] == [(0, 0), (2, 5)]
    api.masks(six, engine=HERE)
    with pytest.raises(StaleArtifact, match="the units of images have changed since"):
        left()
    shutil.rmtree(six.folder("shards"))
    assert left() == [(0, 0), (0, 0), (2, 9)]  # train and val


def test_more_images_are_attended(nine: Run, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (generation, _) in enumerate(api.samples(nine)):
        (folder / f"{number}.png").write_bytes(encode_png(generation.image))
        (folder / f"{number}.txt").write_text("a photo of a [dog]\n")
    settings = {"images": str(folder), "unit_size": 4, "timesteps": (50,), "backbone": Choice("tiny")}
    once, grown = Run.create(tmp_path / "once"), Run.create(tmp_path / "grown")
    api.attend(once, engine=HERE, limit=7, **settings)
    api.masks(once, engine=HERE)
    for limit, made in ((6, 6), (7, 3), (5, 0)):
        assert api.attend(grown, engine=HERE, limit=limit, **settings).samples == made
        api.masks(grown, engine=HERE)
    assert sums(grown) == sums(once)
    assert grown.artifact("maps")["settings"]["limit"] == 7
