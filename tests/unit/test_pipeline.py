import pytest

from synthgen.errors import ConfigError, MissingArtifact, PipelineError, UnknownName
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
    pipeline = read_pipeline(path, [("stages.masks.min_area", 0.01), ("seed", 3), ("stages.masks.refine.level", 0.4)])
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
        ("seed: a\nstages: {masks: {}}", PipelineError, "'seed' must be"),
        ("a: [", PipelineError, "not a YAML file"),
        ("- a", PipelineError, "holds no settings"),
        ("stages:\n  masks: {}\n  generate: {prompts: p.txt}", PipelineError, "makes after it; put it first"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path, text, error, says):
    with pytest.raises(error) as caught:
        read_pipeline(write(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_and_stages_that_are_not_there(tmp_path):
    with pytest.raises(MissingArtifact, match="no pipeline file"):
        read_pipeline(tmp_path / "absent.yaml")
    pipeline = read_pipeline(write(tmp_path, GOOD))
    with pytest.raises(UnknownName, match="unknown stage of"):
        pipeline.select(only="shards")
    with pytest.raises(PipelineError, match="swap --from and --to"):
        pipeline.select(first="masks", last="generate")
    with pytest.raises(PipelineError, match="is a name"):
        read_pipeline(write(tmp_path, "stages: {masks: {refine: threshold}}"), [("stages.masks.refine.level", 1.0)])
