"""A plan counts what the run then makes, in little memory, and refuses what the run would be refused for."""

import json
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from synthgen.api import plan_pipeline, plan_stage
from synthgen.codecs import encode_png
from synthgen.engines.accelerate import Accelerate
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingArtifact, PipelineError, PromptError, StaleArtifact
from synthgen.pipeline import read_pipeline
from synthgen.plan import StagePlan, _with_estimates, plan
from synthgen.plan.count import Counts
from synthgen.plan.files import TarFiles
from synthgen.plan.meter import Measurement
from synthgen.plan.sample import Sample, rounds_of
from synthgen.plan.source import survey_copy
from synthgen.plan.text import render
from synthgen.prompt_copy import content_of, ensure_copy, open_copy
from synthgen.prompts import iter_prompts, read_prompts, survey_prompts
from synthgen.run import Run
from synthgen.stages import make_stage
from synthgen.stages._layout import split_of
from synthgen.stores.tar import TarWriter
from tests.factories import record_settings

LINES = "\ufeff# a comment\r\n\r\na [dog] outside\r\n \u3000 \x1f\n  a [cat]  \n#no\n a photo of a [big bus]\n\x0b\n[x]"
ROWS = '{"prompt": "a [dog]"}\n\n{"prompt": "a cat here", "words": ["cat"]}\n'


def write(path, text):
    path.write_bytes(text.encode())
    return path


def pipeline(tmp_path, stages, prompts=LINES):
    write(tmp_path / "p.txt", prompts)
    generate = {"prompts": str(tmp_path / "p.txt"), **stages.pop("generate", {})}
    (tmp_path / "line.yaml").write_text(
        json.dumps({"run": str(tmp_path / "run"), "stages": {"generate": generate, **stages}})
    )
    return tmp_path / "line.yaml"


@pytest.mark.parametrize(("name", "text"), [("p.txt", LINES), ("p.jsonl", ROWS), ("p.txt", "a [dog]\n" * 999)])
@pytest.mark.parametrize("template", [None, "a {} at night\n# no\n\nthe {}\n"])
def test_a_survey_counts_the_prompts_that_are_read(tmp_path, name, text, template):
    path = write(tmp_path / name, text)
    templates = template and write(tmp_path / "t.txt", template)
    found = survey_prompts(path, templates, most=7)
    assert found.count == len(read_prompts(path, templates))
    assert len(found.lines) == len(found.prompts) == min(7, len(read_prompts(path)))


def test_the_lines_of_a_survey_are_evenly_spaced(tmp_path):
    path = write(tmp_path / "p.txt", "".join(f"a [dog{number}]\n" for number in range(1000)))
    numbers = [int(line[6:-1]) for line in survey_prompts(path, most=8).lines]
    assert numbers[0] == 0
    assert {after - before for before, after in pairwise(numbers)} <= set(range(90, 170))
    assert numbers[-1] > 800


def test_characters_across_chunks_are_decoded(tmp_path):
    text = "a [dog] " + "ö" * 30_000 + "\n"  # 60,009 bytes; chunks end inside lines, and some inside a character
    path = write(tmp_path / "p.txt", text * 12)
    assert [prompt.text.count("ö") for prompt in read_prompts(path)] == [30_000] * 12
    write(path, text * 12 + "\n" + "x" * 70_000)
    with pytest.raises(PromptError, match="line 14: it has too many characters"):
        read_prompts(path)
    path.write_bytes(("\ufeff" + text * 6).encode() + b"\xff")
    with pytest.raises(PromptError, match=rf"not UTF-8 \(byte {3 + 6 * len(text.encode())}, 0xff\)"):
        survey_prompts(path)


def test_the_copy_of_a_run_is_surveyed_as_its_file_was(tmp_path):
    lines = [
        {"prompt": "a [dog] on a wo[lf]", "label": "dog"},
        {"prompt": "two [dogs] [dogs] 犬"},
        {"prompt": "x[1] dog", "words": ["dog"]},
        {"prompt": "nothing", "words": []},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(line) for line in lines))
    ensure_copy(tmp_path, iter_prompts(path), content_of(iter_prompts(path)))
    copy = open_copy(tmp_path, content_of(iter_prompts(path)).sha256)
    found = survey_copy(copy)
    assert found.prompts == survey_prompts(path).prompts
    again = write(tmp_path / "again.jsonl", "\n".join(found.lines))
    assert tuple(read_prompts(again)) == found.prompts
    assert (found.count, survey_copy(copy, most=2).prompts) == (4, found.prompts[::2])


def test_a_plan_without_prompts_counts_the_runs_own(tmp_path):
    stages = {"generate": {"images_per_prompt": 3, "unit_size": 5}, "masks": {}, "shards": {}, "pretrain": {}}
    line = pipeline(tmp_path, {**stages, "evaluate": {}})
    own = {"stages.generate.prompts": ""}
    with pytest.raises(MissingArtifact, match="has no prompts yet; give some with: synthgen generate --prompts FILE"):
        plan_pipeline(line, overrides=own, measure=False)
    stage, run = read_pipeline(line).stages[0].complete(), Run.create(tmp_path / "run")
    record_settings(run, stage)
    stage.prepare(run)
    found, again = (plan_pipeline(line, overrides=given, measure=False) for given in ({}, own))
    assert replace(again, disk_free=found.disk_free) == found  # others write to this disk as well
    stage = replace(stage, prompts="")
    sample = Sample(tmp_path, survey_copy(stage.own_prompts(run)), seed=0, most=4, seconds=1)
    assert read_prompts(sample.restrict(stage, 4, 4, 4).prompts) == read_prompts(tmp_path / "p.txt")


def test_counting_prompts_keeps_no_lines_in_memory(tmp_path):
    path = tmp_path / "p.txt"
    with path.open("w") as file:
        file.writelines(
            f"a photo of a [golden retriever] beside a [house number {number}]\n" for number in range(300_000)
        )
    tracemalloc.start()
    found = survey_prompts(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.count == 300_000
    assert path.stat().st_size > 18e6
    assert peak < 4e6


@pytest.mark.parametrize("settings", [{}, {"images_per_prompt": 3}, {"unit_size": 4, "limit": 9}, {"unit_size": 2}])
@pytest.mark.parametrize("template", ["", "a {}\nthe {} at night\n"])
def test_images_and_units_are_those_of_generate(tmp_path, settings, template):
    prompts = write(tmp_path / "p.txt", LINES)
    if template:
        settings = settings | {"template": str(write(tmp_path / "t.txt", template))}
    found = plan_stage("generate", tmp_path / "run", measure=False, prompts=str(prompts), **settings)
    stage = make_stage("generate", {"prompts": str(prompts), **settings})
    run = Run(tmp_path / "run")
    units = stage.plan(run)
    (generate,) = found.stages
    assert (generate.units, generate.units_left) == (len(units), len(units))
    assert generate.images == found.images == sum(stage.size(run, unit) for unit in units)
    assert found.prompts == len(read_prompts(prompts, settings.get("template")))
    assert not run.path.exists()


def test_shards_and_training_steps_are_counted_by_the_split(tmp_path):
    stages = {
        "generate": {"images_per_prompt": 40, "unit_size": 7},
        "masks": {},
        "shards": {"samples_per_shard": 30, "val_ratio": 0.2},
        "pretrain": {"epochs": 3, "batch_size": 16},
    }
    generate, masks, shards, pretrain = plan_pipeline(pipeline(tmp_path, stages), measure=False).stages
    run = Run(tmp_path / "run")
    keys = [f"{number // 7:06d}{number % 7:04d}" for number in range(160)]
    train = sum(split_of(run, key, 0.2) == "train" for key in keys)
    assert (generate.images, generate.units, masks.images, masks.units) == (160, 23, 160, 23)
    assert (shards.images, shards.units) == (160, -(-train // 30) + -(-(160 - train) // 30))
    assert (pretrain.units, pretrain.images) == (1, train // 16 * 16 * 3)


def test_the_split_of_many_images_follows_the_ratio(tmp_path):
    line = pipeline(tmp_path, {"generate": {"images_per_prompt": 10**6}, "masks": {}, "shards": {"val_ratio": 0.1}})
    shards = plan_pipeline(line, measure=False).stages[-1]
    assert (shards.images, shards.units) == (4 * 10**6, 4000)
    assert "val_ratio 0.1" in shards.basis


def test_finished_units_are_not_counted_as_left(tmp_path):
    line = pipeline(tmp_path, {"generate": {"images_per_prompt": 3, "unit_size": 5}, "masks": {}})
    stage = read_pipeline(line).stages[0].complete()
    run = Run.create(tmp_path / "run")
    record_settings(run, stage)
    for unit, count in ((0, 5), (2, 2)):
        for name in stage.artifacts():
            with run.write(name, unit) as tar:
                for row in range(count):
                    tar.add(f"{unit:06d}{row:04d}", {"txt": b"x"})
    with run.write("images", 1) as tar:  # its maps are not there yet
        tar.add("0000010000", {"txt": b"x"})
    generate, masks = plan_pipeline(line, measure=False).stages
    assert (generate.units, generate.units_left, generate.images, generate.images_left) == (3, 1, 12, 5)
    assert (masks.units, masks.units_left, masks.images_left) == (3, 3, 12)
    with pytest.raises(StaleArtifact, match="unit_size"):
        plan_pipeline(line, overrides={"stages.generate.unit_size": 6}, measure=False)
    with pytest.raises(StaleArtifact, match="seed 0, not 1"):
        plan_pipeline(line, overrides={"seed": 1}, measure=False)
    write(tmp_path / "p.txt", "a [horse]\n" * 4)
    with pytest.raises(StaleArtifact, match="prompts"):
        plan_pipeline(line, measure=False)


@pytest.mark.parametrize(
    ("stages", "prompts", "error", "says"),
    [
        ({"generate": {"prompts": "absent.txt"}}, LINES, MissingArtifact, "there is no prompt file absent.txt"),
        ({}, "# nothing\n", PromptError, "holds no prompt"),
        ({}, "ok\na [dog\n", PromptError, "line 2: a '\\[' is not closed"),
        ({"generate": {"template": "t.txt"}}, LINES, MissingArtifact, "no template file"),
        ({"masks": {}, "pretrain": {}}, LINES, PipelineError, "stages.pretrain reads shards"),
        ({"generate": {"unit_size": 1, "images_per_prompt": 10**6}}, LINES, ConfigError, "unit_size of .* to 4 or"),
        ({"pretrain": {"data": ["absent.tar"]}}, LINES, MissingArtifact, "absent.tar"),
    ],
)
def test_a_plan_is_refused_for_the_same_reasons_as_the_run(tmp_path, stages, prompts, error, says):
    with pytest.raises(error, match=says) as caught:
        plan_pipeline(pipeline(tmp_path, dict(stages), prompts), measure=False)
    assert "\n" not in str(caught.value)


def test_a_training_may_start_from_an_unfinished_earlier_one(tmp_path):
    with TarWriter(tmp_path / "data.tar") as tar:
        for row in range(8):
            tar.add(f"{row:010d}", {"png": encode_png(np.zeros((32, 32, 3), np.uint8)), "txt": b"a"})
    first = {"data": [str(tmp_path / "data.tar")], "epochs": 2, "batch_size": 4}
    start = str(tmp_path / "run" / "pretrain" / "mae")
    line = pipeline(tmp_path, {"pretrain": [first, {**first, "method": "contrastive", "start": start}]})
    for _ in range(2):  # without a run, and with one
        one, other = plan_pipeline(line, measure=False).stages[1:]
        assert (one.images_left, other.images_left) == (16, 16)
        assert other.basis == f"counted; begins with {start}"
        if not (tmp_path / "run").exists():
            Run.create(tmp_path / "run")
    line = pipeline(tmp_path, {"pretrain": {**first, "start": f"{start}s"}})
    with pytest.raises(MissingArtifact, match=r"there is no encoder in .*pretrain/maes"):
        plan_pipeline(line, measure=False)


def test_a_pipeline_without_images_is_refused(tmp_path):
    (tmp_path / "line.yaml").write_text(f"run: {tmp_path}\nstages: {{masks: {{}}}}\n")
    with pytest.raises(PipelineError, match="has neither generate nor attend"):
        plan_pipeline(tmp_path / "line.yaml")


def test_the_bytes_of_tars_are_exact(tmp_path):
    files = TarFiles((2048.0,), beside=100.0, beside_each=3.0)
    for count in (1, 4, 5, 50):
        with TarWriter(tmp_path / f"{count}.tar") as tar:
            for row in range(count):
                tar.add(f"{row:010d}", {"a": b"x" * 512, "b": b"y" * 100})
        real = (tmp_path / f"{count}.tar").stat().st_size
        assert files.total({count: 2}, 2048.0) == 2 * (real + 100 + 3 * count)
    assert files.total({5: 2, 1: 1}, 2048.0) == 2 * files.total({5: 1}, 2048.0) + files.total({1: 1}, 2048.0)


@pytest.mark.parametrize(
    ("arguments", "batch", "rounds"),
    [
        ((16, 48, 48, "cpu"), 16, 3),
        ((16, 48, 7, "cpu"), 2, 3),
        ((16, 48, 1, "cpu"), 1, 1),
        ((16, 48, 0, "cpu"), 1, 1),
        ((16, 48, 20, "cuda:0"), 16, 1),  # memory depends on the batch: it is the pipeline's own, however long it takes
        ((16, 6, 6, "cuda:0"), 6, 1),
    ],
)
def test_a_sample_is_as_large_as_time_allows(arguments, batch, rounds):
    assert rounds_of(*arguments) == (batch, rounds)


TOOK = Measurement((1.0, 2.0, 6.0), 12, 4, 5.0, "cpu", 10**9)


def estimated(stage, counts, engine, workers=0):
    unmeasured = make_plan(counts, stage)
    return _with_estimates(unmeasured, stage, counts, TOOK, engine, workers)


def make_plan(counts, stage):
    numbers = (counts.units, counts.units_left, counts.images, counts.images_left)
    return StagePlan(stage.name, stage.artifacts(), *numbers, "counted")


def test_hours_are_for_what_is_left_and_workers_share_whole_units(monkeypatch):
    monkeypatch.setattr("synthgen.plan.devices_for", lambda stage: ["cpu"] * 4)
    counts = Counts(11, 10, 350, 320, {32: 10, 30: 1})
    found = estimated(make_stage("masks", {}), counts, Local())
    assert (found.seconds.value, found.seconds.low, found.seconds.high) == (320 * 3 + 5, 320 + 5, 320 * 6 + 5)
    assert found.workers == 4
    assert found.at_best_seconds.value == 3 * 32 * 3 + 5  # ten units among four: one has three
    assert found.seconds.basis == "extrapolated from 12 images in 3 rounds"
    more = estimated(make_stage("masks", {}), counts, Local(), workers=8)  # eight on four cores are no faster
    assert (more.workers, more.at_best_seconds) == (8, found.at_best_seconds)
    many = estimated(make_stage("masks", {}), counts, Accelerate(), workers=40)
    assert (many.workers, many.at_best_seconds.value) == (40, 32 * 3 + 5)


def test_a_training_is_one_worker_unless_processes_share_its_steps(monkeypatch):
    monkeypatch.setattr("synthgen.plan.devices_for", lambda stage: ["cpu"] * 4)
    counts = Counts(1, 1, 1000, 1000, batch_size=8)
    stage = make_stage("pretrain", {"batch_size": 8})
    assert estimated(stage, counts, Local(workers=4)).at_best_seconds.value == 3005
    assert estimated(stage, counts, Accelerate(), workers=4).at_best_seconds.value == 755
    assert "in batches of 4; those of the pipeline are of 8" in estimated(stage, counts, Local()).memory.basis


def test_a_plan_is_rendered_as_text_and_json(tmp_path, monkeypatch):
    monkeypatch.setattr("synthgen.plan.devices_for", lambda stage: ["cpu"] * 4)
    line = pipeline(tmp_path, {"masks": {}, "shards": {"val_ratio": 0.5}, "pretrain": {}, "evaluate": {}})
    found = plan(read_pipeline(line), measure=False)
    told = json.loads(json.dumps(found.plain()))
    assert [stage["stage"] for stage in told["stages"]] == ["generate", "masks", "shards", "pretrain", "evaluate"]
    assert told["seconds"] is None
    assert "to test on" in render(found)
    counts = Counts(3, 3, 12, 12, {5: 2, 2: 1})
    whole = estimated(make_stage("masks", {}), counts, Local())
    reason = "of 5 images in 2 rounds, " * 8
    found = replace(found, stages=(replace(whole, basis=reason),), device="cpu")
    found = replace(found, seconds=whole.seconds, at_best_seconds=whole.at_best_seconds)
    text = render(found)
    assert "41 s" in text
    assert "All times include the start of a worker (masks 5.0 s)" in " ".join(text.split())
    assert "do not slow each other down" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    assert reason.strip() not in text
    assert reason.strip() in render(found, whole=True), "a pipe has no edge"
