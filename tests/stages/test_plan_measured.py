"""What a plan says of the shipped model is what the run then makes."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from synthgen.api import plan_pipeline, run_pipeline
from synthgen.config import Choice
from synthgen.errors import SynthgenError
from synthgen.plan_text import render
from synthgen.run import Run

LINE = """
run: {folder}/run
stages:
  generate: {{prompts: {folder}/p.txt, images_per_prompt: 4, unit_size: 5, batch_size: 4,
              backbone: {{name: tiny, num_steps: 2}}}}
  masks: {{refine: attentioncut}}
  shards: {{samples_per_shard: 9, val_ratio: 0.2}}
  pretrain: {{epochs: 3, batch_size: 6, save_every: 2, log_every: 2}}
  evaluate: {{}}
"""


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    (folder / "p.txt").write_text("".join(f"a photo of a [{word}]\n" for word in ("dog", "pizza", "car", "bus", "cat")))
    (folder / "line.yaml").write_text(LINE.format(folder=folder))
    return folder / "line.yaml"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made: none of anybody else's are there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_counts_bytes_and_what_is_left_agree_with_the_run(line, temporary):
    run = Run(line.parent / "run")
    planned = plan_pipeline(line, sample=7)
    assert not run.path.exists()
    assert not list(temporary.iterdir())
    generate, masks, shards, pretrain, evaluate = planned.stages
    assert generate.sample == "6 images in 3 rounds"
    assert generate.memory.value > 1e8  # torch and the model
    for stage in (generate, masks, shards, pretrain):
        assert 0 < stage.seconds.low <= stage.seconds.value <= stage.seconds.high
        assert stage.start_seconds > 0
        assert stage.units_left == stage.units
    assert evaluate.seconds is None
    assert planned.seconds.value == pytest.approx(sum(stage.seconds.value for stage in planned.stages[:-1]))
    assert max(map(len, render(planned).splitlines())) <= 100

    done = {summary.stage: summary for summary in run_pipeline(line, engine=Choice("local", {"workers": 1}))}
    for stage in (generate, masks, shards, pretrain):
        assert done[stage.stage].units == stage.units
        assert done[stage.stage].samples == stage.images
        for name, made in stage.bytes.items():
            assert made.value == pytest.approx(size_of(run.folder(name)), rel=0.15), name  # settings and card are small
    assert len(list(run.folder("shards").rglob("*.tar"))) == shards.units
    assert len(list(run.folder("pretrain").rglob("step-*.safetensors"))) == 2

    again = plan_pipeline(line)  # nothing is left, so nothing is measured
    assert [stage.units_left for stage in again.stages] == [0, 0, 0, 0, 0]
    assert again.device == ""
    run.tar("masks", 1).unlink()
    left = {stage.stage: stage.units_left for stage in plan_pipeline(line, measure=False).stages}
    assert (left["generate"], left["masks"]) == (0, 1)


def test_what_cannot_be_drawn_is_told_and_nothing_stays(line, temporary):
    options = (
        ("stages.generate.backbone", {"name": "diffusers", "model": "no/such-model"}),
        ("run", str(line.parent / "x")),
    )
    with pytest.raises(SynthgenError, match="no/such-model") as caught:
        plan_pipeline(line, overrides=options)
    assert "\n" not in str(caught.value)
    assert not list(temporary.iterdir())


def test_the_command_counts_and_prints_json(line):
    command = [sys.executable, "-m", "synthgen", "plan", str(line), "--no-measure", "--json", "--set", "run=elsewhere"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=line.parent)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["images"], found["prompts"], found["stages"][0]["units"]) == (20, 5, 4)
    assert not (line.parent / "elsewhere").exists()
