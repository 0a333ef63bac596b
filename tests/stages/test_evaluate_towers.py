"""Evaluation of vision transformers of transformers: whoever trained an encoder, it is judged alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, StaleArtifact, SynthgenError
from synthgen.models.transformers_vit import save_transformers
from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.shards import Shards
from tests.factories import make_run

ONE = Local(workers=1)
OPTIONS = {"evaluators": (Choice("knn", {}), Choice("segmentation", {"steps": 2, "seeds": 1}))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with shards, an encoder of ours (``own``), and the same as a model of transformers (``tower``)."""
    path = tmp_path_factory.mktemp("source")
    run_stage(Shards(val_ratio=0.3), make_run(path / "run", units=2, unit_size=20, image_size=32), ONE)
    torch.manual_seed(0)
    encoder = VisionTransformer(EncoderConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=4)).eval()
    save_encoder(encoder, path / "own")
    save_transformers(encoder, path / "tower")
    return path


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(source / "run", tmp_path / "run"))


def result(run: Run, name: str) -> dict:
    return json.loads((run.folder("evaluate") / f"{name}.json").read_text())


def test_the_same_encoder_has_the_same_scores(run, source):
    for name in ("own", "tower"):
        run_stage(Evaluate(encoder=str(source / name), **OPTIONS), run, ONE)
    own, tower = (result(run, name)["scores"] for name in ("own", "tower"))
    assert list(tower) == ["tower", "random encoder", "pixels"]
    assert tower["pixels"] == own["pixels"]
    for name, scores in tower["tower"].items():
        assert scores == pytest.approx(own["own"][name], abs=0.02), name
    assert tower["tower"]["knn"] == own["own"]["knn"]


def test_a_tower_is_fine_tuned(run, source):
    choice = Choice("fine_tune", {"steps": 3, "seeds": 1, "batch_size": 8})
    for name in ("own", "tower"):
        run_stage(Evaluate(encoder=str(source / name), evaluators=(choice,)), run, ONE)
    own, tower = (result(run, name)["scores"][name]["fine_tune"] for name in ("own", "tower"))
    assert tower == pytest.approx(own, abs=0.1)


def test_a_model_of_the_hub_has_its_name_as_label(run, source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(source / "tower"))
    run_stage(Evaluate(encoder="somebody/vit-small", evaluators=(Choice("knn", {}),)), run, ONE)
    found = result(run, "vit-small")
    assert list(found["scores"]) == ["vit-small", "random encoder", "pixels"]
    assert found["encoder"] == "somebody/vit-small"


def test_another_tower_in_the_same_folder_makes_the_scores_stale(run, source, tmp_path):
    folder = Path(shutil.copytree(source / "tower", tmp_path / "tower"))
    stage = Evaluate(encoder=str(folder), evaluators=(Choice("knn", {}),)).complete()
    run_stage(stage, run, ONE)
    assert stage.done(run, 0)
    processor = folder / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("0.485", "0.5"))
    assert not stage.done(run, 0)
    with pytest.raises(StaleArtifact, match="changed: its input encoder"):
        run_stage(stage, run, ONE)


def test_a_tower_without_a_class_token(run, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    siglip = SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=8))
    siglip.save_pretrained(tmp_path / "siglip")
    knn = (Choice("knn", {}),)
    with pytest.raises(SynthgenError, match="has no class token; leave pool at mean") as caught:
        run_stage(Evaluate(encoder=str(tmp_path / "siglip"), pool="cls", evaluators=knn), run, ONE)
    assert "\n" not in str(caught.value)
    run_stage(Evaluate(encoder=str(tmp_path / "siglip"), evaluators=knn), run, ONE)
    texts = Evaluate(encoder=str(tmp_path / "siglip"), evaluators=(Choice("retrieval", {}),), label="texts")
    with pytest.raises(ConfigError, match="needs a text tower"):
        run_stage(texts, run, ONE)
