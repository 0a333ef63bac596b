import pytest
from PIL import Image

from synthgen import api
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingArtifact, PipelineError, SynthgenError, UnknownName
from synthgen.pipeline import read_pipeline

GOOD = """
run: {run}
stages:
  generate: {{prompts: prompts/demo.txt, limit: 4}}
  masks: {{refine: {{name: threshold}}}}
"""


def write(tmp_path, text):
    path = tmp_path / "line.yaml"
    path.write_text(text.format(run=tmp_path / "r") if "{run}" in text else text)
    return path


def test_stages_and_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    pipeline = read_pipeline(path, {"stages.masks.min_area": 0.01, "seed": 3, "stages.masks.refine.level": 0.4})
    assert [stage.name for stage in pipeline.stages] == ["generate", "masks"]
    assert pipeline.stages[1].min_area == 0.01
    assert pipeline.stages[1].refine.options == {"level": 0.4}
    assert pipeline.seed == 3
    assert [stage.name for stage in pipeline.select(last="generate").stages] == ["generate"]
    assert [stage.name for stage in pipeline.select(only="masks").stages] == ["masks"]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("stages: {mask: {}}", UnknownName, "did you mean 'masks'"),
        (
            "stages: {masks: {min_aera: 1.0}}",
            ConfigError,
            "stages.masks.min_aera: unknown setting; did you mean 'min_area'",
        ),
        ("stages: {masks: 3}", PipelineError, "must hold settings"),
        ("stage: {masks: {}}", UnknownName, "did you mean 'stages'"),
        ("run: x", PipelineError, "'stages' must name"),
        ("stages: [masks]", PipelineError, "'stages' must name a stage with its settings, as masks: {};"),
        ("masks: {}\nstages: {masks: {}}", PipelineError, "'masks' is a stage; its settings are those of stages.masks"),
        ("seed: a\nstages: {masks: {}}", PipelineError, "'seed' must be"),
        ("a: [", PipelineError, "not a YAML file"),
        ("run: $HOME/x\nstages: {masks: {}}", ConfigError, "'$HOME/x' begins with a variable or home directory that"),
        ("run: ''\nstages: {masks: {}}", ConfigError, "the run folder has no name"),
        ("- a", PipelineError, "has no settings"),
        ("stages:\n  masks: {}\n  generate: {prompts: p.txt}", PipelineError, "makes after it; put it first"),
    ],
)
def test_errors_in_a_file_are_named_with_their_place(tmp_path, text, error, says):
    with pytest.raises(error) as caught:
        read_pipeline(write(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_stages_are_named(tmp_path):
    with pytest.raises(MissingArtifact, match="no pipeline file"):
        read_pipeline(tmp_path / "absent.yaml")
    pipeline = read_pipeline(write(tmp_path, GOOD))
    with pytest.raises(UnknownName, match="unknown stage of"):
        pipeline.select(only="shards")
    with pytest.raises(PipelineError, match="swap --from and --to"):
        pipeline.select(first="masks", last="generate")
    with pytest.raises(ConfigError, match="--only masks and --from generate ask for different stages; give one of"):
        pipeline.select(only="masks", first="generate")
    with pytest.raises(ConfigError, match="--only generate and --to masks ask for different stages"):
        pipeline.select(only="generate", last="masks")
    with pytest.raises(PipelineError, match="is a name"):
        read_pipeline(write(tmp_path, "stages: {masks: {refine: threshold}}"), {"stages.masks.refine.level": 1.0})


SEVERAL = """
stages:
  shards: {}
  pretrain:
    - &first {label: a, method: {name: mae}, epochs: 2}
    - {<<: *first, label: b}
"""


def test_a_stage_may_occur_several_times(tmp_path):
    path = write(tmp_path, SEVERAL)
    pipeline = read_pipeline(path, {"stages.pretrain.epochs": 5, "stages.pretrain.method.mask_ratio": 0.5})
    assert [stage.name for stage in pipeline.stages] == ["shards", "pretrain", "pretrain"]
    assert [stage.label for stage in pipeline.stages[1:]] == ["a", "b"]
    assert [stage.epochs for stage in pipeline.stages[1:]] == [5, 5]
    assert [stage.method.options["mask_ratio"] for stage in pipeline.stages[1:]] == [0.5, 0.5]
    assert [stage.label for stage in pipeline.select(only="pretrain").stages] == ["a", "b"]
    assert [stage.label for stage in pipeline.select(first="pretrain").stages] == ["a", "b"]
    assert [stage.name for stage in pipeline.select(last="shards").stages] == ["shards"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: {masks: []}", "is an empty list"),
        ("stages: {masks: [{}, 3]}", "must hold settings, not 3"),
        ("stages: {pretrain: [{}, {}]}", "both make pretrain/mae; give each a label"),
        ("stages: {masks: [{}, {}]}", "stages.masks and stages.masks both make masks"),
    ],
)
def test_invalid_lists_of_a_stage_are_refused(tmp_path, text, says):
    with pytest.raises(PipelineError, match=says):
        read_pipeline(write(tmp_path, text))


@pytest.mark.parametrize(
    "line",
    [
        "stages: {{generate: {{prompts: {at}/absent.txt}}, masks: {{}}}}",
        "stages: {{generate: {{prompts: {at}/good.txt, template: {at}/absent.txt}}}}",
        "stages: {{generate: {{prompts: {at}/bad.txt}}}}",
        "stages: {{generate: {{prompts: ''}}}}",
        "stages: {{attend: {{images: {at}/absent}}}}",
        "stages: {{attend: {{images: {at}/photos, metadata: {at}/absent.jsonl}}}}",
        "stages: {{attend: {{images: {at}/photos}}}}",
        "stages: {{masks: {{}}}}",
        "stages: {{pretrain: {{data: [{at}/absent.tar]}}}}",
        "stages: {{pretrain: {{data: [{at}/empty]}}}}",
        "stages: {{pretrain: {{data: [{at}/photos], start: {at}/absent/mae}}}}",
        "stages: {{evaluate: {{truth: {at}/absent.tar, evaluators: [mask_iou]}}}}",
        "stages: {{evaluate: {{encoder: {at}/absent/mae, train: {at}/photos, test: {at}/photos}}}}",
        "stages: {{evaluate: {{encoder: {at}/empty, train: {at}/photos, test: {at}/photos}}}}",
        "engine: bogus\nstages: {{generate: {{prompts: {at}/good.txt}}}}",
        "engine: {{name: local, bogus: 1}}\nstages: {{generate: {{prompts: {at}/good.txt}}}}",
    ],
)
def test_a_dry_run_is_refused_as_the_run_would_be(tmp_path, line):
    (tmp_path / "good.txt").write_text("a [dog]\n")
    (tmp_path / "bad.txt").write_text("a [dog]\na [cat\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos" / "dog").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "dog" / "a.png")
    pipeline = read_pipeline(write(tmp_path, f"run: {tmp_path}/r\n{line.format(at=tmp_path)}"))
    with pytest.raises(SynthgenError) as checked:
        pipeline.dry_run()
    assert not (tmp_path / "r").exists()
    with pytest.raises(SynthgenError) as refused:
        list(pipeline.execute())
    assert (type(checked.value), str(checked.value)) == (type(refused.value), str(refused.value))
    assert "\n" not in str(checked.value)


def test_trainings_that_are_not_evaluated_are_named(tmp_path):
    import os

    from tests.factories import make_run

    run, line = make_run(tmp_path / "run"), tmp_path / "line.yaml"
    for number, name in enumerate(("a", "b", "c")):
        run.folder(f"pretrain/{name}").mkdir(parents=True)
        (run.folder(f"pretrain/{name}") / "done.json").write_text("{}")
        (run.folder(f"pretrain/{name}") / "encoder.safetensors").write_bytes(b"x")
        (run.folder(f"pretrain/{name}") / "config.json").write_text("{}")
        os.utime(run.folder(f"pretrain/{name}") / "done.json", (number, number))

    def notes(evaluate, trainings="[{label: a}, {label: b}]"):
        line.write_text(f"run: {run.path}\nstages: {{shards: {{}}, pretrain: {trainings}, evaluate: {evaluate}}}")
        pipeline = read_pipeline(line)
        return [note for stage in pipeline.stages if (note := pipeline.unevaluated(stage))]

    (note,) = notes("{}", "[{label: c}, {label: a}, {label: b}]")
    assert note.startswith(f"evaluate: of the trainings of {line} this is c, which ended last, and not a, b; for all")
    assert f"evaluate: [{{encoder: {run.path}/pretrain/c}}, {{encoder: {run.path}/pretrain/a}}, " in note
    assert notes("{}", "{label: c}") == []
    each = ", ".join(f"{{encoder: {run.path}/pretrain/{name}}}" for name in ("a", "b"))
    assert notes(f"[{each}]") == []
    assert notes(f"[{each}, {{}}]") == []
    assert notes("{truth: t.tar, evaluators: [mask_iou]}") == []


def test_an_unreadable_file_is_not_reported_as_invalid_yaml(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / ("n" * 300), "File name too long")):
        with pytest.raises(PipelineError, match=f"cannot be read: {why}; give a pipeline file"):
            read_pipeline(path)


def test_home_directories_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a [dog]\n")
    pipeline = read_pipeline(write(tmp_path, "run: ~/r\nstages: {generate: {prompts: ~/p.txt}}"), {"seed": 1})
    assert pipeline.run == tmp_path / "r"
    assert pipeline.stages[0].prompts == str(tmp_path / "p.txt")
    assert len(pipeline.dry_run()) == 2
    assert read_pipeline(pipeline.path, {"run": "~/other"}).run == tmp_path / "other"


@pytest.mark.parametrize(("run", "data"), [("r", "{at}/r/shards"), ("{at}/r", "r/shards"), ("x/../r", "r/shards")])
def test_paths_in_the_run_are_recognised_in_any_form(tmp_path, monkeypatch, run, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("a [dog]\n")
    (tmp_path / "line.yaml").write_text(
        f"run: {run.format(at=tmp_path)}\nstages:\n  generate: {{prompts: good.txt}}\n  masks: {{}}\n  shards: {{}}\n"
        f"  pretrain: {{data: [{data.format(at=tmp_path)}]}}\n"
    )
    assert len(read_pipeline(tmp_path / "line.yaml").dry_run()) == 5


def test_a_dry_run_does_not_check_outputs_of_its_stages_or_hub_models(tmp_path):
    (tmp_path / "good.txt").write_text("a [dog]\n")
    run = tmp_path / "r"
    (tmp_path / "line.yaml").write_text(
        f"run: {run}\nstages:\n  generate: {{prompts: {tmp_path}/good.txt}}\n  masks: {{}}\n  shards: {{}}\n"
        f"  pretrain: {{start: some/vit}}\n"
        f"  evaluate: {{encoder: {run}/pretrain/mae, train: {run}/shards/train, test: {run}/shards/val}}\n"
    )
    assert read_pipeline(tmp_path / "line.yaml").dry_run()[:3] == [
        f"run: {run}",
        f"generate: {tmp_path}/good.txt -> images, maps",
        "masks: images, maps -> masks",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.txt", "line.yaml"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"name": "local", "workers": 3}),
        ({}, {"name": "local", "workers": 3}),
        ("local", {"name": "local", "workers": 3}),
        ({"workers": 2}, {"name": "local", "workers": 2}),
        ({"name": "local", "workers": 2}, {"name": "local", "workers": 2}),
        ("accelerate", {"name": "accelerate"}),
        ({"name": "ray", "workers": 2}, {"name": "ray", "workers": 2}),
        (Choice("local"), {"name": "local"}),
    ],
)
def test_an_engine_keeps_the_options_of_the_file(tmp_path, given, expected):
    pipeline = read_pipeline(write(tmp_path, "engine: {name: local, workers: 3}\n" + GOOD.format(run=tmp_path / "r")))
    assert pipeline.resolve_engine(given).dump() == expected
    engine = Local(workers=1)
    assert pipeline.resolve_engine(engine) is engine


def test_a_run_and_a_dry_run_have_the_engine_of_the_file_with_its_options(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a [dog]\n")
    path = write(
        tmp_path,
        f"run: {tmp_path}/r\nengine: {{name: local, workers: 1}}\nstages:\n"
        f"  generate: {{prompts: {tmp_path}/p.txt, backbone: {{num_steps: 1}}}}\n",
    )
    engines, units = [], Local.map
    monkeypatch.setattr(Local, "map", lambda self, *given: engines.append(self) or units(self, *given))
    api.run_pipeline(path, engine="local")
    assert engines == [Local(workers=1)]
    with pytest.raises(ConfigError, match="workers"):
        read_pipeline(path, {"engine.workers": -1}).dry_run("local")
    with pytest.raises(ConfigError, match="workers"):
        list(read_pipeline(path, {"engine.workers": -1}).execute(engine="local"))
    assert len(read_pipeline(path, {"engine.workers": -1}).dry_run(Choice("local"))) == 2
