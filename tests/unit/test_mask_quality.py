"""Figures of how far masks can be trusted: by hand on small grids, and in the order that degrading masks demands."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from synthgen.mask_quality import GAIN, SOFTNESS, attention_figures, disagreement, sharpness
from synthgen.records import Maps
from tests.factories import make_generation


def maps_of(weights: np.ndarray) -> Maps:
    weights = np.asarray(weights, np.float16)
    return Maps(("x",) * len(weights), weights, np.ones((12, *weights.shape[1:]), np.float16))


# -- attention


def test_score_and_confidence_by_hand() -> None:
    weights = [[[0.5, 0.25], [0.0, 0.0]]]
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :2] = True
    score, confidence = attention_figures(mask, maps_of(weights))
    assert score == pytest.approx(0.75)  # inside (1 + 0.5) / 2, outside 0
    level = 0.25  # of Otsu: halfway between the lower two of 0, 0, 0.5, 1 parts them best from the others
    likely = [1 / (1 + np.exp(-(value - level) / SOFTNESS)) for value in (1, 0.5, 0, 0)]
    support = (likely[0] + likely[1]) / (2 + likely[2] + likely[3])
    assert confidence == pytest.approx(GAIN * support / (1 + (GAIN - 1) * support), rel=1e-5)


def test_confidence_falls_as_a_mask_moves_away_grows_or_shrinks() -> None:
    generation, truth = make_generation(seed=3)
    moved = [np.roll(truth, step, axis=2) for step in (0, 6, 12, 24)]
    grown = [ndimage.binary_dilation(truth[0], iterations=step)[None] for step in (2, 6, 12)]
    shrunk = [ndimage.binary_erosion(truth[0], iterations=step)[None] for step in (2, 6, 12)]
    for masks in (moved, [truth, *grown], [truth, *shrunk]):
        values = [attention_figures(mask, generation.maps)[1][0] for mask in masks]
        assert values == sorted(values, reverse=True)
        first, *_, last = (value / (GAIN - (GAIN - 1) * value) for value in values)  # what attention alone says
        assert 0 <= last < 0.53 * first <= 0.53


def test_empty_masks_flat_maps_and_broken_maps_without_a_mask_have_zeros() -> None:
    weights = np.stack([np.full((4, 4), 0.5), np.full((4, 4), np.nan), np.eye(4)])
    masks = np.zeros((3, 8, 8), bool)
    masks[0] = True
    for figure in attention_figures(masks, maps_of(weights)):
        assert figure.tolist() == [0, 0, 0]
        assert figure.dtype == np.float32
    with pytest.raises(ValueError, match="NaN"):
        attention_figures(~masks, maps_of(weights))


# -- sharpness


def test_sharpness_by_hand() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 10
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :, 4:] = True
    assert sharpness(image, mask) == pytest.approx(1.0)  # all change, 30 a pixel, is in the columns 3 and 4
    mask[0, :, 4] = False  # the outline is now between the columns 4 and 5: half of its pixels change
    edge, rest = 8 * 30 / 16, 8 * 30 / 48
    assert sharpness(image, mask) == pytest.approx(edge / (edge + rest))
    mask[0] = False
    mask[0, :, 6:] = True
    assert sharpness(image, mask) == [0]


def test_the_border_of_the_image_is_no_outline_and_a_plain_image_has_none() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert sharpness(noise, np.ones((1, 16, 16), bool)) == [0]
    half = np.zeros((1, 16, 16), bool)
    half[0, :8] = True
    assert sharpness(np.full((16, 16, 3), 7, np.uint8), half) == [0]
    assert sharpness(noise, half)[0] == pytest.approx(0.5, abs=0.05)  # an outline that follows nothing
    assert sharpness(noise, np.zeros((0, 16, 16), bool)).shape == (0,)


def test_outlines_on_edges_are_sharper_than_beside_them() -> None:
    generation, truth = make_generation(words=("disc", "square"), seed=1)
    right = sharpness(generation.image, truth)
    wrong = sharpness(generation.image, np.roll(truth, 5, axis=1))
    assert (right > 0.65).all()
    assert (wrong < right - 0.1).all()


def test_sharpness_is_the_same_over_the_whole_image_and_in_a_window() -> None:
    generation, truth = make_generation(seed=2)
    image = generation.image.astype(int)
    change = np.zeros(image.shape[:2])
    change[:, 1:-1] += abs(image[:, 2:] - image[:, :-2]).sum(2)
    change[1:-1] += abs(image[2:] - image[:-2]).sum(2)
    cross = ndimage.generate_binary_structure(2, 1)
    band = ndimage.binary_dilation(truth[0], cross) & ~ndimage.binary_erosion(truth[0], cross, border_value=1)
    edge, rest = change[band].mean(), change[~band].mean()
    assert sharpness(generation.image, truth) == pytest.approx(edge / (edge + rest), rel=1e-5)


# -- disagreement


def test_disagreement_is_one_minus_iou_and_zero_for_empty_masks() -> None:
    masks, others = np.zeros((2, 4, 8, 8), bool)
    masks[0, :4], others[0, 2:6] = True, True
    masks[1], others[1] = True, True
    masks[2], others[2] = True, False
    others[3] = True
    assert disagreement(masks, others) == pytest.approx([1 - 1 / 3, 0, 1, 0])
    assert disagreement(masks[:0], others[:0]).shape == (0,)
