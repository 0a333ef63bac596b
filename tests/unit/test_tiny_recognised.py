"""What the model draws so that it is recognised, and how training then draws objects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synthgen.tiny import recognised as counting
from synthgen.tiny import score, train
from synthgen.tiny.compositor import Compositor
from synthgen.tiny.recognised import emphasis, recognised
from tests.tiny_data import NAMES, make_data
from tests.unit.test_tiny_train import job, small  # noqa: F401


def test_each_object_is_counted_by_its_own_name_over_all_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The model draws an apple for whatever it is asked, and every other image of it is blank."""
    seeds: dict[str, set[int]] = {}

    class Drawing:
        def generate(self, requests):
            for request in requests:
                seeds.setdefault(request.prompt.label, set()).add(request.seed)
            return [SimpleNamespace(image=request.seed) for request in requests]

    monkeypatch.setattr(score, "backbone", lambda weights: Drawing())
    monkeypatch.setattr(score, "classified", lambda oracle, images: ["apple"] * len(images))
    shares = recognised(tmp_path, None, ("apple", "ball", "car"), 4)
    assert shares == {"apple": 1.0, "ball": 0.0, "car": 0.0}
    assert all(len(found) == 4 for found in seeds.values())
    monkeypatch.setattr(counting, "BATCH", 2)
    assert recognised(tmp_path, None, ("apple", "ball", "car"), 4) == shares


def test_what_is_missed_is_drawn_more_and_what_is_unknown_as_ever():
    assert emphasis({"apple": 1.0, "ball": 0.0, "car": 0.5}, ("car", "owl", "apple", "ball")) == [2.25, 1.0, 0.5, 4.0]


def test_the_unet_is_trained_on_what_was_missed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: None,  # noqa: F811
):
    data, drawn = make_data(tmp_path / "data"), []
    shares = tmp_path / "recognised.json"
    shares.write_text(json.dumps({NAMES.own[0]: 0.0, **dict.fromkeys(NAMES.own[1:], 1.0)}))
    draw = Compositor.draw
    monkeypatch.setattr(Compositor, "draw", lambda self, *given: drawn.append(self.weights) or draw(self, *given))
    train.train_vae(job(data, tmp_path, "cpu", 1))
    usual = drawn[-1]
    train.train_unet(replace(job(data, tmp_path, "cpu", 1), recognised=shares))
    there = usual > 0
    expected = torch.tensor([4.0] + [0.5] * (len(usual) - 1))
    assert any(torch.allclose(weights[there] / usual[there], expected[there]) for weights in drawn)
