"""What options and ``--set`` ask for together: never dropped in silence, and never a traceback."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import pytest

from synthgen import api
from synthgen.errors import ConfigError
from synthgen.methods import METHODS
from synthgen.options import (
    apply_set,
    backbone_settings,
    check_conflicts,
    export_settings,
    method_settings,
    resolve_settings,
)
from synthgen.pipeline import Pipeline
from synthgen.run import Run
from synthgen.runner import Summary
from synthgen.stages import make_stage
from tests.factories import record_settings


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run of 8 images in units of 4, of which the second is not made yet; its prompts are p.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a [dog]\na [cat]\n")
    stage = make_stage("generate", {"prompts": "p.txt", "images_per_prompt": 4, "unit_size": 4}).complete()
    run = Run.create(tmp_path / "run")
    record_settings(run, stage)
    for name in stage.artifacts():
        with run.write(name, 0) as tar:
            for row in range(4):
                tar.add(f"000000000{row}", {"txt": b"x"})
    return run


def told_by(monkeypatch, capsys, *arguments):
    """What the command line says: output, and what it says in one line of error."""
    from synthgen.__main__ import main

    monkeypatch.setattr(sys, "argv", ["synthgen", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code == 2) == bool(told.err), told.err
    assert told.err.count("\n") <= 1
    return told.out, told.err


PLAN = ["plan", "--no-measure", "--prompts", "p.txt"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["masks", "--set", "run=x"], "stages.masks.run: unknown setting"),
        (["masks", "--set", "progress=1"], "stages.masks.progress: unknown setting"),
        (["pretrain", "--set", "run=x"], "stages.pretrain.run: unknown setting"),
        (["export", "--format", "coco", "--set", "run=x"], "export.run: unknown setting"),
        (["export", "--format", "coco", "--set", "folder=x"], "export.folder: unknown setting"),
        (["export", "--format", "coco", "--set", "progress=1"], "export.progress: unknown setting"),
        (["export", "--format", "coco", "--set", "qualty=1"], "did you mean 'quality'"),
        (["export", "--format", "coco", "--set", "format=yolo"], "--format coco and --set format=yolo ask for two"),
        (["export", "--format", "tar"], "export.format: "),
        ([*PLAN, "--set", "run=x"], "stages.generate.run: unknown setting"),
        ([*PLAN, "--set", "stage=x"], "stages.generate.stage: unknown setting"),
        ([*PLAN, "--set", "sample=3"], "stages.generate.sample: unknown setting"),
        ([*PLAN, "--set", "measure=true"], "stages.generate.measure: unknown setting"),
        ([*PLAN, "--set", "engine.wokers=1"], "did you mean 'workers'"),
        ([*PLAN, "--set", "engine=3"], "expected a part's name"),
        ([*PLAN, "--set", "unit_size=3"], "unit_size is 3 and was 4"),
        (["masks", "--min-area", "0.01", "--set", "min_area=0.02"], "--min-area 0.01 and --set min_area=0.02 ask for"),
        (["masks", "--attentioncut", "--set", "refine=threshold"], "--refine attentioncut and --set refine=threshold"),
        (["masks", "--workers", "2", "--set", "engine.workers=3"], "--workers 2 and --set engine.workers=3 ask for"),
        (["generate", "--steps", "5", "--set", "backbone={num_steps: 6}"], "two values of backbone.num_steps"),
        (["evaluate", "--evaluator", "knn", "--evaluator", "retrieval", "--set", "evaluators=[{name: knn, k: 3}]"],
         "--evaluator knn, retrieval and --set evaluators=[{name: knn, k: 3}] ask for two values of evaluators; give"),
        (["evaluate", "--encoder", "a", "--set", "encoder=b"], "--encoder a and --set encoder=b"),
        ([*PLAN, "--engine", "local", "--set", "engine=ray"], "--engine local and --set engine=ray"),
        ([*PLAN, "--workers", "2", "--set", "engine.workers=3"], "--workers 2 and --set engine.workers=3"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(monkeypatch, capsys, begun, arguments, says):
    out, err = told_by(monkeypatch, capsys, *arguments, "--run", begun.path)
    assert says in err
    assert not out


def test_conflicting_options_of_a_pipeline_are_one_line(monkeypatch, capsys, begun):
    (begun.path.parent / "line.yaml").write_text(
        f"run: {begun.path}\nstages: {{generate: {{prompts: p.txt}}, masks: {{}}}}"
    )
    for command in ("run", "plan"):
        given = [command, "line.yaml", "--engine", "local", "--set", "engine.name=ray"]
        assert "--engine local and --set engine.name=ray ask for two" in told_by(monkeypatch, capsys, *given)[1]
    _, err = told_by(monkeypatch, capsys, "run", "line.yaml", "--only", "masks", "--from", "generate")
    assert err == "synthgen: --only masks and --from generate ask for different stages; give one of them\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["masks", "--run", ""], "the run folder has no name; give one"),
        (["status", ""], "the run folder has no name; give one"),
        (["doctor", "--run", ""], "the run folder has no name; give one"),
        ([*PLAN, "--run", ""], "the run folder has no name; give one"),
        (["masks", "--run", "$HOME/r"], "'$HOME/r' begins with a variable or home directory that"),
        (["masks", "--run=~/r"], "there is no run at {at}/r; "),
        (["status", "run s"], "make one with: synthgen generate --prompts FILE --run 'run s'\n"),
        (["masks", "--run", "n" * 300], "cannot be looked at (File name too long); choose another --run folder"),
        (["generate", "--prompts", "n" * 300], "cannot be read: File name too long; give a file with --prompts FILE"),
        (["run", "n" * 300], "cannot be read: File name too long; give a pipeline file"),
        (["generate", "--prompts", "p.txt", "--template", "n" * 300], "cannot be read: File name too long"),
    ],
)
def test_invalid_paths_are_one_line(monkeypatch, capsys, begun, arguments, says):
    monkeypatch.setenv("HOME", str(begun.path.parent))
    assert says.format(at=begun.path.parent) in told_by(monkeypatch, capsys, *arguments)[1]
    assert {path.name for path in begun.path.parent.iterdir()} <= {"p.txt", "run", "runs"}


def test_errors_of_the_system_are_one_line_and_bugs_are_not(monkeypatch, capsys, begun):
    """Permissions count for nothing where tests run as root."""
    refused = [PermissionError(13, "Permission denied", f"{begun.path}/x")]

    def look(run):
        raise refused[0]

    monkeypatch.setattr(import_module("synthgen.status"), "status", look)
    err = told_by(monkeypatch, capsys, "status", begun.path)[1]
    assert err == f"synthgen: {begun.path}/x: Permission denied; fix this, or give another path\n"
    for refused[0] in (FileNotFoundError(2, "No such file or directory", "x"), OSError("bug"), ValueError("bug")):
        with pytest.raises(AssertionError, match="Traceback"):
            told_by(monkeypatch, capsys, "status", begun.path)


def test_a_plan_of_a_file_is_for_its_run_or_the_given_one(monkeypatch, capsys, begun):
    line = "run: elsewhere\nstages: {generate: {prompts: p.txt, images_per_prompt: 4, unit_size: 4}}"
    (begun.path.parent / "line.yaml").write_text(line)
    given = ["plan", "line.yaml", "--no-measure", "--json"]
    for options, left in (
        ([], 2),
        (["--run", begun.path], 1),
        (["--set", f"run={begun.path}"], 1),
        (["--run", begun.path, "--set", f"run={begun.path}"], 1),
    ):
        (generate,) = json.loads(told_by(monkeypatch, capsys, *given, *options)[0])["stages"]
        assert generate["units_left"] == left
    for command in (given, ["run", "line.yaml"]):
        _, err = told_by(monkeypatch, capsys, *command, "--run", "a", "--set", "run=b")
        assert err == "synthgen: --run a and --set run=b ask for two values of run; give one of them\n"


def test_a_pipeline_runs_on_the_given_run(monkeypatch, capsys, begun):
    line = "run: elsewhere\nstages: {generate: {prompts: p.txt, images_per_prompt: 4, unit_size: 4}}"
    (begun.path.parent / "line.yaml").write_text(line)
    out, _ = told_by(monkeypatch, capsys, "run", "line.yaml", "--dry-run", "--run", begun.path)
    assert out.startswith(f"run: {begun.path}\n")
    out, _ = told_by(monkeypatch, capsys, "run", "line.yaml", "--dry-run")
    assert out.startswith("run: elsewhere\n")


def test_a_note_on_a_stage_follows_its_line(monkeypatch, capsys, begun):
    line = f"run: {begun.path}\nstages: {{generate: {{prompts: p.txt}}, masks: {{}}}}"
    (begun.path.parent / "line.yaml").write_text(line)
    done = [Summary("generate", units=1, done_before=1), Summary("masks", units=1, done_before=1)]
    monkeypatch.setattr(Pipeline, "execute", lambda self, **given: iter(done))
    monkeypatch.setattr(Pipeline, "unevaluated", lambda self, stage: "only\x1b some" if stage.name == "masks" else "")
    out, _ = told_by(monkeypatch, capsys, "run", "line.yaml")
    lines = [f"{name}: nothing to do, the one unit was done" for name in ("generate", "masks")]
    assert out.splitlines() == [*lines, "note: only  some"]


def test_a_pipeline_names_its_results_as_single_commands_do(monkeypatch, capsys, begun):
    stages = "shards: {}, pretrain: {label: a}, evaluate: {truth: t.tar, evaluators: [mask_iou], label: b}"
    (begun.path.parent / "line.yaml").write_text(f"run: {begun.path}\nstages: {{{stages}}}")
    done = [Summary(name, units=1, done_before=1) for name in ("shards", "pretrain", "evaluate")]
    monkeypatch.setattr(Pipeline, "execute", lambda self, **given: iter(done))
    out, _ = told_by(monkeypatch, capsys, "run", "line.yaml")
    assert out.splitlines()[1::2] == [
        f"shards: {begun.path}/shards",
        f"encoder: {begun.path}/pretrain/a",
        f"scores: {begun.path}/evaluate/b.json",
    ]


def test_a_plan_without_a_run_is_for_the_default_run_or_a_new_one(monkeypatch, capsys, begun):
    """It writes nothing, so that other settings than those of runs/latest are no reason to refuse it."""
    (begun.path.parent / "runs").mkdir()
    begun.path.rename(begun.path.parent / "runs" / "latest")
    plan = json.loads(told_by(monkeypatch, capsys, *PLAN, "--json")[0])
    assert (plan["run"], plan["stages"][0]["units_left"], plan["notes"]) == ("runs/latest", 1, [])
    (begun.path.parent / "other.txt").write_text("a [horse]\n")
    (begun.path.parent / "runs" / "new-1").mkdir()
    for prompts, options, images in (("other.txt", [], 1), ("p.txt", ["--set", "unit_size=3"], 2)):
        given = ["plan", "--no-measure", "--prompts", prompts, *options]
        plan = json.loads(told_by(monkeypatch, capsys, *given, "--json")[0])
        assert (plan["run"], plan["images"], plan["stages"][0]["units_left"]) == ("runs/new-2", images, 1)
        assert plan["notes"][0].startswith("runs/latest was made with other settings or inputs, so this plan is for a")
        assert "made differently" in told_by(monkeypatch, capsys, *given, "--run", "runs/latest")[1]
    assert not (begun.path.parent / "runs" / "new-2").exists()


def test_a_plan_resumes_a_run_as_generate_does(monkeypatch, capsys, begun):
    out, err = told_by(monkeypatch, capsys, *PLAN, "--json", "--run", begun.path, "--set", "engine.workers=1")
    (generate,) = json.loads(out)["stages"]
    numbers = ("units", "units_left", "images", "images_left")
    assert ([generate[name] for name in numbers], err) == ([2, 1, 8, 4], "")
    settings = resolve_settings(begun, "generate", {"prompts": "p.txt", "template": "", "backbone": None}, None)[1]
    begun.check(make_stage("generate", settings).complete())  # nor does that refuse it
    new = told_by(monkeypatch, capsys, *PLAN, "--json", "--run", "new", "--set", "unit_size=3")[0]
    assert [stage["units"] for stage in json.loads(new)["stages"]] == [1]
    assert not (begun.path.parent / "new").exists()


def test_a_run_whose_units_all_failed_accepts_other_settings(begun, monkeypatch, capsys):
    for name in ("images", "maps"):
        for path in begun.folder(name).glob("000000.*"):
            path.unlink()
        (begun.folder(name) / "000000.failed.json").write_text('{"error": "no"}')
    out, _ = told_by(monkeypatch, capsys, *PLAN, "--json", "--run", begun.path, "--set", "unit_size=1")
    assert [stage["units_left"] for stage in json.loads(out)["stages"]] == [2]
    settings = resolve_settings(begun, "generate", {"prompts": "p.txt"}, ["unit_size=1"])[1]
    begun.check(make_stage("generate", settings).complete())


def test_the_engine_of_a_plan_is_that_of_the_run(monkeypatch, capsys, begun):
    seen = []
    plan = api.plan_stage
    monkeypatch.setattr(
        api, "plan_stage", lambda *given, **options: seen.append(options["engine"]) or plan(*given, **options)
    )
    told_by(monkeypatch, capsys, *PLAN, "--run", begun.path, "--set", "engine={name: local, workers: 3}")
    assert [engine.dump() for engine in seen] == [{"name": "local", "workers": 3}]
    seen.clear()
    (begun.path.parent / "line.yaml").write_text(
        f"run: {begun.path}\nengine: {{name: local, workers: 3}}\n"
        "stages: {generate: {prompts: p.txt, images_per_prompt: 4, unit_size: 4}}"
    )
    planned = import_module("synthgen.plan")
    check = planned.check_engine
    monkeypatch.setattr(planned, "check_engine", lambda stage, engine: seen.append(engine) or check(stage, engine))
    api.plan_pipeline("line.yaml", engine="local", measure=False)
    api.plan_pipeline("line.yaml", engine="accelerate", measure=False)
    assert [engine.dump() for engine in seen] == [{"name": "local", "workers": 3}, {"name": "accelerate"}]


@pytest.mark.parametrize(
    ("given", "extra"),
    [
        ({"min_area": 0.01}, ["min_area=1e-2"]),
        ({"min_area": None, "limit": 4}, ["min_area=0.02"]),
        ({"refine": {"name": "threshold"}}, ["refine=threshold", "refine.level=0.5"]),
        ({"refine": {"name": "threshold"}}, ["refine={level: 0.5}"]),
        ({"evaluators": ["knn"]}, ["evaluators=[knn]"]),
        ({"template": ""}, ["template=t.txt"]),
        ({"engine": {}}, ["engine=ray"]),
    ],
)
def test_an_option_and_set_may_give_the_same_value(given, extra):
    check_conflicts(given, extra)


def test_options_and_set_are_merged_within_a_part():
    assert apply_set({"refine": {"name": "threshold"}}, ["refine={level: 0.5}"]) == {
        "refine": {"name": "threshold", "level": 0.5}
    }
    assert apply_set({"encoder": "small"}, ["encoder={depth: 2}"]) == {"encoder": {"name": "small", "depth": 2}}
    assert apply_set({"backbone": {"num_steps": 5}}, ["backbone=tiny"]) == {
        "backbone": {"num_steps": 5, "name": "tiny"}
    }
    assert resolve_settings(None, "masks", {}, ["engine=ray"], {"workers": 2})[0].dump() == {
        "workers": 2,
        "name": "ray",
    }
    assert export_settings("coco", None, ["rle=true", "format=coco"]) == {"rle": True}


def test_implied_parts_yield_to_named_ones():
    assert backbone_settings(None, ["backbone=tiny"], model="m") == {
        "name": "tiny",
        "model": "m",
    }  # which tiny then refuses
    assert backbone_settings(None, None, model="m") == {"name": "diffusers", "model": "m"}
    assert backbone_settings(None, None, model=None) is None
    guided = method_settings(None, True, None, ["method.name=vlp", "method.region_weight=2.0"])
    assert guided == {"method": {"name": "vlp", **METHODS.load("vlp").guided}, "label": "vlp-guided"}
    assert apply_set(guided, ["method.region_weight=2.0"])["method"]["region_weight"] == 2.0
    labelled = method_settings("mae", True, None, ["label=mine"])
    assert apply_set(labelled, ["label=mine"])["label"] == "mine"
    with pytest.raises(ConfigError, match=r"--method mae and --set method=vlp ask for two values of method.name"):
        method_settings("mae", True, None, ["method=vlp"])
