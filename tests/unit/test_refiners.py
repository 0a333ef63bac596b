"""What only one refiner does; what all of them do stands with the contracts."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from synthgen.config import Choice
from synthgen.errors import MissingDependency
from synthgen.graphcut import MaximumFlow
from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners import REFINERS
from synthgen.refiners._words import above_level, otsu_level, resize, scaled, side_means
from synthgen.refiners.attentioncut import AttentionCut, anchored, enlarged, near_border, pixel_grids
from synthgen.refiners.grabcut import GrabCut, highest_two
from synthgen.refiners.propagation import Propagation
from synthgen.refiners.threshold import Threshold
from tests.factories import make_generation


def half_seen(affinity):
    """Maps of 8 x 8 cells, attention in the upper left quarter of the left half, and an image of two halves."""
    weights = np.zeros((1, 8, 8), np.float16)
    weights[0, :4, :4] = 1
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200
    return image, Maps(("word",), weights, affinity.astype(np.float16))


def linked_halves():
    """Self-attention that is strong inside each half of the columns and uniform across."""
    side = np.arange(8) >= 4
    affinity = np.ones((len(AFFINITY_OFFSETS), 8, 8))
    for edge, (_, dx) in enumerate(AFFINITY_OFFSETS):
        there = np.clip(np.arange(8) + dx, 0, 7)
        affinity[edge][:, side == side[there]] = 6
    return affinity


def test_propagation_fills_what_self_attention_links_and_nothing_else():
    image, maps = half_seen(linked_halves())
    mask = Propagation(num_steps=12, spread=0.9, method="fixed", level=0.2).refine(image, maps)[0]
    plain = Threshold(method="fixed", level=0.2).refine(image, maps)[0]
    assert mask[:48, :28].all(), "propagation continues below the cells that have attention"
    assert not mask[:, 40:].any(), "and not to the other half"
    assert plain.sum() < 0.8 * mask.sum()


def many_words(count, height=160, width=224):
    """Maps with a peak each at places of chance, two of them equal and one flat, and an image of colours."""
    rng = np.random.default_rng(0)
    weights = np.zeros((count, 10, 14))
    weights[range(count), rng.integers(10, size=count), rng.integers(14, size=count)] = 9
    weights = gaussian_filter(weights, (0, 1.5, 1.5)) + gaussian_filter(rng.random(weights.shape), (0, 1, 1)) / 4
    weights[1], weights[2] = weights[0], 0.5
    image = (gaussian_filter(rng.random((height, width, 3)), (5, 5, 0)) * 2000 % 255).astype(np.uint8)
    affinity = rng.random((len(AFFINITY_OFFSETS), 10, 14)) * 4
    return image, Maps(tuple(map(str, range(count))), weights.astype(np.float16), affinity.astype(np.float16))


@pytest.mark.parametrize("level", [None, 0.0, 0.6])
def test_words_compete_as_if_all_were_compared_at_once(level):
    fields = scaled(many_words(7)[1].weights)
    fine = resize(fields, (160, 224))
    levels = np.array([otsu_level(field) if level is None else level for field in fields])[:, None, None]
    together = (fine > levels) & (fine.argmax(axis=0) == np.arange(7)[:, None, None])
    assert (above_level(fields, level, (160, 224)) == together).all()
    assert together.any(axis=(1, 2)).tolist() == [True, False, False, True, True, True, True]


def test_the_highest_two_fields_are_those_of_a_sort():
    fields = np.random.default_rng(0).integers(0, 4, (6, 30, 40)).astype(np.float32)  # many are equal, or 0
    leader, highest, second = highest_two(lambda number: fields[number], 6, (30, 40))
    ordered = np.sort(fields, axis=0)
    assert (highest == ordered[-1]).all()
    assert (second == ordered[-2]).all()
    assert (leader == np.where(ordered[-1] > 0, fields.argmax(axis=0), -1)).all()


@pytest.mark.parametrize(
    ("refiner", "scale"),
    [(Threshold(), 2), (Propagation(), 2), (GrabCut(num_iterations=1), 1), (AttentionCut(max_size=16, cuts=1), 3)],
)
def test_memory_is_that_of_the_masks_and_a_few_fields_however_many_words(refiner, scale):
    image, maps = many_words(40, 120 * scale, 168 * scale)
    refiner.refine(image, many_words(3)[1])
    tracemalloc.start()
    masks = refiner.refine(image, maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masks.any()
    assert peak < 120 * masks[0].nbytes  # all words in float32 would be 160 alone, and were two or three times as much


def test_propagation_without_steps_is_the_threshold():
    image, maps = half_seen(linked_halves())
    assert (Propagation(num_steps=0).refine(image, maps) == Threshold().refine(image, maps)).all()


def test_an_object_whose_parts_attract_different_words_goes_to_one():
    """Two squares on noise; one word has the rims of both, the other their insides, with more on the second."""
    size, grid = 96, 12
    left, right = np.zeros((2, grid, grid), bool)
    left[3:9, 1:5] = right[3:9, 7:11] = True
    inside = (left | right) & np.isin(np.arange(grid), (2, 3, 8, 9))
    rims = (left | right) & ~inside
    weights = np.full((2, grid, grid), 0.05)
    weights[0][rims & left], weights[0][rims & right] = 1.0, 0.8
    weights[1][inside & left], weights[1][inside & right] = 0.7, 1.0
    affinity = np.zeros((len(AFFINITY_OFFSETS), grid, grid))
    thing = left + 2 * right
    for edge, (dy, dx) in enumerate(AFFINITY_OFFSETS):
        affinity[edge] = np.where(thing == np.roll(thing, (-dy, -dx), axis=(0, 1)), 5.0, 0.0)
    seen = (left | right).repeat(8, axis=0).repeat(8, axis=1)
    image = np.where(seen[..., None], 200, 40) + np.random.default_rng(0).integers(0, 20, (size, size, 3))
    maps = Maps(("rim", "inside"), weights.astype(np.float16), affinity.astype(np.float16))
    first, second = AttentionCut().refine(image.astype(np.uint8), maps)
    assert (first == left.repeat(8, axis=0).repeat(8, axis=1)).mean() > 0.98
    assert (second == right.repeat(8, axis=0).repeat(8, axis=1)).mean() > 0.98
    torn, _ = AttentionCut(object_steps=0).refine(image.astype(np.uint8), maps)
    assert (torn & right.repeat(8, axis=0).repeat(8, axis=1)).sum() > 300, "cell by cell the first has of both"


@pytest.mark.parametrize("options", [{"num_steps": -1}, {"spread": 1.5}, {"level": 1.0}])
def test_propagation_refuses_invalid_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Propagation(**options)


def test_grabcut_takes_the_colour_of_its_seeds():
    rng = np.random.default_rng(0)
    image = rng.normal(60, 8, (64, 64, 3))
    image[16:48, 16:48] += 120
    weights = np.zeros((1, 8, 8), np.float16)
    weights[0, 3:5, 3:5] = 1  # the middle of the square alone
    weights[0, 2:6, 2:6] += 0.3
    maps = Maps(("square",), weights, np.ones((len(AFFINITY_OFFSETS), 8, 8), np.float16))
    mask = GrabCut().refine(image.clip(0, 255).astype(np.uint8), maps)[0]
    truth = np.zeros((64, 64), bool)
    truth[16:48, 16:48] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.95


@pytest.mark.parametrize("options", [{"inside": 0.1, "outside": 0.2}, {"num_iterations": 0}])
def test_grabcut_refuses_invalid_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GrabCut(**options)


def test_without_opencv_the_error_names_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "synthgen.refiners.grabcut")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependency, match="pip install opencv-python-headless"):
        REFINERS.build(Choice("grabcut"))


def test_side_means_divide_at_otsu():
    values = np.array([[0.0, 0.1], [0.8, 1.0]])
    assert 0.1 < otsu_level(values) < 0.8
    assert side_means(values) == pytest.approx((0.05, 0.9))
    assert side_means(np.full((2, 2), 0.5)) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("size", "cells", "max_size", "grids"),
    [
        ((128, 128), (16, 16), 128, [(128, 128)]),
        ((512, 512), (16, 16), 512, [(128, 128), (256, 256), (512, 512)]),
        ((512, 768), (64, 96), 128, [(85, 128)]),
        ((300, 500), (16, 27), 400, [(120, 200), (240, 400)]),
        ((100, 50), (16, 8), 128, [(100, 50)]),
        ((16, 16), (16, 16), 128, [(16, 16)]),
        ((8, 8), (16, 16), 128, [(8, 8)]),
    ],
)
def test_pixel_grids_go_from_the_maps_to_the_image(size, cells, max_size, grids):
    assert pixel_grids(size, cells, max_size) == grids


class Plain(AttentionCut):
    """AttentionCut as it is where numba is not installed."""

    solver = MaximumFlow


@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_the_same_masks_without_numba(size):
    pytest.importorskip("numba")
    for seed in range(4):
        generation, _ = make_generation(words=("disc", "box", "ring")[: 1 + seed % 3], seed=seed)
        image = np.asarray(Image.fromarray(generation.image).resize(size))
        fast, plain = (refiner.refine(image, generation.maps) for refiner in (AttentionCut(), Plain()))
        assert fast.any()
        assert (fast == plain).all()


def test_parts_without_a_pixel_of_their_label_are_reset():
    start = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 2], [0, 1, 1, 1, 2], [0, 1, 1, 1, 2]])
    labels = np.array([[0, 0, 1, 0, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 2], [1, 1, 1, 0, 2]])
    kept = labels.copy()
    kept[0, 4], kept[2, 1] = 0, 1  # a spot of the word beside it, a hole in it
    assert (anchored(labels, start, 3) == kept).all()
    assert (anchored(start, start, 3) == start).all()


def test_a_spot_of_the_objects_colour_beside_it_is_not_masked():
    image = np.full((128, 128, 3), 90, dtype=np.uint8)
    image[48:80, 40:72] = image[60:68, 82:88] = (200, 60, 60)
    cells = np.zeros((16, 16))
    cells[6:10, 5:9] = 1
    weights = gaussian_filter(cells, 1.0)[None].astype(np.float16)
    maps = Maps(("box",), weights, np.ones((len(AFFINITY_OFFSETS), 16, 16), np.float16))
    (mask,) = AttentionCut().refine(image, maps)
    assert mask[48:80, 40:72].all()
    assert mask.sum() == 32 * 32


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 6, 9, 24])
def test_near_border_is_where_the_labels_around_differ(reach):
    rng = np.random.default_rng(reach)
    labels = np.kron(rng.integers(0, 3, (3, 4)), np.ones((11, 9), int))
    labels[rng.integers(33, size=2), rng.integers(36, size=2)] = 3
    around = 2 * reach + 1
    assert (near_border(labels, reach) == (maximum_filter(labels, around) != minimum_filter(labels, around))).all()
    assert not near_border(np.ones((5, 1), int), reach).any()


def test_labels_enlarged_twice_are_those_of_the_larger_share():
    labels = np.random.default_rng(0).integers(0, 4, (9, 13))
    shares = resize((labels == np.arange(4)[:, None, None]).astype(np.float32), (18, 26))
    assert (enlarged(labels, 4, (18, 26)) == shares.argmax(axis=0)).all()


@pytest.mark.parametrize("size", [(5, 7), (10, 14), (13, 7), (40, 33), (5, 30)])
def test_resize_enlarges_as_pillow_does(size):
    layers = np.random.default_rng(0).random((2, 5, 7), dtype=np.float32)
    pillow = [np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BILINEAR)) for one in layers]
    assert resize(layers, size) == pytest.approx(np.stack(pillow), abs=1e-6)
