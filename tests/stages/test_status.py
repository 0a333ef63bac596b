"""Status: what is done, what failed and why, and what to run next, also of damaged runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from synthgen import codecs
from synthgen.engines.local import Local
from synthgen.errors import UnitsFailed
from synthgen.records import Report, WordMasks
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Work, Worker
from synthgen.stages.masks import Masks
from synthgen.stages.shards import Shards
from synthgen.status import Evaluation, RunStatus, Score, Tally, status
from synthgen.status.text import render, scores, short_names
from synthgen.tallies import Tallies
from synthgen.text import duration, size
from tests.factories import Drawn, TrueMasks, make_run


@dataclass(frozen=True)
class Picky(TrueMasks):
    """Fails on unit 1 and drops every square."""

    fail: bool = True

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        with super().open(run, worker) as good:

            def work(unit: int) -> Report:
                if unit == 1 and self.fail:
                    raise ValueError("the disc is not round")
                good(unit)
                found = {key: codecs.decode_masks(key, members) for key, members in run.read("masks", unit)}
                run.tar("masks", unit).with_suffix(".json").unlink()  # what is done is not written again
                labels = {key: codecs.decode_meta(key, members)["label"] for key, members in run.read("images", unit)}
                tallies = Tallies()
                with run.write("masks", unit) as masks:
                    for number, (key, value) in enumerate(found.items()):
                        reason = f"too small: covers 0.{number + 1}1% of the image, less than 0.50%"
                        dropped = tuple(reason if word == "square" else "" for word in value.words)
                        kept = value.values & [[[not one]] for one in dropped]
                        masks.add(key, codecs.encode_masks(WordMasks(value.words, kept, value.scores, dropped)))
                        masks.note("dropped", sum(map(bool, dropped)))
                        tallies.count(labels[key], value.words, dropped)
                    masks.about["tallies"] = tallies.plain()
                return Report(unit, len(found))

            yield work


def masks_of(run: Run, stage: TrueMasks) -> None:
    with pytest.raises(UnitsFailed):
        run_stage(stage, run, Local(workers=1))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "demo", masks=False)


def by_name(state):
    return {artifact.name: artifact for artifact in state.artifacts}


def test_a_new_run_is_advised_to_generate(tmp_path):
    state = status(Run.create(tmp_path / "a run"))
    assert state.artifacts == ()
    assert state.advice == f"synthgen generate --prompts FILE --run '{tmp_path}/a run'"
    assert "next: synthgen generate" in render(state)


def test_done_units_samples_bytes_and_the_next_stage(run):
    state = status(run)
    images = by_name(state)["images"]
    assert (images.stage, images.done, images.planned, images.samples) == ("generate", 2, 2, 12)
    assert images.bytes == sum(run.tar("images", unit).stat().st_size for unit in (0, 1))
    assert images.rate == pytest.approx(12 / images.seconds)
    assert "numpy" in images.versions
    assert state.advice == f"synthgen masks --run {run.path}"
    run_stage(TrueMasks(), run, Local(workers=1))
    assert status(run).advice == f"synthgen shards --run {run.path}"


def test_a_failed_unit_is_named_with_its_reason_and_how_to_retry(run):
    masks_of(run, Picky())
    state = status(run)
    masks = by_name(state)["masks"]
    assert (masks.done, masks.planned, list(masks.failures)) == (1, 2, [1])
    assert "the disc is not round" in masks.failures[1]
    assert state.num_failed == 1
    text = render(state)
    assert "1/2, 1 failed" in text
    assert "failed: masks 000001:" in text
    assert "the disc is not round" in text
    assert "retries the failed unit" in " ".join(text.split())


def test_a_unit_whose_tar_is_gone_or_cut_off_is_not_done(run):
    run.tar("images", 0).unlink()
    with open(run.tar("maps", 1), "ab") as file:
        file.write(b"more")
    artifacts = by_name(status(run))
    assert (artifacts["images"].done, artifacts["maps"].done) == (1, 1)
    assert "processes the remaining unit" in " ".join(render(status(run)).split())


def test_masks_are_counted_by_class_and_word_and_reasons_by_kind(run):
    masks_of(run, Picky())  # unit 0 has disc, square, disc + square, square, disc, disc + square
    state = status(run)
    squares = {"too small": 4}
    assert state.words == (Tally("disc", 4, 4, {}), Tally("square", 4, 0, squares))
    assert state.labels == (Tally("disc", 4, 4, {"too small": 2}), Tally("square", 2, 0, {"too small": 2}))
    assert by_name(state)["masks"].notes == {"dropped": 4}
    assert "masks: 4 kept, 4 dropped (4 too small)" in render(state)
    assert state.dropped == squares
    plain = json.loads(json.dumps(state.plain(), allow_nan=False))
    assert plain["dropped"] == squares
    assert plain["words"][1] == {"name": "square", "samples": 4, "masks": 0, "dropped": squares, "cut_off": 0}
    assert plain["path"] == str(run.path)
    assert status(run, counts=False).words == ()


def test_the_first_dropped_masks_are_named_with_the_place_of_all(run):
    masks_of(run, Picky())
    state = status(run)
    assert [(one.key, one.word, one.reason) for one in state.first_dropped] == [
        (f"000000000{row}", "square", f"too small: covers 0.{row + 1}1% of the image, less than 0.50%")
        for row in (1, 2, 3)
    ]
    text = " ".join(render(state).split())
    assert "dropped: 0000000001 square: too small: covers 0.21% of the image, less than 0.50%" in text
    assert text.count("dropped: 0") == 3
    assert f"dropped in total: 4 masks; the reasons are under dropped in the json of each sample, in {run.path}" in text
    assert state.plain()["first_dropped"][0]["word"] == "square"
    assert status(run, counts=False).first_dropped == ()


def test_words_that_were_cut_off_are_named(tmp_path):
    run = make_run(tmp_path / "run", units=3, unit_size=4, masks=False)
    members = dict(run.read("images", 1))
    run.tar("images", 1).with_suffix(".json").unlink()
    with run.write("images", 1) as images:
        for key, parts in members.items():
            about = json.loads(parts["json"])
            about["words_cut_off"] = ["lamp"] * (key == "0000010002")
            images.add(key, parts | {"json": json.dumps(about).encode()})
    run_stage(Masks(min_area=0.001), run, Local(workers=1))
    state = status(run)
    assert [(one.key, one.word, one.cut_off) for one in state.first_dropped] == [("0000010002", "lamp", True)]
    text = " ".join(render(state).split())
    assert "cut off: 0000010002 lamp: no text encoder reads this far" in text
    assert f"cut off in total: 1 word; they are under words_cut_off in the json of each sample, in {run.path}" in text
    assert "dropped in total" not in text
    assert "lamp 1 0 0 1 cut off" in text  # of the words: samples, masks, dropped, reasons
    kept = by_name(state)["masks"].notes["masks"]
    assert f"{kept} masks, 1 word cut off" in text  # of the stage, and of all masks: the same words
    assert f"masks: {kept} kept, 0 dropped, 1 word cut off" in text


def test_examples_are_sorted_by_key(tmp_path):
    run = make_run(tmp_path / "run", units=3, unit_size=4, masks=False)
    run_stage(Masks(min_area=0.2), run, Local(workers=1))
    state = status(run)
    keys = [one.key for one in state.first_dropped]
    assert len(keys) == 3 < sum(state.dropped.values())
    assert keys == sorted(keys)
    assert "cut off" not in render(state)


def test_samples_left_out_are_named_with_the_place_of_all(tmp_path):
    run = make_run(tmp_path / "run", units=2, unit_size=6, masks=False)
    for unit in (0, 1):
        members = dict(run.read("images", unit))
        run.tar("images", unit).with_suffix(".json").unlink()
        with run.write("images", unit) as images:
            for row, (key, parts) in enumerate(members.items()):
                if row % 3:
                    images.add(key, parts)
                else:
                    images.fail(key, f"photo {unit}{row}.jpg cannot be read")
    state = status(run)
    images = by_name(state)["images"]
    assert images.notes == {"failed samples": 4}
    assert images.left_out == {  # the first few, in order
        "0000000000": "photo 00.jpg cannot be read",
        "0000000003": "photo 03.jpg cannot be read",
        "0000010000": "photo 10.jpg cannot be read",
    }
    text = " ".join(render(state).split())
    assert "left out: generate 0000000003: photo 03.jpg cannot be read" in text
    assert "left out in total: 4 samples; the reasons are under failed in" in text
    assert f"{run.path}/images/NNNNNN.json" in text
    assert json.loads((run.folder("images") / "000001.json").read_text())["failed"].keys() == {
        "0000010000",
        "0000010003",
    }


def test_a_score_of_one_image_has_no_interval(run):
    (run.path / "evaluate").mkdir()
    numbers = {"accuracy": 1.0, "low": None, "high": None}
    (run.path / "evaluate" / "a.json").write_text(json.dumps({"scores": {"mae": {"knn": numbers}}}))
    state = status(run)
    (score,) = state.evaluations[0].scores
    assert score.main == ("accuracy", 1.0)
    assert state.plain()["evaluations"][0]["scores"][0]["values"] == numbers
    assert scores(run)[1].split() == ["a", "mae", "knn", "accuracy", "1", "-"]


def test_many_words_are_a_few_rows_and_all_in_the_json(tmp_path):
    words = tuple(Tally(f"word {number}", 2, 1, {"empty": 1}) for number in range(500))
    state = RunStatus(tmp_path, 0, (), words=words, evaluations=(Evaluation("e", (Score("a", "b", {"c": math.nan}),)),))
    text = render(state)
    assert "masks: 500 kept, 500 dropped (500 empty)" in text
    assert text.count("word ") < 20
    assert "... and 488 more; synthgen status --json has all" in text
    plain = state.plain()
    assert len(plain["words"]) == 500
    assert plain["evaluations"][0]["scores"][0]["values"] == {"c": None}
    json.dumps(plain, allow_nan=False)


def set_mark(run, unit, **values):
    mark = run.tar("masks", unit).with_suffix(".json")
    mark.write_text(json.dumps(json.loads(mark.read_text()) | values))


def test_unreadable_files_are_named_and_the_rest_is_counted(tmp_path):
    run = make_run(tmp_path / "demo", masks=False)
    run_stage(Masks(min_area=0.2), run, Local(workers=1))
    whole = run.tar("masks", 0).read_bytes()
    run.tar("masks", 0).write_bytes(whole[:700].ljust(len(whole), b"x"))
    run.tar("images", 0).with_suffix(".json").write_text("{not json")
    set_mark(run, 1, tallies={"words": 3})
    state = status(run)
    assert any("masks/000000.tar" in problem for problem in state.problems)
    assert any("images/000000.json" in problem for problem in state.problems)
    assert any("masks/000001.json cannot be read" in problem for problem in state.problems)
    assert sum(tally.samples for tally in state.labels) == 6
    assert "problem:" in render(state)


def test_units_of_an_unknown_stage_are_counted_by_its_inputs(run):
    run_stage(TrueMasks(), run, Local(workers=1))
    made = run.artifact("masks") | {"settings": {"gone": 1}, "stage": "masks of old"}
    (run.folder("masks") / "settings.yaml").write_text(json.dumps(made))
    run.tar("masks", 1).with_suffix(".json").unlink()
    masks = by_name(status(run))["masks"]
    assert (masks.done, masks.planned) == (1, 2)


def test_shards_training_and_scores_are_included(tmp_path):
    run = make_run(tmp_path / "demo")
    run_stage(Shards(samples_per_shard=4, val_ratio=0.25), run, Local(workers=1))
    folder = run.path / "pretrain" / "mae"
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step, "note": "text"}) for step in (1, 2, 4)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo']))
    (run.path / "evaluate").mkdir()
    of_knn = {"knn": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "k": 20}}
    evaluation = {"scores": {"mae": of_knn, "pixels": of_knn}, "warnings": ["few images"], "seconds": 2, "seed": 3}
    (run.path / "evaluate" / "mae.json").write_text(json.dumps(evaluation))
    state = status(run)
    shards = by_name(state)["shards"]
    assert shards.done == shards.planned == state.shards.num_shards > 1
    assert shards.samples == sum(state.shards.splits.values()) == 12
    assert shards.bytes == state.shards.bytes
    (training,) = state.training
    assert (training.name, training.done, training.last) == ("mae", False, {"step": 4, "loss": 0.25})
    assert training.curve == ((1, 1), (2, 0.5), (4, 0.25))
    (found,) = state.evaluations
    assert [(score.of, score.evaluator, score.main) for score in found.scores] == [
        ("mae", "knn", ("accuracy", 0.5)),
        ("pixels", "knn", ("accuracy", 0.5)),
    ]
    assert state.advice == f"synthgen pretrain --method mae --run {run.path}"  # that encoder is not finished
    (folder / "done.json").write_text("{}")
    assert status(run).advice.startswith("all stages are done")
    text = render(state)
    assert "0.400 to 0.600" in text
    assert "note on mae: few images" in text
    (run.path / "evaluate" / "other.json").write_text(json.dumps(evaluation | {"warnings": ["few images", "no mask"]}))
    assert scores(run)[-2:] == ["note on mae, other: few images", "note on other: no mask"]
    assert scores(run)[0].split()[:3] == ["evaluation", "model", "evaluator"]
    assert scores(Run.create(tmp_path / "other")) == []


def test_masks_alone_are_no_evaluation_of_an_encoder(tmp_path):
    run = make_run(tmp_path / "demo")
    run_stage(Shards(val_ratio=0.25), run, Local(workers=1))
    run.folder("evaluate").mkdir()
    write_scores(run, "masks", "masks", truth="truth.tar")
    assert status(run).advice == f"synthgen pretrain --method mae --run {run.path}"
    run.folder("pretrain/mae").mkdir(parents=True)
    (run.folder("pretrain/mae") / "done.json").write_text("{}")
    assert status(run).advice == f"synthgen evaluate --run {run.path}"
    write_scores(run, "mae", "mae")
    assert status(run).advice.startswith("all stages are done")
    alone = Run.create(tmp_path / "alone")
    alone.folder("evaluate").mkdir()
    write_scores(alone, "masks", "masks", truth="truth.tar")  # of masks that lie elsewhere
    assert status(alone).advice.startswith("all stages are done")


def write_scores(run, name, of, **settings):
    told = {"scores": {of: {"knn": {"accuracy": 0.5}}}, "settings": {"test": "", "truth": "", **settings}}
    (run.folder("evaluate") / f"{name}.json").write_text(json.dumps(told))


def test_scores_of_several_test_sets_name_them(tmp_path):
    run = Run.create(tmp_path / "demo")
    run.folder("evaluate").mkdir()
    write_scores(run, "first", "mae")
    write_scores(run, "second", "mae")
    assert "test set" not in scores(run)[0]  # they are of one
    write_scores(run, "third", "mae", test="data/photos/val")
    write_scores(run, "masks", "masks", truth="truth.tar")
    head, *rows = scores(run)
    assert head.split()[:5] == ["evaluation", "model", "evaluator", "test", "set"]
    assert [row.split()[3] for row in rows] == ["shards/val", "truth.tar", "shards/val", "photos/val"]
    assert [row.split()[0] for row in scores(run, "third")] == ["evaluation", "third"]  # one has one


def test_paths_are_shortened_to_distinct_endings():
    assert short_names(["a/b/c", "a/b/d"]) == {"a/b/c": "c", "a/b/d": "d"}
    assert short_names(["c", "a/c"]) == {"c": "c", "a/c": "a/c"}
    assert short_names([]) == {}


@pytest.mark.parametrize("name", ["test", "train", "seed", "settings"])
def test_an_encoder_may_have_the_name_of_another_field(run, name):
    (run.path / "evaluate").mkdir()
    scores_of = {name: {"knn": {"accuracy": 0.5}}, "pixels": {"knn": {"accuracy": 0.25}}}
    told = {"scores": scores_of, "seed": 3, "seconds": 2, "settings": {"k": 20}, "test": {"images": 14}}
    (run.path / "evaluate" / "a.json").write_text(json.dumps(told))
    (found,) = status(run).evaluations
    assert [(score.of, score.main[1]) for score in found.scores] == [(name, 0.5), ("pixels", 0.25)]


def test_unknown_files_are_ignored(run):
    for path, text in {
        "evaluate/flat.json": '{"accuracy": 0.25}',
        "evaluate/list.json": "[1, 2]",
        "evaluate/broken.json": "{",
        "shards/dataset.json": '{"splits": {"train": 3, "val": {"rows": 1}}, "shards": 7}',
        "pretrain/empty/config.json": "{}",
    }.items():
        (run.path / path).parent.mkdir(parents=True, exist_ok=True)
        (run.path / path).write_text(text)
    state = status(run)
    assert state.shards.splits == {"train": 3, "val": 0}
    assert [len(one.scores) for one in state.evaluations] == [0, 0, 0]
    assert any("broken.json" in problem for problem in state.problems)
    assert render(state)


def test_a_training_is_one_unit_and_may_fail(run):
    made = run.artifact("images") | {"stage": "pretrain", "settings": {}, "inputs": {}, "fingerprint": "f"}
    folder = run.path / "pretrain" / "mae"
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(json.dumps(made))
    (folder / "000000.failed.json").write_text('{"unit": 0, "error": "the loss is not finite"}')
    state = status(run)
    assert by_name(state)["pretrain/mae"].failures == {0: "the loss is not finite"}
    assert "resumes from its last checkpoint" in state.advice
    (folder / "000000.failed.json").unlink()
    (folder / "encoder.safetensors").write_bytes(b"weights")
    (folder / "done.json").write_text('{"fingerprint": "f", "seconds": 3.5}')
    state = status(run)
    assert (by_name(state)["pretrain/mae"].done, by_name(state)["pretrain/mae"].seconds) == (1, 3.5)
    assert state.training[0].done


def test_an_encoder_of_earlier_shards_is_outdated(tmp_path):
    run = make_run(tmp_path / "demo")
    run_stage(Shards(samples_per_shard=4, val_ratio=0.25), run, Local(workers=1))
    made = run.artifact("shards") | {"stage": "pretrain", "settings": {}, "fingerprint": "f"}
    for name, inputs in {"mae": {"shards": "before"}, "others": {"photos": "p"}}.items():
        folder = run.folder(f"pretrain/{name}")
        folder.mkdir(parents=True)
        (folder / "settings.yaml").write_text(json.dumps(made | {"inputs": inputs}))
        (folder / "encoder.safetensors").write_bytes(b"weights")
        (folder / "done.json").write_text('{"fingerprint": "f"}')
    state = status(run)
    assert [(one.name, one.done, one.outdated) for one in state.training] == [
        ("mae", True, True),
        ("others", True, False),
    ]
    assert "done, on earlier shards" in render(state)
    assert state.advice.startswith("synthgen evaluate")
    shutil.rmtree(run.folder("pretrain/others"))
    assert "--label NAME" in status(run).advice
    current = made | {"inputs": {"shards": run.artifact("shards")["fingerprint"]}}
    (run.folder("pretrain/mae") / "settings.yaml").write_text(json.dumps(current))
    assert status(run).advice.startswith("synthgen evaluate")


def test_the_text_fits_the_console_and_has_no_control_characters(tmp_path):
    run = Run.create(tmp_path / "demo")
    run_stage(Drawn(units=1, unit_size=2), run, Local(workers=1))
    masks_of(run, Broken())
    text = render(status(run))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert not text.endswith("\n")


@dataclass(frozen=True)
class Broken(TrueMasks):
    """Fails with a reason that nobody would want on a console as it is."""

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        def work(unit: int) -> Report:
            raise ValueError("\x1b[2J gone " + "and a long reason " * 20)

        yield work


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (75, "1 min 15 s"), (7265, "2 h 01 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_345_678_901_234, "2346 GB")]
)
def test_sizes(count, text):
    assert size(count) == text


def test_no_torch_is_imported(tmp_path):
    run = make_run(tmp_path / "demo")
    script = (
        "import sys\nfrom synthgen.run import Run\n"
        "from synthgen.status import status\nfrom synthgen.status.text import render\n"
        "render(status(Run.open(sys.argv[1])))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(run.path)], check=True)


def test_done_marks_count_what_the_tars_hold(tmp_path):
    run = make_run(tmp_path / "run", units=3, unit_size=4, masks=False)
    run_stage(Masks(min_area=0.2), run, Local(workers=1))
    masks = [codecs.decode_masks(key, members) for unit in range(3) for key, members in run.read("masks", unit)]
    kept = [word for one in masks for word, reason in zip(one.words, one.dropped, strict=True) if not reason]
    counts = {tally.name: (tally.samples, tally.masks) for tally in status(run).words}
    assert counts == {word: (sum(word in one.words for one in masks), kept.count(word)) for word in ("disc", "square")}
    assert sum(status(run).dropped.values()) == sum(bool(reason) for one in masks for reason in one.dropped) > 0


def test_a_unit_that_failed_on_a_damaged_tar_is_advised_to_remake_the_tar(tmp_path):
    run = make_run(tmp_path / "run", units=3, unit_size=4, masks=False)
    data = bytearray(run.tar("images", 1).read_bytes())
    data[700] ^= 1
    run.tar("images", 1).write_bytes(data)
    masks_of(run, Masks())
    path = run.tar("images", 1)
    assert by_name(status(run))["masks"].damaged == {1: str(path)}
    assert status(run).advice == (
        f"{path} is damaged: delete it, regenerate it with synthgen generate --run {run.path}, "
        f"then run synthgen masks --run {run.path}"
    )
    data[700] ^= 1
    path.write_bytes(data)  # mended: the masks are just made again
    assert "it retries the failed unit" in status(run).advice
    run.tar("images", 1).write_bytes(data)
    (run.folder("masks") / "000001.failed.json").write_text('{"error": "CorruptFile: images/000001.tar is old"}')
    assert "it retries the failed unit" in status(run).advice


def test_one_mark_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """A run may have a million."""
    monkeypatch.setattr("synthgen.status.reading.MAX_JSON", 2**16)  # room for so much is made before one is read
    run = make_run(tmp_path / "run", units=1, unit_size=2)
    for name in ("images", "maps", "masks"):
        tar = run.tar(name, 0)
        mark = json.loads(tar.with_suffix(".json").read_text()) | {"remark": "x" * 20_000}
        for unit in range(200):
            run.tar(name, unit).write_bytes(tar.read_bytes())
            run.tar(name, unit).with_suffix(".json").write_text(json.dumps(mark))
    before = status(run)
    tracemalloc.start()
    found = status(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == before
    assert [(artifact.done, artifact.samples) for artifact in found.artifacts] == [(200, 400)] * 3
    assert peak < 1_000_000  # the marks of one artifact have 4 million characters


@pytest.mark.parametrize("broken", [1, {"words": 3}, {"labels": {}, "words": {"a": {"masks": -1}}}])
def test_invalid_counts_are_not_added(broken):
    tallies = Tallies()
    tallies.count("disc", ["disc", "disc", "square"], ["", "too small: ...", "empty: ..."], ["lamp", "disc"])
    plain = tallies.plain()
    assert plain["words"]["disc"] == {"samples": 1, "masks": 1, "dropped": {"too small": 1}, "cut_off": 1}
    assert plain["words"]["lamp"] == {"samples": 1, "cut_off": 1}
    assert Tallies.from_plain(plain).plain() == plain
    with pytest.raises(ValueError, match="count"):
        Tallies.from_plain(broken)
    tallies.add(Tallies.from_plain(plain))
    assert tallies.labels["disc"] == Tally("disc", 2, 2, {"too small": 2, "empty": 2}, 4)
