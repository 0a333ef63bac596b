"""What every evaluator must do: it finds what is there, finds nothing where nothing is, and says what it lacks."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import get_args

import pytest
import torch

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.evaluators import (
    EVALUATORS,
    DenseFeatures,
    EvalData,
    LabelledFeatureMaps,
    LabelledFeatures,
    LabelledImages,
    Latents,
    Need,
)
from tests.evaluation import make_data, reordered

NAMES = EVALUATORS.names()
QUICK = {  # heads learn this data in fewer steps than real features
    "segmentation": {"seeds": 2, "steps": 60, "width": 16, "decoder_learning_rate": 0.02},
    "detection": {"seeds": 2, "steps": 100, "width": 16, "learning_rate": 0.02},
    "saliency": {"seeds": 2, "steps": 60, "width": 16, "learning_rate": 0.02},
    "attentive_probe": {"seeds": 2, "steps": 40, "width": 16, "num_heads": 2, "learning_rate": 0.01},
    "diffeed": {"seeds": 2, "steps": 20, "width": 16, "num_heads": 2, "learning_rate": 0.02},
    "fine_tune": {"seeds": 2, "steps": 40, "batch_size": 16, "learning_rate": 0.02, "layer_decay": 1.0},
}
# of what can be read off; all of it where nothing is learned
AT_LEAST = {"segmentation": 0.9, "detection": 0.6, "saliency": 0.9}
# of what cannot; else 3 classes
AT_MOST = {"segmentation": 0.4, "detection": 0.1, "saliency": 0.35, "mask_iou": 0.0, "retrieval": 0.45}
PARTS = tuple(f"{side}{kind}" for side in ("train", "test") for kind in ("", "_scenes", "_maps", "_latents", "_images"))


def build(name):
    return EVALUATORS.build(Choice(name, QUICK.get(name, {})))


@pytest.fixture(scope="module", params=NAMES)
def judged(request):
    """A name, and its numbers where all can be read off, and where nothing can."""
    evaluator = build(request.param)
    return request.param, *(evaluator.evaluate(make_data(known=known)) for known in (True, False))


def test_readable_features_score_high(judged):
    name, everything, _ = judged
    assert next(iter(everything.values())) >= AT_LEAST.get(name, 1.0)


def test_unreadable_features_score_low(judged):
    name, _, nothing = judged
    assert next(iter(nothing.values())) <= AT_MOST.get(name, 0.6)


def test_numbers_are_plain_and_bounded(judged):
    for numbers in judged[1:]:
        assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
        score = next(iter(numbers.values()))
        assert 0 <= numbers["low"] <= score <= numbers["high"] <= 1
        if "seeds" in numbers:
            assert 0 <= numbers["spread"] <= 0.5
        assert list(numbers)[1:3] == ["low", "high"]


def test_scores_are_reproducible_and_evaluators_pickle(judged):
    name, everything, _ = judged
    assert pickle.loads(pickle.dumps(build(name))).evaluate(make_data(known=True)) == everything


def test_the_order_of_images_does_not_matter(judged):
    name, everything, _ = judged
    other = build(name).evaluate(reordered(make_data(known=True)))
    for key, value in everything.items():  # bounds are drawn from images by number
        assert other[key] == pytest.approx(value, abs=0.1 if key.endswith(("low", "high")) else 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_is_named(name):
    evaluator = build(name)
    assert evaluator.needs in get_args(Need)
    assert set(evaluator.baselines) <= {"random", "random generator", "pixels"}
    with pytest.raises(ConfigError, match=r"there are no|share no sample"):
        evaluator.evaluate(EvalData())
    with pytest.raises(ConfigError, match="unknown setting"):
        EVALUATORS.build(Choice(name, {"no_such_option": 1}))


@pytest.mark.parametrize("name", [name for name in NAMES if EVALUATORS.load(name).needs != "masks"])
def test_features_of_a_diverged_encoder_are_refused(name):
    data = make_data(known=True)
    data.test.features[0, 0] = torch.nan
    data.test_scenes.patches[0, 0, 0, 0] = torch.inf
    data.pairs.images[0, 0] = torch.nan
    data.test_maps.maps[1][0, 0, 0, 0, 0] = torch.nan
    data.test_latents.values[0, 0, 0, 0] = torch.nan
    data.encoder.norm.bias.data[0] = torch.nan
    with pytest.raises(ConfigError, match="not finite numbers"):
        build(name).evaluate(data)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_is_scored_or_refused(name):
    """Never a crash, and never a number that is none."""
    data = make_data(known=True, train=6, test=6)

    def one_class(split: LabelledFeatures | LabelledFeatureMaps | Latents | LabelledImages | DenseFeatures):
        if not isinstance(split, DenseFeatures):
            return dataclasses.replace(split, labels=torch.zeros_like(split.labels))
        boxes = tuple(torch.ones_like(numbers) for numbers in split.box_classes)
        return dataclasses.replace(
            split, pixels=split.pixels.clamp(max=1), box_classes=boxes, classes=split.classes[:2]
        )

    parts = {key: one_class(getattr(data, key)) for key in PARTS}
    numbers = build(name).evaluate(dataclasses.replace(data, **parts))
    assert all(math.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("name", ["segmentation", "detection", "saliency"])
def test_scenes_without_any_mask_are_refused(name):
    data = make_data(known=True, train=4, test=4)
    empty = dataclasses.replace(
        data.train_scenes,
        pixels=torch.zeros_like(data.train_scenes.pixels),
        boxes=(torch.zeros(0, 4),) * 4,
        box_classes=(torch.zeros(0, dtype=torch.long),) * 4,
        classes=("background",),
    )
    test = dataclasses.replace(data.test_scenes, classes=("background", "disc", "square"))
    with pytest.raises(ConfigError, match="no mask of the training images has a pixel"):
        build(name).evaluate(dataclasses.replace(data, train_scenes=empty, test_scenes=test))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_head_that_diverged_has_no_score(name):
    setting = "decoder_learning_rate" if name == "segmentation" else "learning_rate"  # its linear head stays finite
    options = QUICK[name] | {setting: 1e20}
    with pytest.raises(ConfigError, match=rf"diverged; give .* a lower {setting}"):
        EVALUATORS.build(Choice(name, options)).evaluate(make_data(known=True))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_head_cannot_learn_backwards(name):
    with pytest.raises(ConfigError, match=r"weight_decay (must be )?0 or more"):
        EVALUATORS.build(Choice(name, {"weight_decay": -1.0}))
