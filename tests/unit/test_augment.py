"""Views: image and masks move together, the crop is MAE's, and a seed decides everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from synthgen.augment import Augment, CenterCrop
from synthgen.datasets import Sample
from tests.factories import shape_mask


def make_sample(height=96, width=64):
    """Three shapes, each of a colour of its own, so that a picture tells where its masks are."""
    image = np.zeros((height, width, 3), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    for number, (word, row, column) in enumerate([("disc", 20, 16), ("square", 60, 44), ("disc", 80, 14)], start=1):
        mask = shape_mask(word, row, column, 13, max(height, width))[:height, :width]
        labels[mask] = number
        image[mask] = 0
        image[mask, number - 1] = 255
    return Sample("0", image, words=("a", "b", "c"), label_map=labels)


def told(image):
    """The masks that the colours tell."""
    return np.where(image.max(2) > 127, image.argmax(2) + 1, 0)


@pytest.mark.parametrize("seed", range(30))
def test_image_and_masks_move_together(seed):
    sample = make_sample()
    view = Augment(size=48)(sample, np.random.default_rng(seed))
    assert view.image.shape == (48, 48, 3)
    assert view.label_map.shape == (48, 48)
    wrong = told(view.image) != view.label_map
    # they may differ where a border runs through a pixel, and nowhere else
    padded = np.pad(view.label_map, 1, mode="edge")
    near = [padded[y : y + 48, x : x + 48] for y in range(3) for x in range(3)]
    border = np.max(near, 0) != np.min(near, 0)
    assert not (wrong & ~border).any()
    assert wrong.mean() < 0.05


def test_a_flip_mirrors_both():
    sample = make_sample(64, 64)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    straight = Augment(size=64, flip=0.0, **whole)(sample, np.random.default_rng(0))
    mirrored = Augment(size=64, flip=1.0, **whole)(sample, np.random.default_rng(0))
    assert np.array_equal(straight.image, sample.image)
    assert np.array_equal(straight.label_map, sample.label_map)
    assert np.array_equal(mirrored.image, sample.image[:, ::-1])
    assert np.array_equal(mirrored.label_map, sample.label_map[:, ::-1])


def test_crops_keep_their_bounds():
    augment, rng = Augment(size=32, scale=(0.2, 1.0)), np.random.default_rng(0)
    areas = []
    for _ in range(500):
        left, top, right, bottom = augment.box(96, 64, rng)
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 96
        assert 0.7 <= (right - left) / (bottom - top) <= 1.4
        areas.append((right - left) * (bottom - top) / (96 * 64))
    assert 0.18 < min(areas) < 0.25
    assert max(areas) > 0.75


def test_a_box_is_found_in_very_long_images():
    left, top, right, bottom = Augment(size=8, scale=(0.9, 1.0)).box(10, 1000, np.random.default_rng(0))
    assert (bottom - top, right - left) == (10, 13)
    assert left == (1000 - 13) // 2


def test_a_seed_decides_everything():
    augment = Augment(size=32, jitter=0.4)
    first, again = (augment(make_sample(), np.random.default_rng(7)) for _ in range(2))
    other = augment(make_sample(), np.random.default_rng(8))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_jitter_changes_colour_and_no_mask():
    plain, jittered = (Augment(size=48, jitter=j)(make_sample(), np.random.default_rng(3)) for j in (0.0, 0.4))
    assert np.array_equal(plain.label_map, jittered.label_map)
    assert not np.array_equal(plain.image, jittered.image)


def test_grey_and_blur_change_no_mask():
    plain, grey, blurred = (
        Augment(size=48, **options)(make_sample(), np.random.default_rng(3))
        for options in ({}, {"grey": 1.0}, {"blur": 1.0})
    )
    assert (grey.image == grey.image[:, :, :1]).all()
    assert (
        np.abs(np.diff(blurred.image.astype(int), axis=1)).sum()
        < np.abs(np.diff(plain.image.astype(int), axis=1)).sum()
    )
    for view in (grey, blurred):
        assert np.array_equal(view.label_map, plain.label_map)


def test_jitter_comes_with_its_probability():
    augment = Augment(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.4, jitter_probability=0.8)
    sample = Sample("0", np.random.default_rng(0).integers(60, 200, (64, 64, 3)).astype(np.uint8))
    changed = [not np.array_equal(augment(sample, np.random.default_rng(n)).image, sample.image) for n in range(200)]
    assert 0.7 < np.mean(changed) < 0.9


@pytest.mark.parametrize(("text", "kept"), [("a dog on the Left of a cat", True), ("a leftover", False)])
def test_sides_are_kept_where_the_text_names_them(text, kept):
    augment = Augment(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0, keep_sides=True)
    view = augment(replace(make_sample(64, 64), text=text), np.random.default_rng(0))
    assert np.array_equal(view.image, make_sample(64, 64).image) == kept


def test_center_crop_takes_the_middle_square():
    view = CenterCrop(size=64)(make_sample(96, 64))
    assert np.array_equal(view.image, make_sample().image[16:80])
    assert np.array_equal(view.label_map, make_sample().label_map[16:80])


def test_samples_without_masks_pass():
    sample = Sample("0", np.zeros((20, 30, 3), np.uint8))
    assert Augment(size=8)(sample, np.random.default_rng(0)).label_map is None
