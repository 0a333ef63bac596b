"""Evaluators against hand cases and written-out references."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.evaluators import EVALUATORS, Labelled, Material
from synthgen.evaluators._bootstrap import mean_with_interval
from synthgen.evaluators.mask_iou import word_ious
from synthgen.records import WordMasks
from tests.factories import shape_mask


def clouds(count, seed, spread=1.0, classes=3, dim=6):
    """Gaussian clouds round fixed centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) * 2
    return Labelled(centres[labels] + spread * torch.randn(count, dim, generator=generator), labels)


def make_masks(words, values, size=8):
    stacked = np.zeros((len(words), size, size), bool)
    for mask, (top, bottom, left, right) in zip(stacked, values, strict=True):
        mask[top:bottom, left:right] = True
    return WordMasks(tuple(words), stacked, np.zeros(len(words), np.float32))


MASKS = {"0": make_masks(["disc"], [(0, 4, 0, 4)])}
MATERIAL = Material(train=clouds(60, 1), test=clouds(30, 2), predicted=MASKS, truth=MASKS)


@pytest.mark.parametrize("name", EVALUATORS.names())
def test_every_evaluator(name):
    """Builds with defaults, repeats exactly, gives plain numbers with an interval, travels, refuses bad options."""
    evaluator = EVALUATORS.build(name)
    numbers = evaluator.evaluate(MATERIAL)
    assert numbers == pickle.loads(pickle.dumps(evaluator)).evaluate(MATERIAL)
    assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
    assert evaluator.needs in ("features", "masks")
    main = next(iter(numbers.values()))
    assert numbers["low"] <= main <= numbers["high"]
    with pytest.raises(ConfigError, match="unknown setting"):
        EVALUATORS.build(Choice(name, {"no_such_option": 1}))


# -- knn


def test_knn_against_a_loop():
    train, test = clouds(40, 1, 2.0), clouds(25, 2, 2.0)
    evaluator = EVALUATORS.build(Choice("knn", {"k": 5, "temperature": 0.2}))
    wanted = []
    for row in test.features:
        cosines = [(float(row @ other / row.norm() / other.norm()), i) for i, other in enumerate(train.features)]
        votes = [0.0] * 3
        for cosine, i in sorted(cosines, reverse=True)[:5]:
            votes[train.labels[i]] += math.exp(cosine / 0.2)
        wanted.append(votes.index(max(votes)))
    assert evaluator.predict(train, test.features).tolist() == wanted
    right = np.mean([a == b for a, b in zip(wanted, test.labels.tolist(), strict=True)])
    assert evaluator.evaluate(Material(train=train, test=test))["accuracy"] == pytest.approx(right)


def test_knn_takes_small_sets_and_unknown_classes():
    train = Labelled(torch.eye(3), torch.arange(3))
    test = Labelled(torch.eye(3), torch.tensor([0, 1, -1]))
    assert EVALUATORS.build("knn").evaluate(Material(train=train, test=test))["accuracy"] == pytest.approx(2 / 3)


# -- linear probe


def test_probe_is_the_minimum():
    """At the minimum the gradient of the written-out loss is 0."""
    train = clouds(50, 3, 2.0)
    probe = EVALUATORS.build(Choice("linear_probe", {"l2": 0.1}))
    z = train.features.double()
    weight, bias = probe.solve(z, train.labels, 3, 0.1)
    logits = z @ weight.T + bias
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    error = (p - torch.eye(3, dtype=torch.float64)[train.labels]) / len(z)
    assert (error.T @ z + 0.1 * weight).abs().max() < 1e-5
    assert error.sum(0).abs().max() < 1e-5


def test_probe_reads_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=generator)
    linear = (features[:, 0] > 0).long()
    noise = torch.randint(0, 2, (400,), generator=generator)
    probe = EVALUATORS.build("linear_probe")
    for labels, low, high in ((linear, 0.93, 1.0), (noise, 0.35, 0.65)):
        material = Material(train=Labelled(features[:300], labels[:300]), test=Labelled(features[300:], labels[300:]))
        assert low <= probe.evaluate(material)["accuracy"] <= high


def test_probe_does_not_mind_scale_or_dead_features():
    train, test = clouds(60, 1), clouds(30, 2)

    def stretched(split):
        dead = torch.full((len(split.features), 1), 3.0)
        return Labelled(torch.cat([split.features * 1000 + 7, dead], 1), split.labels)

    probe = EVALUATORS.build("linear_probe")
    plain = probe.evaluate(Material(train=train, test=test))
    other = probe.evaluate(Material(train=stretched(train), test=stretched(test)))
    assert other["accuracy"] == pytest.approx(plain["accuracy"])


# -- mask IoU


def test_iou_by_hand():
    truth = make_masks(["disc", "square"], [(0, 4, 0, 4), (4, 8, 4, 8)])
    guess = make_masks(["disc", "square"], [(0, 4, 0, 2), (4, 8, 0, 4)])
    assert word_ious(guess, truth) == [0.5, 0.0]
    numbers = EVALUATORS.build("mask_iou").evaluate(Material(predicted={"a": guess, "b": truth}, truth={"a": truth}))
    assert (numbers["mean_iou"], numbers["found"], numbers["words"], numbers["images"]) == (0.25, 0.5, 2, 1)


def test_words_are_matched_by_name():
    truth = make_masks(["dog", "cat", "dog"], [(0, 2, 0, 2), (4, 6, 0, 2), (0, 2, 6, 8)])
    swapped = make_masks(["cat", "dog", "dog"], [(4, 6, 0, 2), (0, 2, 0, 2), (0, 2, 6, 8)])
    assert word_ious(swapped, truth) == [1.0, 1.0, 1.0]
    assert word_ious(make_masks(["Dog"], [(0, 2, 0, 2)]), truth) == [1.0, 0.0, 0.0]


def test_words_without_true_pixels_do_not_count():
    truth = make_masks(["dog", "cat"], [(0, 2, 0, 2), (0, 0, 0, 0)])
    assert word_ious(make_masks(["dog", "cat"], [(0, 2, 0, 2), (5, 8, 5, 8)]), truth) == [1.0]


def test_masks_of_another_size_are_resized():
    def disc(size):
        return WordMasks(
            ("disc",), shape_mask("disc", size / 2, size / 2, size / 3, size)[None], np.zeros(1, np.float32)
        )

    (iou,) = word_ious(disc(32), disc(64))
    assert iou > 0.93


def test_nothing_shared_is_an_error():
    with pytest.raises(ValueError, match="share no sample"):
        EVALUATORS.build("mask_iou").evaluate(Material(predicted=MASKS, truth={"7": MASKS["0"]}))


# -- intervals


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, low, high = mean_with_interval((rng.random(80) < 0.6).astype(float))
        hits += low <= 0.6 <= high
    assert 180 <= hits <= 199  # 95 % of 200 is 190


def test_interval_draws_the_words_of_an_image_together():
    sums, counts = np.array([4.0, 0.0] * 20), np.array([4.0, 4.0] * 20)
    mean, low, high = mean_with_interval(sums, counts)
    alone = mean_with_interval(np.array([1.0] * 80 + [0.0] * 80))
    assert mean == alone[0] == 0.5
    assert high - low > 1.5 * (alone[2] - alone[1])
