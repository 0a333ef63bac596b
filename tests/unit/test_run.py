import errno
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.entries import changes, dump_yaml, merge_settings, read_fingerprint
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact, StorageError, UnitsFailed
from synthgen.options import resume_settings
from synthgen.records import Report
from synthgen.redact import redacted
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import make_stage
from synthgen.stages.pretrain import Pretrain
from synthgen.status import status
from synthgen.stores.tar import create_bytes, is_abandoned, temporary_beside
from tests.factories import Drawn, TrueMasks, make_run, record_settings


def test_a_run_keeps_its_seed(tmp_path):
    Run.create(tmp_path / "r", seed=3)
    assert Run.open(tmp_path / "r").seed == 3
    assert Run.create(tmp_path / "r").seed == 3
    assert Run.create(tmp_path / "r", seed=5).seed == 5  # nothing has been made yet
    make_run(tmp_path / "r", masks=False)
    with pytest.raises(StaleArtifact, match="made with seed 5, not 4"):
        Run.create(tmp_path / "r", seed=4)


def test_a_missing_run_says_how_to_make_one(tmp_path):
    with pytest.raises(MissingArtifact, match="make one with: synthgen generate"):
        Run.open(tmp_path / "absent")


@dataclass(frozen=True)
class Refused:
    """An engine whose units all fail."""

    collective: ClassVar = True

    def map(self, stage, run, units, progress):
        return (Report(unit, error="no") for unit in units)


def test_a_command_that_is_advised_can_be_typed(tmp_path):
    path = tmp_path / "it's a run"
    with pytest.raises(MissingArtifact) as missing:
        Run.open(path)
    with pytest.raises(MissingArtifact) as lacking:
        run_stage(TrueMasks(), Run.create(path), Local(workers=1))
    with pytest.raises(UnitsFailed) as failed:
        run_stage(Drawn(), Run.open(path), Refused())
    for error in (missing, lacking, failed):
        assert shlex.split(f"synthgen {str(error.value).rpartition('synthgen ')[2]}")[-1] == str(path)


def test_a_folder_without_permission_is_a_storage_error(tmp_path, monkeypatch):
    long = tmp_path / ("n" * 300)
    for begin in (Run.open, Run.create, lambda path: Run.create_or_roll_back(path).__enter__()):
        with pytest.raises(StorageError, match=r"\(File name too long\); choose another --run folder"):
            begin(long)
    exists = Path.exists

    def refuses(path, **options):
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refuses)
    with pytest.raises(StorageError, match=r"private/run\.yaml cannot be looked at \(Permission denied\)"):
        Run.open(tmp_path / "private")


@pytest.mark.parametrize("text", ["- a", "seed: x", "a: [", b"\xff"])
def test_a_broken_manifest_is_one_line(tmp_path, text):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        Run.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_settings_over_an_old_folder_are_refused_by_name(tmp_path):
    run = make_run(tmp_path / "r")
    before = run.tar("images", 0).read_bytes()
    with pytest.raises(StaleArtifact, match="unit_size is 7 and was 6"):
        run_stage(Drawn(unit_size=7), run, Local(workers=1))
    assert run.tar("images", 0).read_bytes() == before


def test_other_inputs_are_refused_by_name(tmp_path):
    run = make_run(tmp_path / "r")
    for artifact in ("images", "maps"):
        for path in run.folder(artifact).iterdir():
            path.unlink()
    run_stage(Drawn(units=1), run, Local(workers=1))  # an emptied folder may be made anew
    with pytest.raises(StaleArtifact, match="its input 'images' has changed"):
        run_stage(TrueMasks(), run, Local(workers=1))


def test_a_stage_without_its_input_names_the_one_to_run_first(tmp_path):
    with pytest.raises(MissingArtifact, match="first run: synthgen generate"):
        run_stage(TrueMasks(), Run.create(tmp_path / "r"), Local(workers=1))


def test_done_units_are_skipped(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    dates = {path: path.stat().st_mtime_ns for path in run.folder("images").iterdir()}
    summary = run_stage(Drawn(), run, Local(workers=1))
    assert (summary.done_before, summary.samples) == (2, 0)
    assert dates == {path: path.stat().st_mtime_ns for path in run.folder("images").iterdir()}


@pytest.mark.parametrize("harm", ["tar", "json", "cut"])
def test_a_damaged_unit_is_made_again_to_the_same_bytes(tmp_path, harm):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar("images", 1)
    before = path.read_bytes()
    if harm == "cut":
        path.write_bytes(before[:1000])
    else:
        path.with_suffix(f".{harm}").unlink()
    summary = run_stage(Drawn(), run, Local(workers=1))
    assert summary.samples == 6
    assert path.read_bytes() == before


def test_a_truncated_tar_is_named_with_the_last_whole_key(tmp_path):
    run = make_run(tmp_path / "r")
    path = run.tar("images", 0)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(
        CorruptFile, match=r"images/000000\.tar cannot be read: it is cut off; the last key read is 0000000000"
    ):
        list(run.read("images", 0))


def test_a_tar_that_ends_between_members_is_truncated(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar("maps", 0)
    from synthgen.stores.tar import index_tar

    _, members = index_tar(path)[2]
    path.write_bytes(path.read_bytes()[: members["maps.npz"].offset - 512])
    with pytest.raises(CorruptFile, match="cut off"):
        list(run.read("maps", 0))


# -- several commands on one run


def test_settings_are_recorded_in_the_folder_of_the_artifact(tmp_path):
    run = make_run(tmp_path / "r")
    assert yaml.safe_load((run.path / "run.yaml").read_text()) == {"seed": 0}
    made = yaml.safe_load((run.folder("masks") / "settings.yaml").read_text())
    assert made == run.artifact("masks")
    assert made["inputs"] == {name: run.artifact(name)["fingerprint"] for name in ("images", "maps")}
    assert list(run.artifacts()) == ["images", "maps", "masks"]


def test_other_settings_are_accepted_after_a_failure_that_wrote_nothing(tmp_path):
    run = Run.create(tmp_path / "r")

    def interrupted():
        with run.claim(Drawn()):
            with pytest.raises(StaleArtifact, match="unit_size is 7 and was 6"):  # not while another is about to begin
                run.check(Drawn(unit_size=7))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in run.path.iterdir()] == ["run.yaml"]
    run_stage(Drawn(unit_size=7), run, Local(workers=1))


def test_settings_that_another_command_removes_meanwhile_are_written_again(tmp_path, monkeypatch):
    run, taken_back = Run.create(tmp_path / "r"), {"images"}

    def create(path, data):
        if path.parent.name in taken_back:  # there were some, and now there are none
            taken_back.remove(path.parent.name)
            return False
        return create_bytes(path, data)

    def refused():
        with run.claim(Drawn()) as claimed:
            assert run.find_artifact("images") == claimed.artifact("images")
            raise KeyboardInterrupt

    monkeypatch.setattr("synthgen.run.create_bytes", create)
    with pytest.raises(KeyboardInterrupt):
        refused()
    assert not taken_back
    assert [path.name for path in run.path.iterdir()] == ["run.yaml"]  # so these were ours to take back


def test_a_command_restores_settings_that_the_same_command_elsewhere_removed(tmp_path):
    run = Run.create(tmp_path / "r")

    def fails(second):
        with run.claim(Drawn()):
            second.__enter__()
            raise KeyboardInterrupt

    second = run.claim(Drawn())
    with pytest.raises(KeyboardInterrupt):
        fails(second)
    assert run.find_artifact("images") is None
    second.__exit__(None, None, None)
    assert run.find_artifact("images") is not None


@dataclass(frozen=True)
class Failing(Drawn):
    """Fails on units from ``first`` on."""

    first: int = 0

    @contextmanager
    def open(self, run, worker):
        with super().open(run, worker) as good:

            def work(unit):
                if unit >= self.first:
                    raise ValueError("the pencil broke")
                return good(unit)

            yield work


def test_other_settings_are_accepted_if_all_units_failed(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed, match="2 of 2 units failed"):
        run_stage(Failing(), run, Local(workers=1))
    assert not run.is_nonempty("images")
    assert list(run.failures("images")) == [0, 1]
    assert run.artifact("images")["settings"]["unit_size"] == 6  # for ``status``
    with pytest.raises(UnitsFailed, match="its one unit failed; unit 000000"):
        run_stage(Failing(units=1, unit_size=5), run, Local(workers=1))
    assert list(run.failures("images")) == [0]  # those of the other settings are gone
    with pytest.raises(UnitsFailed, match="1 of 2 units failed"):
        run_stage(Failing(unit_size=4, first=1), run, Local(workers=1))
    with pytest.raises(StaleArtifact, match="unit_size is 5 and was 4"):  # one unit is made
        run_stage(Failing(unit_size=5, first=1), run, Local(workers=1))


def test_the_failure_file_of_a_done_unit_is_ignored(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed):
        run_stage(Failing(first=1), run, Local(workers=1))
    notes = {path: path.read_bytes() for path in run.path.glob("*/000001.failed.json")}
    for name in ("images", "maps"):
        with run.write(name, 1) as unit:
            unit.add("0000010000", {"json": b"{}"})
    for path, data in notes.items():  # the worker was killed before it took them away
        path.write_bytes(data)
    assert len(notes) == 2
    assert run.failures("images") == run.failures("maps") == {}
    assert status(run).num_failed == 0
    run.tar("maps", 1).unlink()
    assert run.failures("maps") == {1: "ValueError: the pencil broke"}
    assert status(run).num_failed == 1


def test_settings_are_kept_while_a_unit_is_written(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed):
        run_stage(Failing(), run, Local(workers=1))
    writing = temporary_beside(run.tar("maps", 0))
    writing.touch()
    with pytest.raises(StaleArtifact, match="unit_size is 5 and was 6"):
        run.check(Failing(unit_size=5))
    writing.unlink()
    (run.folder("images") / "metrics.jsonl").touch()  # a log
    run.check(Failing(unit_size=5))


def test_changes_name_only_the_options_that_differ():
    old = {"refine": {"name": "cut", "smoothness": 2.0, "floor": 0.1}, "min_area": 0.5, "gone": 1}
    new = {"refine": {"name": "cut", "smoothness": 3.0, "floor": 0.1}, "min_area": 0.5, "come": [1]}
    assert list(changes(old, new)) == [
        "refine.smoothness is 3.0 and was 2.0",
        "gone is not set and was 1",
        "come is [1] and was not set",
    ]
    assert list(changes(old, old | {"refine": {"name": "plain"}})) == ["refine is 'plain' and was 'cut'"]


def test_given_settings_replace_recorded_ones():
    before = {"refine": {"name": "cut", "smoothness": 2.0, "floor": 0.1}, "min_area": 0.5}
    assert merge_settings(before, {}) == before
    assert merge_settings(before, {"refine": "cut"}) == before
    assert merge_settings(before, {"refine": {"floor": 0.2}})["refine"] == {
        "name": "cut",
        "smoothness": 2.0,
        "floor": 0.2,
    }
    assert merge_settings(before, {"refine": {"name": "plain", "level": 1}, "min_area": 0}) == {
        "refine": {"name": "plain", "level": 1},
        "min_area": 0,
    }


def test_a_new_run_is_removed_if_its_first_command_fails(tmp_path):
    def failing(folder):
        with Run.create_or_roll_back(folder) as run:
            assert run.path.is_dir()
            raise MissingArtifact("no prompts")

    (tmp_path / "mine").mkdir()
    Run.create(tmp_path / "old")
    for name in ("new", "mine", "old"):
        with pytest.raises(MissingArtifact, match="no prompts"):
            failing(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "old"}
    assert Run.open(tmp_path / "old").seed == 0


def trained(run, folder, **settings):
    """A folder of a training that goes on."""
    entry = {"stage": "pretrain", "settings": Pretrain(**settings).settings(), "inputs": {}, "fingerprint": "f"}
    (run.folder(folder) / "checkpoints").mkdir(parents=True)
    (run.folder(folder) / "checkpoints" / "step-1.safetensors").touch()
    (run.folder(folder) / "settings.yaml").write_text(yaml.safe_dump(entry))
    return entry["settings"]


def test_a_training_resumes_with_the_settings_of_its_folder(tmp_path):
    run = Run.create(tmp_path / "r")
    plain = trained(run, "pretrain/mae", epochs=3, data=("a.tar",))
    named = trained(run, "pretrain/second", method=Choice("vlp", {"region_weight": 2.0}), label="second")
    assert resume_settings(run, "pretrain", {}) == plain
    assert resume_settings(run, "pretrain", {"label": "mae"}) == plain  # its name, and not another label
    assert resume_settings(run, "pretrain", {"method": "mae", "batch_size": 8}) == plain | {"batch_size": 8}
    assert resume_settings(run, "pretrain", {"label": "second"}) == named
    assert resume_settings(run, "pretrain", {"method": "umd", "epochs": 2}) == {"method": "umd", "epochs": 2}
    other = resume_settings(run, "pretrain", {"label": "mae", "method": "vlp"})  # to be refused, in that folder
    assert make_stage("pretrain", other).artifacts() == ("pretrain/mae",)
    assert run.remedy("pretrain/second") == f"synthgen pretrain --label second --run {run.path}"


@dataclass(frozen=True)
class Told(Drawn):
    """Is given what is called as secrets are, and works from files that are called so."""

    method: Choice = Choice("vlp", {"tokenizer": "tokA", "api_key": "x"})
    stamps: ClassVar[dict[str, str]] = {"method.tokenizer": "hash", "tokens": "of data", "secret-santa.tar": "more"}

    def inputs(self, run):
        return self.stamps


def test_tokenizers_and_hashes_are_not_secrets(tmp_path):
    run = Run.create(tmp_path / "r")
    before = run.check(Told())
    assert before["settings"]["method"] == {"name": "vlp", "tokenizer": "tokA", "api_key": "***"}
    assert before["inputs"] == Told.stamps
    other = run.check(Told(method=Choice("vlp", {"tokenizer": "tokB", "api_key": "x"})))
    assert other["fingerprint"] != before["fingerprint"]
    assert run.check(Told(method=Choice("vlp", {"tokenizer": "tokA", "api_key": "y"}))) == before
    names = {"tokenizer": "a", "Tokenizers": "b", "hf_token": "c", "tokenizer_token": "d", "Token": "e"}
    assert redacted(names) == {"tokenizer": "a", "Tokenizers": "b"} | dict.fromkeys(list(names)[2:], "***")


def test_another_stage_seed_or_version_is_named(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    path = run.folder("images") / "settings.yaml"
    entry = yaml.safe_load(path.read_text())
    for change, says in (
        ({"stage": "attend"}, "by attend, not generate; choose another --run folder"),
        ({"seed": 7}, "seed is 0 and was 7; use the same settings, choose another --run folder"),
        ({"stage": "generate"}, "by another version of synthgen; choose another --run folder"),
    ):
        path.write_bytes(dump_yaml(entry | change | {"fingerprint": "0" * 64}))
        with pytest.raises(StaleArtifact) as refused:
            run.check(Drawn())
        assert f"images was made differently: {says}" in str(refused.value)


@pytest.mark.parametrize(
    ("method", "data", "says"),
    [
        ({"tokenizer": "tok", "api_key": "***"}, (), "(***); give it again: --set method.api_key=VALUE"),
        ({}, ("s3://***@bucket/data",), "data was not recorded (***); give it again: --set data=VALUE"),
    ],
)
def test_settings_that_were_not_recorded_must_be_given_again(tmp_path, method, data, says):
    run = Run.create(tmp_path / "r")
    trained(run, "pretrain/vlp", method=Choice("vlp", method), data=data)
    with pytest.raises(ConfigError) as refused:
        resume_settings(run, "pretrain", {"label": "vlp"})
    assert says in str(refused.value)
    given = {"label": "vlp", "method": {"tokenizer": "tok", "api_key": "x"}, "data": ["d.tar"]}
    assert resume_settings(run, "pretrain", given)["method"] == {"name": "vlp", "tokenizer": "tok", "api_key": "x"}


def test_recorded_settings_are_ignored_if_nothing_was_made_with_them(tmp_path):
    run = Run.create(tmp_path / "r")
    trained(run, "pretrain/mae", epochs=3)
    (run.folder("pretrain/mae") / "checkpoints" / "step-1.safetensors").unlink()
    assert resume_settings(run, "pretrain", {"batch_size": 8}) == {"batch_size": 8}
    assert resume_settings(run, "pretrain", {})["epochs"] == 3  # nothing but the run is given


def test_a_claimed_run_keeps_its_settings_in_memory(tmp_path):
    run = Run.create(tmp_path / "r")
    with run.claim(Drawn()) as claimed:
        for name in ("images", "maps"):  # somebody empties the folders and begins anew
            (run.folder(name) / "settings.yaml").unlink()
        write_images(claimed)
        assert run.mark("images", 0)["fingerprint"] == claimed.artifact("images")["fingerprint"]
        assert run.artifact("images") == claimed.artifact("images")  # put back with the unit


def write_images(run, unit=0):
    with run.write("images", unit) as images:
        images.add(f"{unit:06d}0000", {"txt": b"x"})


def all_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_unit_is_written_after_the_settings_were_replaced(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed):
        run_stage(Failing(), run, Local(workers=1))
    again = run.claim(Failing())
    claimed = again.__enter__()
    run_stage(Drawn(unit_size=5), run, Local(workers=1))  # the notes of failures say that nobody is at work
    before = [all_bytes(run.folder(name)) for name in ("images", "maps")]
    with pytest.raises(StaleArtifact, match=r"has given .*images other settings since"):
        write_images(claimed)
    with pytest.raises(StaleArtifact):  # and no note of it either
        claimed.fail(Failing(), Report(0, error="no"))
    with pytest.raises(StaleArtifact):
        again.__exit__(None, None, None)
    assert [all_bytes(run.folder(name)) for name in ("images", "maps")] == before
    assert run.artifact("images")["settings"]["unit_size"] == 5


@dataclass(frozen=True)
class Overtaken(Drawn):
    """Fails at first; while it loads its model again, another command works on the same run with other settings."""

    again: ClassVar[bool] = False
    note: str = "not those of the other"

    @contextmanager
    def open(self, run, worker):
        if self.again:
            run_stage(Drawn(unit_size=5), Run.open(run.path), Local(workers=1))
        with (super() if self.again else Failing()).open(run, worker) as work:
            yield work


def test_replaced_settings_end_a_command_with_one_line(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed):
        run_stage(Overtaken(), run, Local(workers=1))
    monkeypatch.setattr(Overtaken, "again", True)
    with pytest.raises(StaleArtifact, match="choose another --run folder") as refused:
        run_stage(Overtaken(), run, Local(workers=1))
    assert "\n" not in str(refused.value)
    assert {run.mark("images", unit)["fingerprint"] for unit in run.units("images")} == {
        run.artifact("images")["fingerprint"]
    }
    assert not run.failures("images")


@pytest.mark.parametrize("third", [False, True])
def test_removed_settings_are_restored_unless_a_third_command_wrote_others(tmp_path, third):
    run = Run.create(tmp_path / "r")
    first, second = run.claim(Drawn()), run.claim(Drawn())
    first.__enter__()
    claimed = second.__enter__()
    assert not first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert run.find_artifact("images") is None
    if third:
        run_stage(Drawn(unit_size=5), run, Local(workers=1))
        with pytest.raises(StaleArtifact):
            write_images(claimed)
        with pytest.raises(StaleArtifact):  # at the end, for a stage that has no units
            second.__exit__(None, None, None)
    else:
        write_images(claimed)
        with pytest.raises(StaleArtifact, match="unit_size is 5 and was 6"):
            run_stage(Drawn(unit_size=5), run, Local(workers=1))
        second.__exit__(None, None, None)


def test_settings_of_another_command_are_not_removed(tmp_path):
    run = Run.create(tmp_path / "r")
    other = run.check(Drawn(unit_size=5))

    def replaced():
        with run.claim(Drawn()):
            (run.folder("images") / "settings.yaml").write_bytes(dump_yaml(other))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replaced()
    assert run.find_artifact("images") == other
    assert run.find_artifact("maps") is None


def test_settings_that_change_between_check_and_claim_are_refused(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "r")
    other = run.check(Drawn(unit_size=5))

    def create(path, data):
        return create_bytes(path, dump_yaml(other))  # another was first to replace what this one put there

    monkeypatch.setattr("synthgen.run.create_bytes", create)
    with pytest.raises(StaleArtifact), run.claim(Drawn()):
        pytest.fail("it must not begin")
    assert run.find_artifact("images") == other


def test_units_made_with_other_settings_are_refused(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar("images", 1).with_suffix(".json")
    mark = json.loads(path.read_text())
    path.write_text(json.dumps(mark | {"fingerprint": "0" * 64}))
    with pytest.raises(StaleArtifact, match=r"1 of 2 units of .*images were made with other .*\(first: 000001\)"):
        run.units("images")
    assert run_stage(Drawn(), run, Local(workers=1)).samples == 6
    assert run.units("images") == [0, 1]
    path.write_text("no mark")  # the damage is told by whoever reads the unit
    assert run.units("images") == [0, 1]


def test_a_fingerprint_is_found_in_any_yaml(tmp_path):
    path = tmp_path / "settings.yaml"
    assert read_fingerprint(path) is None
    value = {"settings": {"fingerprint": "1" * 64, "text": "a\nfingerprint: " + "2" * 64}, "fingerprint": "a" * 64}
    for data in (dump_yaml(value), json.dumps(value).encode(), dump_yaml(value | {"fingerprint": "0" * 64})):
        path.write_bytes(data)
        assert read_fingerprint(path) == yaml.safe_load(data)["fingerprint"]
    path.write_text("a: 1")
    with pytest.raises(ConfigError, match="no fingerprint of the right type"):
        read_fingerprint(path)


def test_the_first_writer_of_a_unit_wins(tmp_path):
    run = Run.create(tmp_path / "r")
    record_settings(run, Drawn())
    with run.write("images", 0) as late:
        late.add("0000000000", {"txt": b"x"})
        with run.write("images", 0) as early:
            early.add("0000000000", {"txt": b"x"})
        first = {path.name: path.stat().st_mtime_ns for path in run.folder("images").glob("[0-9]*")}
        inode = run.tar("images", 0).stat().st_ino
    assert {path.name: path.stat().st_mtime_ns for path in run.folder("images").glob("[0-9]*")} == first
    assert run.tar("images", 0).stat().st_ino == inode
    assert not list(run.folder("images").glob(".*"))


def test_only_one_of_many_processes_creates_a_file(tmp_path, monkeypatch):
    assert create_bytes(tmp_path / "a", b"first")
    assert not create_bytes(tmp_path / "a", b"second")
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("no links here")))
    assert create_bytes(tmp_path / "b", b"first")
    assert not create_bytes(tmp_path / "b", b"second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"first", "b": b"first"}


def test_without_hard_links_a_new_file_is_renamed(tmp_path, monkeypatch):
    def fail(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert create_bytes(tmp_path / "a", b"first")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_temporary_files_are_removed_only_if_abandoned(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    mine = temporary_beside(tmp_path / "000000.tar")
    mine.touch()
    elsewhere = tmp_path / ".000000.tar.some-other-host.1.abcdef12.tmp"
    elsewhere.touch()
    assert not is_abandoned(mine)
    assert not is_abandoned(elsewhere)
    assert is_abandoned(mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{ended.stdout.strip()}.")))
    os.utime(elsewhere, (time.time() - 90_000,) * 2)
    assert is_abandoned(elsewhere)
    assert is_abandoned(tmp_path / ".000000.tar.4242.tmp")  # of an older version


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has namespaces of processes")
def test_temporary_files_of_another_container_are_not_abandoned(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    name = temporary_beside(tmp_path / "000000.tar").name.replace(f".{os.getpid()}.", f".{ended.stdout.strip()}.")
    there = tmp_path / name.replace(f"-{namespace}.", f"-{namespace + 1}.")
    there.touch()
    assert is_abandoned(tmp_path / name)
    assert not is_abandoned(there)


SCRIPT = """
import sys, time
from pathlib import Path
from synthgen.engines.local import Local
from synthgen.errors import StaleArtifact
from synthgen.run import Run
from synthgen.runner import run_stage
from tests.unit.test_engine import Numbers
from tests.factories import record_settings
from tests.unit.test_run import named
folder, number, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
Path(f"{folder}.{number}.ready").touch()
while not Path(f"{folder}.go").exists():
    time.sleep(0.001)
try:
    if kind == "others":
        record_settings(Run.create(folder), named(number))
    elif kind == "seeds":
        run_stage(Numbers(units=2), Run.create(folder, seed=number), Local(workers=1))
    else:
        run_stage(Numbers(units=6 + (number if kind == "settings" else 0)), Run.create(folder), Local(workers=1))
    print("done")
except StaleArtifact:
    print("refused")
"""


def named(number):
    """A stage of its own name and folder."""
    from tests.unit.test_engine import Numbers

    return type(f"Numbers{number}", (Numbers,), {"name": f"numbers{number}", "writes": (f"numbers{number}",)})()


def at_once(folder, kind, count=3):
    """What so many processes say that begin at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(number), kind], stdout=subprocess.PIPE, text=True
        )
        for number in range(count)
    ]
    while len(list(folder.parent.glob(f"{folder.name}.*.ready"))) < count:
        time.sleep(0.01)
    (folder.parent / f"{folder.name}.go").touch()
    return [process.communicate(timeout=120)[0].strip() for process in processes]


def test_simultaneous_commands_on_different_artifacts_lose_nothing(tmp_path):
    assert at_once(tmp_path / "r", "others") == ["done"] * 3
    assert list(Run.open(tmp_path / "r").artifacts()) == [f"numbers{number}" for number in range(3)]


def test_the_same_command_run_several_times_at_once_makes_the_same_bytes(tmp_path):
    assert at_once(tmp_path / "r", "same") == ["done"] * 3
    run = Run.open(tmp_path / "r")
    alone = Run.create(tmp_path / "alone")
    from tests.unit.test_engine import Numbers

    run_stage(Numbers(units=6), alone, Local(workers=1))
    for unit in range(6):
        assert run.tar("numbers", unit).read_bytes() == alone.tar("numbers", unit).read_bytes()
        assert run.mark("numbers", unit)["sha256"] == alone.mark("numbers", unit)["sha256"]
    assert len(list(run.folder("numbers").iterdir())) == 13


@pytest.mark.parametrize("kind", ["settings", "seeds"])
def test_of_simultaneous_commands_with_different_settings_one_wins(tmp_path, kind):
    told = at_once(tmp_path / "r", kind)
    run = Run.open(tmp_path / "r")
    if kind == "seeds":  # whoever gives an empty run another seed may stop the one that is about to begin, and itself
        assert told.count("done") <= 1
        assert told.count("refused") >= 2
        if "done" not in told:
            assert run.artifacts() == {}
            return
        assert run.seed == told.index("done")
    else:
        assert sorted(told) == ["done", "refused", "refused"]
        assert len(run.units("numbers")) == 6 + told.index("done")
    assert {run.mark("numbers", unit)["fingerprint"] for unit in run.units("numbers")} == {
        run.artifact("numbers")["fingerprint"]
    }


@pytest.mark.parametrize(
    ("artifact", "command"),
    [("maps", "generate --prompts FILE"), ("masks", "masks"), ("filter", "filter"), ("pretrain/mae", "pretrain")],
)
def test_a_missing_artifact_names_the_stage_that_makes_it(tmp_path, artifact, command):
    run = Run.create(tmp_path / "r")
    assert str(run.missing_artifact(artifact)).endswith(f"first run: synthgen {command} --run {run.path}")
