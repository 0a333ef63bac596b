"""The evaluator saliency against hand cases and written-out references."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.evaluators import EVALUATORS, DenseFeatures, EvalData
from synthgen.evaluators.saliency import (
    box_ious,
    compare,
    decoder,
    dice_loss,
    f_curve,
    foreground,
    iou,
    main_box,
    near_border,
    saliency_loss,
)
from tests.evaluation import make_scenes


def build(**options):
    return EVALUATORS.build(Choice("saliency", options))


def drawn(*rows):
    """A mask from lines of 0 and 1."""
    return np.array([[int(cell) for cell in row] for row in rows]) > 0


def make_truth(masks, boxes=None):
    """DenseFeatures without features, with masks and no boxes but those given."""
    boxes = boxes or [[]] * len(masks)
    return DenseFeatures(
        torch.zeros(len(masks), 1, 2, 2).half(),
        torch.from_numpy(np.stack(masks)).short(),
        tuple(torch.tensor(edges).float().view(-1, 4) for edges in boxes),
        tuple(torch.ones(len(edges), dtype=torch.long) for edges in boxes),
        tuple(f"{image}" for image in range(len(masks))),
        ("background", "disc"),
    )


def as_probabilities(*masks):
    return np.stack(masks).astype(np.float32)


# -- figures


def test_iou_by_hand():
    true, found = drawn("1100", "1100", "0000", "0000"), drawn("0110", "0110", "0000", "0001")
    nothing = np.zeros((4, 4), bool)
    assert iou(found, true) == 2 / 7
    assert (iou(nothing, nothing), iou(found, nothing), iou(nothing, true)) == (1, 0, 0)


def test_f_curve_against_a_loop():
    """Precision and recall counted anew at each threshold, on probabilities at, between and beyond them."""
    rng = np.random.default_rng(3)
    noise = ndimage.gaussian_filter(rng.normal(size=(24, 24)), 2)
    true = noise > 0.05
    smooth = np.clip(0.5 + 2 * noise + 0.2 * rng.normal(size=(24, 24)), 0, 1).astype(np.float32)
    coarse = (rng.integers(0, 6, (24, 24)) * 51 / 255).astype(np.float32)
    for probability in (smooth, coarse, np.zeros_like(smooth), np.ones_like(smooth)):
        wanted = []
        for k in range(255):
            above = probability * np.float32(255) > k
            right = (above & true).sum()
            precision, recall = right / above.sum() if above.any() else 1.0, right / true.sum()
            both = 0.3 * precision + recall
            wanted.append(1.3 * precision * recall / both if right else 0.0)
        assert f_curve(probability, true) == pytest.approx(wanted)


def test_max_f_is_that_of_the_mean_curve():
    """Two images that are perfect at different thresholds: no one threshold is best for both."""
    true = drawn("10", "00")
    low, high = np.full((2, 2), 0.1, np.float32), np.full((2, 2), 0.6, np.float32)
    low[0, 0], high[0, 0] = 0.4, 0.9
    found = compare(np.stack([low, high]), make_truth([true, true]))
    everything = 1.3 * 1 / (0.3 * 1 + 4)
    assert found.curves.max(1).tolist() == [1, 1]
    assert found.max_f == pytest.approx((1 + everything) / 2)


def test_images_without_foreground_count_but_not_for_max_f():
    """Of two of them one is left empty. Of an image with neither foreground nor box no box can be right."""
    nothing, disc = np.zeros((4, 4), bool), drawn("0000", "0110", "0110", "0000")
    probabilities = as_probabilities(nothing, disc, disc)
    found = compare(probabilities, make_truth([nothing, nothing, disc]))
    assert found.ious.tolist() == [1, 0, 1]
    assert found.accuracies.tolist() == [1, 0.75, 1]
    assert (found.max_f, len(found.curves)) == (1, 1)
    assert found.located.tolist() == [True]
    boxes = [[], [[1, 1, 3, 3]], [[0, 0, 1, 1]]]
    assert compare(probabilities, make_truth([nothing, nothing, disc], boxes)).located.tolist() == [True, False]


def test_every_class_is_foreground():
    """Those that training lacks as well."""
    masks = [drawn("0110", "0110", "0000", "0000"), drawn("0000", "0000", "1100", "1000")]
    scenes = make_truth(masks)
    scenes.pixels[1] *= 7
    scenes = dataclasses.replace(scenes, classes=("background", "disc", *"abcdef"))
    assert compare(as_probabilities(*masks), scenes).ious.tolist() == [1, 1]


def test_the_box_is_that_of_the_largest_part():
    """Pixels that touch at a corner are one part; of equal parts it is the first."""
    assert main_box(drawn("1100", "0000", "0011", "0110")) == (1, 2, 4, 4)
    assert main_box(drawn("0001", "0010", "0100", "1000")) == (0, 0, 4, 4)
    assert main_box(drawn("1000", "0000", "0001", "0000")) == (0, 0, 1, 1)
    assert main_box(np.zeros((5, 5), bool)) == (0, 0, 5, 5)


def test_iou_of_boxes_by_hand():
    others = np.array([[1.0, 0, 3, 2], [0, 0, 2, 2], [5, 5, 6, 6], [0.5, 0.5, 1, 1]])
    assert box_ious((0, 0, 2, 2), others).tolist() == pytest.approx([1 / 3, 1, 0, 1 / 16])


def test_corloc_by_hand():
    """Any true box will do; half of the union is enough; without boxes it is the one round the foreground."""
    left, top_row = drawn("1100", "1100", "1100", "1100"), drawn("1111", "0000", "0000", "0000")
    nothing = np.zeros((4, 4), bool)
    boxes = [[[3, 3, 4, 4], [0, 0, 4, 4]], [[3, 3, 4, 4]], [], [[0, 0, 4, 2]]]
    probabilities = as_probabilities(left, left, left, nothing)
    found = compare(probabilities, make_truth([left, left, top_row, left], boxes))
    assert found.located.tolist() == [True, False, False, True]


# -- the loss


def test_cells_near_a_border_by_hand():
    true = torch.tensor([[[0.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]])
    wanted = drawn("00000", "00011", "00111", "01111", "01110")
    assert near_border(true, 1)[0].tolist() == wanted.tolist()
    assert not near_border(true, 0).any()
    assert near_border(true, 4).all()
    assert not near_border(torch.ones(1, 5, 5), 2).any()


def test_the_border_is_left_out_of_cross_entropy_and_not_of_dice():
    true = torch.zeros(2, 6, 6)
    true[0, :, 3:] = 1
    logits = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    p = logits.sigmoid()
    told = -(true * p.log() + (1 - true) * (1 - p).log())
    entropy = torch.cat([told[0, :, [0, 1, 4, 5]].flatten(), told[1].flatten()]).mean()
    dice = [1 - (2 * (p[i] * true[i]).sum() + 1) / (p[i].sum() + true[i].sum() + 1) for i in range(2)]
    assert float(saliency_loss(logits, true, 1)) == pytest.approx(float(entropy + sum(dice) / 2), rel=1e-5)
    assert float(saliency_loss(logits, true, 0)) == pytest.approx(float(told.mean() + sum(dice) / 2), rel=1e-5)
    assert math.isfinite(float(saliency_loss(logits[:1], true[:1], 6)))  # no cell is left


def test_dice_by_hand():
    true = torch.zeros(2, 2, 2)
    true[0, 0] = 1
    assert float(dice_loss(true, true)) == 0
    assert float(dice_loss(torch.full((2, 2, 2), 0.5), true)) == pytest.approx(((1 - 3 / 5) + (1 - 1 / 3)) / 2)


def test_cells_are_foreground_by_half():
    pixels = torch.tensor([[[1, 2, 0, 0], [0, 0, 0, 3], [0, 0, 5, 5], [0, 0, 5, 0]]]).short()
    assert foreground(pixels, 2).tolist() == [[[1, 0], [0, 1]]]
    assert foreground(pixels, 4).tolist() == (pixels > 0).float().tolist()


# -- the decoder


@pytest.mark.parametrize(("scale", "finer"), [(1, 1), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_the_grid_is_no_finer_than_the_pixels(scale, finer):
    scenes = make_scenes(2, 1, known=True, scale=scale)
    head = build(steps=1, width=16).train(scenes, "cpu", 0)
    assert head(scenes.patches).shape == (2, 1, 8 * finer, 8 * finer)


def test_each_enlargement_halves_the_width():
    layers = [layer for layer in decoder(7, 32, 2) if isinstance(layer, torch.nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in layers] == [
        (7, 32, 1), (32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 8, 3), (8, 1, 1),
    ]  # fmt: skip


def test_a_decoder_learns_eight_images_by_heart():
    """Features that tell nothing of the foreground: it is remembered, finer than the patches."""
    told = make_scenes(8, 1, known=False, scale=2)
    evaluator = build(seeds=1, steps=80, batch_size=8, width=32, learning_rate=0.02)
    found = evaluator.score(evaluator.train(told, "cpu", 0), told, "cpu")
    assert found.ious.min() > 0.9
    assert found.max_f > 0.95
    others = evaluator.evaluate(EvalData(train_scenes=told, test_scenes=make_scenes(8, 2, known=False, scale=2)))
    assert others["iou"] < 0.5
    assert "spread" not in others


def test_figures_are_the_means_of_the_seeds():
    train, test = make_scenes(8, 1, known=True), make_scenes(6, 2, known=True)
    evaluator = build(seeds=2, steps=8, width=16)
    numbers = evaluator.evaluate(EvalData(train_scenes=train, test_scenes=test))
    each = [evaluator.score(evaluator.train(train, "cpu", seed), test, "cpu") for seed in (0, 1)]
    assert list(numbers) == ["iou", "low", "high", "spread", "max_f", "accuracy", "corloc", "images", "seeds"]
    assert numbers["iou"] == pytest.approx(np.mean([one.ious.mean() for one in each]))
    assert numbers["spread"] == pytest.approx(abs(each[0].ious.mean() - each[1].ious.mean()) / math.sqrt(2))
    assert numbers["max_f"] == pytest.approx(np.mean([one.max_f for one in each]))
    assert numbers["accuracy"] == pytest.approx(np.mean([one.accuracies.mean() for one in each]))
    assert numbers["corloc"] == pytest.approx(np.mean([one.located.mean() for one in each]))


def test_classes_do_not_matter():
    """One, two, and some that training lacks: the same figures."""
    train, test = make_scenes(8, 1, known=True), make_scenes(6, 2, known=True)
    evaluator = build(seeds=1, steps=8, width=16)
    numbers = evaluator.evaluate(EvalData(train_scenes=train, test_scenes=test))
    one = dataclasses.replace(train, pixels=train.pixels.clamp(max=1))
    other = dataclasses.replace(test, pixels=test.pixels * 2, classes=(*test.classes, "zebra", "yak"))
    assert evaluator.evaluate(EvalData(train_scenes=one, test_scenes=other)) == numbers


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 24}, "width must be a multiple of 16, not 24"),
        ({"width": 0}, "width must be a multiple of 16, not 0"),
        ({"seeds": 0}, "seeds, steps and batch_size must be 1 or more"),
        ({"steps": 0}, "seeds, steps and batch_size must be 1 or more"),
        ({"batch_size": 0}, "seeds, steps and batch_size must be 1 or more"),
        ({"border": -1}, "border 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay 0 or more"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize("side", ["train_scenes", "test_scenes"])
def test_masks_without_pixels_are_refused(side):
    """Boxes alone tell of no foreground."""
    data = EvalData(train_scenes=make_scenes(3, 1, known=True), test_scenes=make_scenes(3, 2, known=True))
    scenes = getattr(data, side)
    empty = dataclasses.replace(scenes, pixels=torch.zeros_like(scenes.pixels))
    with pytest.raises(ConfigError, match=r"no mask of the (training|test) images has a pixel"):
        build().evaluate(dataclasses.replace(data, **{side: empty}))


def test_a_diverged_training_is_refused():
    data = EvalData(train_scenes=make_scenes(3, 1, known=True), test_scenes=make_scenes(3, 2, known=True))
    with pytest.raises(ConfigError, match="diverged; give the evaluator a lower learning_rate"):
        build(seeds=1, steps=60, width=16, learning_rate=1e9).evaluate(data)
