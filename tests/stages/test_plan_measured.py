"""What a plan says of the shipped model is what the run then makes."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from synthgen.api import plan_pipeline, run_pipeline
from synthgen.codecs import masks_to_labels
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import SynthgenError
from synthgen.image import encode_png
from synthgen.plan.count import EvalCounts
from synthgen.plan.evaluate import measure_evaluation
from synthgen.plan.meter import Meter
from synthgen.plan.sample import Sample
from synthgen.plan.source import ImageSurvey, survey_images
from synthgen.plan.text import render
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.pretrain import Pretrain
from synthgen.stages.shards import Shards
from synthgen.stores.tar import TarWriter
from tests.factories import make_generation, make_run

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


@pytest.mark.slow
def test_counts_bytes_and_remaining_work_agree_with_the_run(line, temporary):
    run = Run(line.parent / "run")
    planned = plan_pipeline(line, sample=7)
    assert not run.path.exists()
    assert not list(temporary.glob("synthgen-*"))
    generate, _, shards, _, evaluate = planned.stages
    assert generate.sample == "6 images in 3 rounds"
    assert generate.memory.value > 1e8  # torch and the model
    for stage in planned.stages:
        assert 0 < stage.seconds.low <= stage.seconds.value <= stage.seconds.high
        assert stage.start_seconds > 0
        assert stage.units_left == stage.units
    assert "of at most 200 steps" in evaluate.seconds.basis
    assert "retrieval: left out" in evaluate.seconds.basis
    assert planned.seconds.value == pytest.approx(sum(stage.seconds.value for stage in planned.stages))
    assert max(map(len, render(planned).splitlines())) <= 100

    done = {summary.stage: summary for summary in run_pipeline(line, engine=Choice("local", {"workers": 1}))}
    for stage in planned.stages:
        assert done[stage.stage].units == stage.units
        assert done[stage.stage].samples == stage.images
        assert set(stage.bytes) == set(stage.artifacts)
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


@pytest.mark.slow
def test_the_plan_of_existing_images_agrees_with_attend(tmp_path, temporary):
    write_truth_of(tmp_path / "tars", 14)
    stages = {
        "attend": {"images": str(tmp_path / "tars"), "timesteps": [100], "unit_size": 5, "batch_size": 4},
        "masks": {},
        "shards": {"samples_per_shard": 8, "val_ratio": 0.2},
    }
    line = tmp_path / "line.yaml"
    line.write_text(json.dumps({"run": str(tmp_path / "run"), "stages": stages}))
    planned = plan_pipeline(line, sample=6)
    assert not list(temporary.glob("synthgen-*"))
    assert (planned.images, planned.prompts, planned.stages[0].sample) == (14, 0, "6 images in 3 rounds")
    done = {summary.stage: summary for summary in run_pipeline(line, engine=Choice("local", {"workers": 1}))}
    for stage in planned.stages:
        assert (done[stage.stage].units, done[stage.stage].samples) == (stage.units, stage.images)
        for name, made in stage.bytes.items():
            size = size_of(tmp_path / "run" / name)
            assert made.value == pytest.approx(size, rel=0.2), name  # some of the images are larger
    assert plan_pipeline(line).stages[0].units_left == 0


def test_every_evaluator_is_measured(tmp_path):
    """In this process; the sample is a run that has its shards and an encoder."""
    run = make_run(tmp_path / "rounds", units=2, unit_size=10, image_size=32)
    run_stage(Shards(val_ratio=0.0), run, Local(workers=1))
    encoder = Choice("micro", {"dim": 32, "depth": 1, "num_heads": 2})
    run_stage(Pretrain(encoder=encoder, epochs=1, batch_size=8, export=False, num_workers=0), run, Local(workers=1))
    truth = write_truth_of(tmp_path / "truth", 6)
    stage = Evaluate(
        encoder=str(tmp_path / "planned" / "pretrain" / "mae"),
        test=str(truth),
        truth=str(truth),
        evaluators=(*map(Choice, ("knn", "segmentation", "mask_iou")), Choice("fine_tune", {"seeds": 1})),
    ).complete()
    counts = EvalCounts(train=500, test=6, classes=1, truth=6, encoder=stage.encoder)
    sample = Sample(tmp_path, survey_images(str(truth)), seed=0, most=6, seconds=1.0)
    took = measure_evaluation(stage, sample, counts, 2, Meter(time.time()))
    assert len(took.rounds) == 2
    assert min(took.rounds) > 0
    assert took.features > 500 * 3 * 32 * 32 * (4 + 1)  # pixels, as features (float32) and to be augmented (uint8)
    knn, segmentation, fine_tune = took.parts  # comparing masks is not measured
    assert knn == "knn: 500 x 6 images"
    assert segmentation == "segmentation: 256 x 6 images of 500 x 6, 10 of 400 steps"
    assert fine_tune == "fine_tune: 64 x 6 images of 500 x 6, 10 of 300 steps"
    own = replace(stage, test="", evaluators=(Choice("knn"),)).complete()
    took = measure_evaluation(own, replace(sample, seconds=0.0), counts, 1, Meter(time.time()))
    assert took.images == 2 * 40, "the only tar of the sample has 20 images; time is that of 20 more in each set"


@pytest.mark.slow
def test_a_generator_that_is_trained_further_is_measured(tmp_path, stable_diffusion):
    """Beside one that begins anew; both share the pixels, at the generator's own size."""
    run = make_run(tmp_path / "rounds", units=1, unit_size=6, image_size=32)
    run_stage(Shards(val_ratio=0.0), run, Local(workers=1))
    choice = Choice("fine_tune", {"seeds": 1, "batch_size": 2})
    stage = Evaluate(generator=Choice(str(stable_diffusion)), evaluators=(choice,)).complete()
    sample = Sample(tmp_path, ImageSurvey(90, ()), seed=0, most=6, seconds=1.0)
    took = measure_evaluation(stage, sample, EvalCounts(train=90, test=90, classes=1), 1, Meter(time.time()))
    assert min(took.rounds) > 0
    assert took.features == 180 * 3 * 32 * 32
    assert took.parts == ("fine_tune: 64 x 64 images of 90 x 90, 10 of 300 steps",)


def write_truth_of(folder: Path, count: int) -> Path:
    """A tar of drawn images with captions, words and true masks."""
    folder.mkdir()
    with TarWriter(folder / "000000.tar") as tar:
        for row in range(count):
            generation, masks = make_generation(size=32 + 8 * (row % 2), grid=8, seed=row)
            members = {
                "png": encode_png(generation.image),
                "mask.png": encode_png(masks_to_labels(masks)),
                "txt": b"a photo of a disc",
                "json": json.dumps({"words": ["disc"], "label": "disc"}).encode(),
            }
            tar.add(f"{row:04d}", members)
    return folder


def test_a_missing_model_is_reported_and_no_file_is_left(line, temporary):
    options = {
        "stages.generate.backbone": {"name": "diffusers", "model": "no/such-model"},
        "run": str(line.parent / "x"),
    }
    with pytest.raises(SynthgenError, match="no/such-model") as caught:
        plan_pipeline(line, overrides=options)
    assert "\n" not in str(caught.value)
    assert not list(temporary.glob("synthgen-*"))


def test_the_command_counts_and_prints_json(line):
    command = [sys.executable, "-m", "synthgen", "plan", str(line), "--no-measure", "--json", "--set", "run=elsewhere"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=line.parent)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["images"], found["prompts"], found["stages"][0]["units"]) == (20, 5, 4)
    assert not (line.parent / "elsewhere").exists()
