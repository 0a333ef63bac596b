"""The filter stage, and what shards and exports do with its list."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from synthgen import api, codecs
from synthgen.__main__ import main
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, PipelineError, StaleArtifact, UnknownName
from synthgen.filters.duplicate import Duplicate, perceptual_hash
from synthgen.rejected import count_rejected, read_rejected
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Worker, make_stage
from synthgen.stages.filter import Filter
from synthgen.stages.shards import Packer, Shards, _layout
from synthgen.status import status
from synthgen.status.text import render
from synthgen.stores.tar import read_tar
from tests.factories import make_run
from tests.models import make_clip


def run_filter(run, *, workers=1, **settings):
    return run_stage(Filter(**settings), run, Local(workers=workers))


def images_of(run):
    return {
        key: codecs.decode_image(key, members)[1]
        for unit in run.units("images")
        for key, members in run.read("images", unit)
    }


def files_of(run):
    names = [*run.folder("filter").glob("*.tar"), run.folder("filter") / "rejected.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def test_filters_apply_in_order_over_the_whole_run(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    assert run_filter(run, filters=(Choice("duplicate"),)).samples == 12
    figures = {key: f"{perceptual_hash(image):016x}" for key, image in images_of(run).items()}
    expected = Duplicate().reject(figures.items())
    assert len(expected) == 7
    assert expected["0000010004"].startswith("it looks like 0000000000: 0 of 64")
    assert read_rejected(run) == {key: f"duplicate: {reason}" for key, reason in sorted(expected.items())}


def test_a_filter_does_not_see_what_an_earlier_one_rejected(tmp_path):
    run = make_run(tmp_path / "r", distinct=3)
    deviations = [image.std(axis=(0, 1)).max() for image in list(images_of(run).values())[:3]]
    between = float(np.sort(deviations)[:2].mean())  # one of the three images, which come four times each, is blank
    run_filter(run, filters=(Choice("blank", {"min_std": between}), Choice("duplicate")))
    rejected = read_rejected(run)
    blank = [key for key, reason in rejected.items() if reason.startswith("blank: ")]
    assert [int(key) % 10 % 3 for key in blank] == [int(np.argmin(deviations))] * 4
    assert count_rejected(rejected.values()) == {"duplicate": 6, "blank": 4}


def test_without_filters_that_read_masks_none_are_needed(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    with pytest.raises(MissingArtifact, match="synthgen masks"):
        run_filter(run)
    assert run_filter(run, filters=(Choice("blank"),)).units == 2
    assert read_rejected(run) == {}


def test_workers_batches_and_a_second_call_change_no_byte(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    run_filter(one)
    run_filter(two, workers=2, batch_size=4)
    assert files_of(one) == files_of(two)
    assert run_filter(one).done_before == 2
    assert files_of(one) == files_of(two)


def test_other_settings_on_old_figures_are_refused(tmp_path):
    run = make_run(tmp_path / "r")
    run_filter(run)
    with pytest.raises(StaleArtifact, match="filters is"):
        run_filter(run, filters=(Choice("blank"),))


def test_a_run_that_has_grown_is_filtered_again(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a [dog]\na [cat]\n")
    given = {"prompts": str(prompts), "unit_size": 4, "backbone": Choice("tiny", {"num_steps": 1})}
    filters = (Choice("duplicate", {"max_distance": 7}), Choice("blank", {"min_std": 127.0}))
    runs = {}
    for name, growth in (("grown", (3, 6)), ("at once", (6,))):
        run = runs[name] = Run.create(tmp_path / name)
        for limit in growth:
            api.generate(run, engine=Local(workers=1), images_per_prompt=3, limit=limit, **given)
            if limit == 6 and len(growth) > 1:
                with pytest.raises(MissingArtifact, match="has not seen all images"):
                    read_rejected(run)
            run_filter(run, filters=filters)
            assert len(read_rejected(run)) == limit
    assert files_of(runs["grown"]) == files_of(runs["at once"])


def test_a_killed_filter_is_finished_by_the_next_call(tmp_path):
    run = make_run(tmp_path / "r")
    run_filter(run)
    whole = files_of(run)
    (run.folder("filter") / "rejected.json").unlink()  # killed before its end
    run.tar("filter", 1).unlink()
    with pytest.raises(MissingArtifact, match="run: synthgen filter --run"):
        read_rejected(run)
    assert run_filter(run).samples == 6
    assert files_of(run) == whole


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"units": "", "rejected": {"0000000000": 1}}', b'{"rejected": {}}'])
def test_a_damaged_list_is_named(tmp_path, damage):
    run = make_run(tmp_path / "r")
    run_filter(run)
    (run.folder("filter") / "rejected.json").write_bytes(damage)
    with pytest.raises(CorruptFile, match=r"rejected.json cannot be read; delete it and run: synthgen filter"):
        read_rejected(run)


@pytest.mark.slow
def test_a_list_of_millions_of_rejected_samples_is_read_again(tmp_path):
    run = make_run(tmp_path / "r")
    run_filter(run, filters=(Choice("blank", {"min_std": 127.0}),))
    path = run.folder("filter") / "rejected.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"{", b"{" + b" " * 2**28, 1))  # as long as about three million reasons
    assert len(read_rejected(run)) == 12


def test_wrong_settings_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'blank'"):
        make_stage("filter", {"filters": ["blnak"]}).complete()
    with pytest.raises(ConfigError, match="each filter once"):
        make_stage("filter", {"filters": ["blank", "blank"]})
    with pytest.raises(ConfigError, match="at least one of blank, clip, duplicate"):
        make_stage("filter", {"filters": []})
    with pytest.raises(ConfigError, match="batch_size"):
        make_stage("filter", {"batch_size": 0})


def test_only_filters_with_a_network_ask_for_gpus(tmp_path):
    assert not Filter().accelerated
    assert Filter(filters=(Choice("clip", {"model": "x"}),)).accelerated


def test_clip_compares_images_with_their_prompts(tmp_path):
    run, folder = make_run(tmp_path / "r"), make_clip(tmp_path / "clip")
    run_filter(run, filters=(Choice("clip", {"model": str(folder), "min_similarity": 0.0}),))
    figures = {key: json.loads(members["json"])["clip"] for unit in (0, 1) for key, members in run.read("filter", unit)}
    assert len(figures) == 12
    assert sorted(read_rejected(run)) == sorted(key for key, figure in figures.items() if figure < 0)


# -- shards


def shards_of(run, **settings):
    """Keys by split, and the manifest, of shards that are packed now."""
    api.shards(run, engine=Local(workers=1), val_ratio=0.0, **settings)
    tars = sorted(run.folder("shards").glob("*/*.tar"))
    return [key for tar in tars for key, _ in read_tar(tar)], json.loads(
        (run.folder("shards") / "dataset.json").read_text()
    )


def test_shards_leave_out_rejected_samples(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    run_filter(run, filters=(Choice("duplicate"),))
    keys, manifest = shards_of(run)
    assert sorted(keys) == sorted(images_of(run).keys() - read_rejected(run).keys())
    assert len(keys) == 5
    assert manifest["rejected"] == {"duplicate": 7}
    assert manifest["splits"]["train"]["samples"] == 5
    assert manifest["made_from"]["filter"]["filters"][0]["name"] == "duplicate"
    card = (run.folder("shards") / "README.md").read_text()
    assert "7 of 12 images" in card
    assert "duplicate (7)" in card


def test_a_filter_that_rejects_nothing_changes_no_shard(tmp_path):
    run = make_run(tmp_path / "r")
    before = shards_of(run)
    run_filter(run, filters=(Choice("blank"),))
    assert read_rejected(run) == {}
    assert shards_of(run) == before


def test_shards_can_hold_rejected_samples(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    run_filter(run, filters=(Choice("duplicate"),))
    keys, manifest = shards_of(run, filtered=False)
    assert len(keys) == 12
    assert manifest["rejected"] == {}


def test_shards_of_before_the_filter_are_refused(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    shards_of(run)
    run_filter(run, filters=(Choice("duplicate"),))
    with pytest.raises(StaleArtifact, match="rejected samples"):
        shards_of(run)


def test_shards_of_a_half_filtered_run_are_refused(tmp_path):
    run = make_run(tmp_path / "r")
    run_filter(run)
    (run.folder("filter") / "rejected.json").unlink()
    with pytest.raises(MissingArtifact, match=r"the filter of .* has not seen all images; run: synthgen filter"):
        shards_of(run)


def test_a_filter_of_other_masks_is_refused(tmp_path):
    run = make_run(tmp_path / "r")
    run_filter(run)
    shutil.rmtree(run.folder("masks"))
    api.masks(run, min_area=0.01, engine=Local(workers=1))
    with pytest.raises(StaleArtifact, match=r"the masks of .* are not those that were filtered; delete .*filter"):
        shards_of(run)
    assert any("are not those that were filtered" in problem for problem in status(run).problems)


@pytest.mark.parametrize("change", ["unit", "filter"])
def test_shards_keep_to_the_samples_they_were_started_with(tmp_path, monkeypatch, change):
    """Whatever is generated or filtered while shards are packed."""
    run = make_run(tmp_path / "r", units=4, distinct=5)
    for name in ("images", "masks"):
        run.tar(name, 3).with_suffix(".json").rename(tmp_path / f"{name}.json")
    run_filter(run, filters=(Choice("duplicate"),))
    pack = Packer.pack

    def pack_and_change(self, shard, tick):
        pack(self, shard, tick)
        if change == "filter":
            shutil.rmtree(run.folder("filter"), ignore_errors=True)
        else:
            for name in ("images", "masks"):
                path = tmp_path / f"{name}.json"
                if path.exists():
                    path.rename(run.tar(name, 3).with_suffix(".json"))

    monkeypatch.setattr(Packer, "pack", pack_and_change)
    stage = Shards(val_ratio=0.0, samples_per_shard=2)
    with run.claim(stage) as claimed:
        stage = stage.prepare(claimed)
        layout = stage.layout(claimed)
        assert sum(map(len, layout)) == 5
        with stage.open(claimed, Worker()) as work:
            for unit in stage.plan(claimed):
                work(unit)
        _layout.cache_clear()  # as in a worker that starts later
        assert stage.layout(claimed) == layout
        if change == "unit":
            stage.finish(claimed)
            assert json.loads((run.folder("shards") / "dataset.json").read_text())["rejected"] == {"duplicate": 13}


def test_a_run_whose_images_are_all_rejected_has_no_shards(tmp_path):
    run = make_run(tmp_path / "r")
    run_filter(run, filters=(Choice("blank", {"min_std": 127.0}),))
    with pytest.raises(MissingArtifact, match=r"every image of .* is rejected"):
        shards_of(run)


# -- the other readers of a run


def test_exports_leave_out_rejected_samples(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    run_filter(run, filters=(Choice("duplicate"),))
    assert api.export_dataset(run, "labels", tmp_path / "few").samples == 5
    kept = {path.stem for path in (tmp_path / "few").rglob("*.png")}
    assert kept == images_of(run).keys() - read_rejected(run).keys()
    assert api.export_dataset(run, "labels", tmp_path / "all", filtered=False).samples == 12
    with pytest.raises(StaleArtifact, match="filtered is False and was True"):
        api.export_dataset(run, "labels", tmp_path / "few", filtered=False)


def test_status_and_view_show_what_was_rejected(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    run_filter(run, filters=(Choice("duplicate"),))
    (artifact,) = [artifact for artifact in status(run).artifacts if artifact.name == "filter"]
    assert (artifact.done, artifact.planned, artifact.samples) == (2, 2, 12)
    assert artifact.notes == {"rejected by duplicate": 7}
    text = render(status(run))
    assert "left out: filter 0000000005: duplicate: it looks like 0000000000: 0 of 64 bits" in text
    assert f"left out in total: 7 samples; the reasons are in {run.path}/filter/rejected.json" in " ".join(text.split())
    assert "rejected by the filter duplicate: it looks like 0000000000" in api.view(run).read_text()
    run.tar("filter", 1).unlink()
    assert (
        status(run).advice
        == f"synthgen filter --run {run.path}, with the same settings as before: it processes the remaining unit"
    )


def test_training_shards_of_before_a_filter_are_warned_of(tmp_path, caplog):
    run = make_run(tmp_path / "r", distinct=5)
    shards_of(run)
    run_filter(run, filters=(Choice("duplicate"),))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "were packed without this filter" in warning


def test_shards_that_keep_rejected_samples_are_not_warned_of(tmp_path, caplog):
    run = make_run(tmp_path / "r", distinct=5)
    shards_of(run, filtered=False)
    run_filter(run, filters=(Choice("duplicate"),))
    assert len(read_rejected(run)) == 7
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_pipeline_filters_before_it_packs(tmp_path):
    run = make_run(tmp_path / "r", distinct=5)
    line = tmp_path / "line.yaml"
    line.write_text(f"run: {run.path}\nstages: {{filter: {{filters: [duplicate]}}, shards: {{val_ratio: 0.0}}}}\n")
    api.run_pipeline(line)
    assert json.loads((run.folder("shards") / "dataset.json").read_text())["splits"]["train"]["samples"] == 5
    line.write_text(f"run: {run.path}\nstages: {{shards: {{}}, filter: {{}}}}\n")
    with pytest.raises(
        PipelineError, match=r"stages.shards uses filter, which stages.filter makes after it; put it first"
    ):
        api.run_pipeline(line)


def test_the_command_names_filters_and_counts(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "r", distinct=5)

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["synthgen", "filter", "--run", str(run.path), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code, err) == (0, "")
        return out.splitlines()

    first = command("--filter", "blank", "--filter", "duplicate")
    assert first[-1] == "rejected: 7 of 12 samples (duplicate 7)"
    assert command() == ["filter: nothing to do, all 2 units were done", first[-1]]
