import pytest

from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptShard, MissingArtifact, StaleArtifact
from synthgen.run import Run
from synthgen.runner import run_stage
from tests.factories import Drawn, TrueMasks, make_run


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


@pytest.mark.parametrize("text", ["- a", "seed: x\nartifacts: {}", "seed: 1", "a: [", b"\xff"])
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


def test_what_is_done_is_not_done_again(tmp_path):
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
        CorruptShard, match=r"images/000000\.tar cannot be read: it is cut off; the last key read is 0000000000"
    ):
        list(run.read("images", 0))


def test_a_tar_that_ends_between_members_is_cut_off_too(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar("maps", 0)
    from synthgen.stores.tar import index_tar

    _, members = index_tar(path)[2]
    path.write_bytes(path.read_bytes()[: members["maps.npz"].offset - 512])
    with pytest.raises(CorruptShard, match="cut off"):
        list(run.read("maps", 0))
