"""The whole line on the shipped model, in small: twice, with the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

LINE = """
run: {run}
engine: {{workers: 1}}
stages:
  generate: {{prompts: {prompts}, images_per_prompt: 6, unit_size: 12, backbone: {{name: tiny, num_steps: 4}}}}
  masks: {{refine: {{name: attentioncut}}}}
  shards: {{samples_per_shard: 20, val_ratio: 0.25}}
  pretrain: {{method: {{name: mae, foreground_share: 0.5}}, epochs: 4, batch_size: 16, save_every: 2}}
  evaluate: {{}}
"""


def start(tmp_path, name):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"a photo of a [{word}]\n" for word in ("dog", "pizza", "car", "flower", "lion", "bus")))
    line = tmp_path / f"{name}.yaml"
    line.write_text(LINE.format(run=tmp_path / name, prompts=prompts))
    return [sys.executable, "-m", "synthgen", "run", str(line)], tmp_path / name


def sums(run):
    names = [*sorted(run.glob("**/*.tar")), *sorted(run.glob("pretrain/*/encoder.safetensors"))]
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    command, run = start(tmp_path_factory.mktemp("line"), "whole")
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return run, told.stdout


def test_the_line_ends_with_shards_an_encoder_and_scores(finished):
    run, told = finished
    assert len(sums(run)) >= 3 + 3 + 3 + 2 + 1
    assert (run / "shards" / "train" / "000000.tar").exists()
    assert list(run.glob("pretrain/*/encoder.safetensors"))
    assert "knn" in told.lower()
    masks = [json.loads(path.read_text())["notes"] for path in (run / "masks").glob("*.json")]
    assert sum(note.get("masks", 0) for note in masks) > 18  # of 36


def test_the_same_command_has_nothing_to_do(finished):
    run, _ = finished
    before = sums(run)
    told = subprocess.run(
        [sys.executable, "-m", "synthgen", "run", str(run.parent / "whole.yaml")], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("nothing to do") == 5
    assert sums(run) == before


@pytest.mark.slow  # quick ones are those of tests/faults, and of each stage
def test_killed_in_every_stage_it_ends_with_the_same_bytes(finished, tmp_path):
    command, run = start(tmp_path, "killed")
    waits = ["images/000000.json", "masks/000000.json", "shards/train/*_stats.json", "pretrain/*/checkpoints/*"]
    for wait in waits:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not list(run.glob(wait)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"the line had ended before it was killed at {wait}"
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert sums(run) == sums(finished[0])
