"""What the documents show works as it stands."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder
from synthgen.pipeline import read_pipeline
from tests.factories import make_generation

ROOT = Path(__file__).resolve().parents[2]


def test_the_refiner_in_extending_is_whole(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "abovemean.py").write_text(code)
    spec = importlib.util.spec_from_file_location("abovemean", tmp_path / "abovemean.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generation, truth = make_generation(words=("disc", "square"))
    masks = module.AboveMean().refine(generation.image, generation.maps)
    assert masks.dtype == bool
    assert masks.sum(0).max() == 1
    assert ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)) > 0.5).all()
    assert np.array_equal(module.AboveMean(factor=99.0).refine(generation.image, generation.maps), np.zeros_like(masks))


def test_the_features_of_one_image_are_computed_as_the_format_page_shows(tmp_path, monkeypatch):
    page = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_encoder" in code]
    encoder = VisionTransformer(EncoderConfig(image_size=32, patch_size=8, dim=16, depth=1, num_heads=2)).eval()
    save_encoder(encoder, tmp_path / "runs/demo/pretrain/mae")
    drawn, _ = make_generation()
    Image.fromarray(drawn.image).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["tokens"].shape == (1, 17, 16)
    assert torch.allclose(scope["features"], scope["tokens"][:, 1:].mean(1))
    assert scope["image"].mean((1, 2)) == pytest.approx(
        (scope["pixels"].mean((1, 2)) - torch.tensor(encoder.config.mean)) / torch.tensor(encoder.config.std), abs=1e-5
    )
    assert "pos_embed" in load_file(tmp_path / "runs/demo/pretrain/mae/encoder.safetensors")
    assert not encoder.pos_embed.requires_grad


def test_every_pipeline_file_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted(Path("pipelines").glob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        assert read_pipeline(path).stages[0].name == "generate"
        assert path.name in Path("pipelines/README.md").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere():
    names = ["README.md", "prompts/README.md", "pipelines/README.md", "CONTRIBUTING.md"]
    for path in [*(ROOT / name for name in names), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path} links to {target}"


def test_the_model_card_lists_what_is_drawn_for_every_imagenet_class():
    folder = ROOT / "synthgen/tiny"
    card = " ".join((folder / "OBJECTS.md").read_text(encoding="utf-8").split())
    for row in json.loads((folder / "imagenet.json").read_text(encoding="utf-8")):
        (names,) = re.findall(rf"- \*\*{re.escape(row['object'])}\*\*: (.*?)(?= - \*\*|$)", card)
        assert row["name"] in names.split(", ")
