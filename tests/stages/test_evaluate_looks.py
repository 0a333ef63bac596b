"""What evaluate looks at: each file once for a command, text towers whole, and no row that nobody has a score for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthgen.config import Choice
from synthgen.datasets import ImageDataset, Sample
from synthgen.evaluators import EVALUATORS
from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Worker, _eval_sources
from synthgen.stages._eval_rows import make_extractor
from synthgen.stages.evaluate import Evaluate
from tests.stages.test_evaluate import ONE, add_text_tower, result

QUICK = {"evaluators": (Choice("knn"), Choice("knn", {"k": 1})), "baselines": False}
DENSE = Choice("segmentation", {"seeds": 1, "steps": 1, "width": 16})


class Drawn(ImageDataset):
    """Six images of two classes, each with a mask and a box."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        labels = np.zeros((16, 16), np.uint8)
        labels[:8] = 1
        return Sample(self.key(index), np.full((16, 16, 3), 40 * index, np.uint8), "a", "", ("disc",), labels)

    def key(self, index):
        return f"{index:04d}"

    def label(self, index):
        return "ab"[index % 2]

    def has_masks(self):
        return True


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """The folder of an encoder that nobody trained."""
    torch.manual_seed(0)
    save_encoder(
        VisionTransformer(EncoderConfig(image_size=16, patch_size=4, dim=32, depth=1, num_heads=2)), tmp_path / "enc"
    )
    return tmp_path / "enc"


def write_folder(folder: Path, each: int) -> str:
    for name, shade in (("dark", 20), ("light", 220)):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(np.full((16, 16, 3), shade + number, np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


def test_each_file_is_hashed_once_per_command(encoder, tmp_path, monkeypatch):
    """And once before, to see whether anything has changed since the scores were made."""
    looks, state = Counter(), _eval_sources._file_state
    monkeypatch.setattr(_eval_sources, "_file_state", lambda file: looks.update([file]) or state(file))
    train, test = write_folder(tmp_path / "train", 4), write_folder(tmp_path / "test", 3)
    stage = Evaluate(encoder=str(encoder), train=train, test=test, **QUICK)
    run = Run.create(tmp_path / "run")
    run_stage(stage, run, ONE)
    assert len(looks) == 2 * 4 + 2 * 3
    assert set(looks.values()) == {2}
    looks.clear()
    assert run_stage(stage, run, ONE).done_before == 1
    assert set(looks.values()) == {2}
    done = stage.complete()
    assert done.done(run, 0)
    (tmp_path / "test" / "dark" / "0.png").unlink()
    assert not done.done(run, 0)  # what was seen in one command counts in no other


def test_inputs_are_hashed_before_they_are_read(encoder, tmp_path, monkeypatch):
    train, test = write_folder(tmp_path / "train", 4), write_folder(tmp_path / "test", 3)
    stage, run = Evaluate(encoder=str(encoder), train=train, test=test, **QUICK), Run.create(tmp_path / "run")
    judge = Evaluate.score_images

    def judge_and_lose(self, *given):
        judge(self, *given)
        (tmp_path / "train" / "dark" / "3.png").unlink()

    monkeypatch.setattr(Evaluate, "score_images", judge_and_lose)
    run_stage(stage, run, ONE)
    noted, now = result(run, "enc-test")["inputs"], stage.complete().inputs(run)
    assert {name for name in now if now[name] != noted[name]} == {"train"}


@pytest.mark.parametrize("name", ["text.safetensors", "text.json", "tokenizer.json"])
def test_another_text_tower_makes_the_scores_of_texts_stale(encoder, tmp_path, name):
    add_text_tower(encoder)
    test = Path(write_folder(tmp_path / "test", 2))
    for path in test.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    stage = Evaluate(encoder=str(encoder), test=str(test), evaluators=(Choice("retrieval"),)).complete()
    run = Run.create(tmp_path / "run")
    before = stage.inputs(run)
    (encoder / name).write_bytes((encoder / name).read_bytes() + b" ")
    after = stage.inputs(run)
    assert {key for key in after if after[key] != before[key]} == {"text tower"}


@pytest.mark.parametrize(
    ("asked", "baselines", "features", "patches"),
    [
        (["linear_probe"], True, {"encoder", "random"}, set()),
        (["knn"], True, {"encoder", "random", "pixels"}, set()),
        (["knn"], False, {"encoder"}, set()),
        (["linear_probe", DENSE], True, {"encoder", "random"}, {"encoder", "random", "pixels"}),
        (["linear_probe", DENSE], False, {"encoder"}, {"encoder"}),
    ],
)
def test_only_features_that_are_scored_are_kept(encoder, tmp_path, asked, baselines, features, patches):
    evaluators = [EVALUATORS.build(one) for one in asked]
    stage = Evaluate(encoder=str(encoder), baselines=baselines)
    extractor = make_extractor(stage, Run.create(tmp_path / "run"), encoder, Worker(), evaluators)
    found = extractor.extract(Drawn(), range(6), range(6) if patches else (), (), lambda count: None)
    assert set(found.features) == features
    assert set(found.patches) == patches
    if patches:
        held = sum(one[0].nbytes for one in found.patches.values()) + found.pixels[0].nbytes
        assert held == extractor.patch_bytes


def test_fine_tuning_alone_runs_no_frozen_network(encoder, tmp_path):
    """Fine-tuning begins with a random one too, and takes a copy."""
    evaluators = [EVALUATORS.build("fine_tune"), EVALUATORS.build(Choice("attentive_probe"))]
    stage, seen = Evaluate(encoder=str(encoder)), []
    extractor = make_extractor(stage, Run.create(tmp_path / "run"), encoder, Worker(), evaluators)
    assert set(extractor.networks) == {"encoder", "random"}
    assert extractor.rows == {"images": {"encoder", "random"}, "maps": {"encoder", "random"}}
    alone = make_extractor(stage, Run.create(tmp_path / "run"), encoder, Worker(), evaluators[:1])
    for network in alone.networks.values():
        network.register_forward_hook(lambda *given: seen.append(1))
    alone.extract(Drawn(), range(6), (), range(6), lambda count: None)
    assert seen == []
