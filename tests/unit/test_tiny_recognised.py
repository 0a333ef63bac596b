"""Recognition rates of generated objects, and how training then samples objects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synthgen.tiny import recognised as module
from synthgen.tiny import score, train
from synthgen.tiny.compositor import Compositor
from synthgen.tiny.recognised import recognition_rates, sampling_factors
from tests.tiny_data import NAMES, make_data
from tests.unit.test_tiny_train import job, small  # noqa: F401


def test_rates_count_the_object_of_the_prompt_over_all_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The classifier sees an apple in every image."""
    seeds: dict[str, set[int]] = {}

    class Model:
        def generate(self, requests):
            for request in requests:
                seeds.setdefault(request.prompt.label, set()).add(request.seed)
            return [SimpleNamespace(image=request.seed) for request in requests]

    monkeypatch.setattr(score, "backbone", lambda weights: Model())
    monkeypatch.setattr(score, "classify", lambda classifier, images: ["apple"] * len(images))
    rates = recognition_rates(tmp_path, None, ("apple", "ball", "car"), 4)
    assert rates == {"apple": 1.0, "ball": 0.0, "car": 0.0}
    assert all(len(found) == 4 for found in seeds.values())
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    assert recognition_rates(tmp_path, None, ("apple", "ball", "car"), 4) == rates


def test_unrecognised_objects_get_higher_factors_and_unknown_ones_are_unchanged():
    assert sampling_factors({"apple": 1.0, "ball": 0.0, "car": 0.5}, ("car", "owl", "apple", "ball")) == [
        2.25,
        1.0,
        0.5,
        4.0,
    ]


def test_the_unet_sees_unrecognised_objects_more_often(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: None,  # noqa: F811
):
    data, used = make_data(tmp_path / "data"), []
    rates = tmp_path / "recognised.json"
    rates.write_text(json.dumps({NAMES.own[0]: 0.0, **dict.fromkeys(NAMES.own[1:], 1.0)}))
    sample = Compositor.sample
    monkeypatch.setattr(Compositor, "sample", lambda self, *args: used.append(self.weights) or sample(self, *args))
    train.train_vae(job(data, tmp_path, "cpu", 1))
    usual = used[-1]
    train.train_unet(replace(job(data, tmp_path, "cpu", 1), recognised=rates))
    positive = usual > 0
    expected = torch.tensor([4.0] + [0.5] * (len(usual) - 1))
    assert any(torch.allclose(weights[positive] / usual[positive], expected[positive]) for weights in used)
