"""What every refiner must do, and what the cut must do better than a threshold."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners import REFINERS
from synthgen.refiners._words import otsu_level, resize, scaled
from tests.factories import make_generation

NAMES = REFINERS.names()


def make_maps(weights, affinity=None):
    weights = np.asarray(weights, dtype=np.float16)
    if affinity is None:
        affinity = np.ones((len(AFFINITY_OFFSETS), *weights.shape[1:]))
    return Maps(tuple(f"word{k}" for k in range(len(weights))), weights, np.asarray(affinity, dtype=np.float16))


def peak(height, width, row, column, spread):
    y, x = np.mgrid[:height, :width] + 0.5
    return np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * spread**2))


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def texture(rng, size, base, grain):
    noise = np.stack([gaussian_filter(rng.normal(size=(size, size)), s) * s for s in (1, 2, 3)], axis=2)
    return np.clip(base + grain * noise + rng.normal(0, 0.02, (size, size, 3)), 0, 1)


def make_scene(seed, num_words, size=64, grid=16):
    """Shapes of their own colour on a texture; maps as a model gives them: coarse, blurred, uneven and noisy."""
    rng = np.random.default_rng(seed)
    colors = rng.permutation([(0.8, 0.2, 0.2), (0.2, 0.3, 0.8), (0.9, 0.8, 0.2), (0.2, 0.6, 0.3), (0.9, 0.9, 0.9)])
    image = texture(rng, size, colors[0] * 0.5 + 0.25, 0.15)
    y, x = np.mgrid[:size, :size] + 0.5
    truth = []
    for k in range(num_words):
        row, radius = size * rng.uniform(0.4, 0.6), size * rng.uniform(0.2, 0.3) / (1 if num_words == 1 else 1.4)
        column = size * ((k + 0.5) / num_words + rng.uniform(-0.04, 0.04))
        dy, dx = (y - row) / radius, (x - column) / radius
        shape = int(rng.integers(3))
        mask = [dy**2 + dx**2 < 1, np.maximum(abs(dy), abs(dx)) < 0.85, abs(dy) + abs(dx) < 1.2][shape]
        mask &= ~np.any(truth, axis=0) if truth else True
        image[mask] = texture(rng, size, colors[k + 1], 0.05)[mask]
        truth.append(mask)
    coarse = np.stack(
        [np.asarray(Image.fromarray(m.astype(np.float32)).resize((grid, grid), Image.Resampling.BOX)) for m in truth]
    )
    weights = []
    for each in coarse:
        soft = gaussian_filter(each * rng.uniform(0.6, 1.0, (grid, grid)), 1.0)
        weights.append(np.clip(soft / soft.max() + rng.normal(0, 0.12, (grid, grid)), 0, None) * 0.2)
    affinity = np.zeros((len(AFFINITY_OFFSETS), grid, grid))
    where = gaussian_filter(coarse, (0, 0.7, 0.7))
    for edge, (dy, dx) in enumerate(AFFINITY_OFFSETS):
        far = np.square(where - np.roll(where, (-dy, -dx), axis=(1, 2))).sum(axis=0)
        affinity[edge] = 8 * np.exp(-2 * far - np.hypot(dy, dx) / 3 + rng.normal(0, 0.4, (grid, grid)))
    return (image * 255).astype(np.uint8), make_maps(weights, affinity), np.stack(truth)


@pytest.fixture(params=NAMES)
def refiner(request):
    return REFINERS.build(request.param)


def check(refiner, image, maps):
    """Refine without a warning, and check what every answer owes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = refiner.refine(image, maps)
    assert masks.shape == (len(maps.words), *image.shape[:2])
    assert masks.dtype == bool
    assert masks.sum(axis=0).max(initial=0) <= 1, "words share a pixel"
    return masks


def test_the_family_has_its_parts():
    assert {"threshold", "attentioncut"} <= set(NAMES)


@pytest.mark.parametrize("words", [("disc",), ("disc", "square")])
def test_masks_are_where_the_words_are(refiner, words):
    generation, truth = make_generation(words=words)
    masks = check(refiner, generation.image, generation.maps)
    assert min(iou(mask, true) for mask, true in zip(masks, truth, strict=True)) > 0.6


def test_repeats_and_leaves_its_input_alone(refiner):
    image, maps, _ = make_scene(0, 2)
    before = image.copy(), maps.weights.copy(), maps.affinity.copy()
    first = check(refiner, image, maps)
    assert (first == check(refiner, image, maps)).all()
    assert all((a == b).all() for a, b in zip(before, (image, maps.weights, maps.affinity), strict=True))


def test_survives_pickling(refiner):
    image, maps, _ = make_scene(1, 1)
    copy = pickle.loads(pickle.dumps(refiner))
    assert copy == refiner
    assert (check(copy, image, maps) == check(refiner, image, maps)).all()


@pytest.mark.parametrize(
    ("height", "width", "h", "w"), [(64, 64, 16, 16), (50, 77, 16, 16), (90, 33, 24, 8), (300, 200, 16, 12)]
)
def test_any_size(refiner, height, width, h, w):
    rng = np.random.default_rng(0)
    truth = peak(height, width, height * 0.4, width * 0.6, min(height, width) / 4) > 0.5
    image = np.where(truth[..., None], (200, 60, 60), (60, 90, 60)) + rng.integers(0, 20, (height, width, 3))
    weights = np.asarray(Image.fromarray(truth.astype(np.float32)).resize((w, h), Image.Resampling.BOX))[None]
    (mask,) = check(refiner, image.astype(np.uint8), make_maps(weights))
    assert iou(mask, truth) > 0.6


def test_centre_stays_where_it_was(refiner):
    """Half a cell of shift would show: the mask of a symmetric map is symmetric about the same point."""
    image = np.full((96, 96, 3), 128, dtype=np.uint8)
    (mask,) = check(refiner, image, make_maps(peak(16, 16, 8, 8, 2.5)[None]))
    y, x = np.nonzero(mask)
    assert mask.any()
    assert abs(y.mean() + 0.5 - 48) < 1
    assert abs(x.mean() + 0.5 - 48) < 1


def test_no_words(refiner):
    check(refiner, np.zeros((32, 48, 3), np.uint8), make_maps(np.zeros((0, 16, 16))))


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_a_flat_map_says_nothing(refiner, value):
    image, maps, _ = make_scene(2, 1)
    assert not check(refiner, image, make_maps(np.full((1, 16, 16), value))).any()
    flat_beside = np.concatenate([np.full((1, 16, 16), value, np.float16), maps.weights])
    masks = check(refiner, image, make_maps(flat_beside, maps.affinity))
    assert not masks[0].any()
    assert (masks[1] == check(refiner, image, maps)[0]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 2), (5, 200), (16, 16), (7, 7)])
@pytest.mark.parametrize("grid", [(16, 16), (1, 1), (1, 8), (8, 1), (2, 2), (3, 5)])
def test_thin_and_tiny(refiner, shape, grid):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    for words in (1, 2):
        check(refiner, image, make_maps(rng.random((words, *grid))))


@pytest.mark.parametrize("affinity", [0.0, 1.0, 100.0])
def test_one_colour_and_any_affinity(refiner, affinity):
    image = np.full((64, 64, 3), 200, dtype=np.uint8)
    maps = make_maps(peak(16, 16, 6, 9, 3)[None], np.full((len(AFFINITY_OFFSETS), 16, 16), affinity))
    (mask,) = check(refiner, image, maps)
    assert 0.02 < mask.mean() < 0.6


def test_equal_maps_and_noise(refiner):
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    check(refiner, image, make_maps(np.repeat(peak(16, 16, 8, 8, 3)[None], 3, axis=0)))
    check(refiner, image, make_maps(rng.random((4, 16, 16)), rng.random((len(AFFINITY_OFFSETS), 16, 16)) * 9))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_maps_are_refused(refiner, value):
    weights = np.zeros((1, 16, 16))
    weights[0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        refiner.refine(np.zeros((32, 32, 3), np.uint8), make_maps(weights))


def test_unknown_options_are_refused(refiner):
    name = type(refiner).__module__.rpartition(".")[2]
    with pytest.raises(ConfigError, match="unknown setting"):
        REFINERS.build(Choice(name, {"no_such_option": 1}))


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("threshold", {"method": "median"}, "method"),
        ("threshold", {"level": 1.0}, "level"),
        ("threshold", {"level": -0.1}, "level"),
        ("threshold", {"level": float("nan")}, "level"),
        ("attentioncut", {"smoothness": -1.0}, "smoothness"),
        ("attentioncut", {"smoothness": float("inf")}, "smoothness"),
        ("attentioncut", {"smoothness": "much"}, "smoothness"),
        ("attentioncut", {"affinity": float("nan")}, "affinity"),
        ("attentioncut", {"num_steps": 1.5}, "num_steps"),
        ("attentioncut", {"num_steps": -1}, "num_steps"),
        ("attentioncut", {"spread": 1.1}, "spread"),
        ("attentioncut", {"level": 1.5}, "level"),
        ("attentioncut", {"softness": 0.0}, "softness"),
        ("attentioncut", {"rivalry": -1.0}, "rivalry"),
        ("attentioncut", {"object_spread": 1.5}, "object_spread"),
        ("attentioncut", {"floor": 0.0}, "floor"),
        ("attentioncut", {"floor": 0.5}, "floor"),
        ("attentioncut", {"max_size": 4}, "max_size"),
    ],
)
def test_options_out_of_range_are_refused(name, options, named):
    with pytest.raises(ConfigError, match=named) as refusal:
        REFINERS.build(Choice(name, options))
    assert "\n" not in str(refusal.value)


def test_fixed_level_is_a_level():
    weights = np.linspace(0, 1, 64).reshape(1, 1, 64).repeat(4, axis=1)
    image = np.zeros((4, 64, 3), np.uint8)
    for level in (0.0, 0.25, 0.75):
        (mask,) = REFINERS.build(Choice("threshold", {"method": "fixed", "level": level})).refine(
            image, make_maps(weights)
        )
        assert mask.mean() == pytest.approx(1 - level, abs=0.02)


def test_otsu_level_leaves_the_least_variance():
    for seed in range(20):
        values = np.random.default_rng(seed).beta(0.4, 0.8, (4, 5)).round(1 if seed % 2 else 6)
        low, high = values[values <= otsu_level(values)], values[values > otsu_level(values)]
        found = low.size * low.var() + high.size * high.var()
        for level in np.unique(values)[:-1]:
            low, high = values[values <= level], values[values > level]
            assert found <= low.size * low.var() + high.size * high.var() + 1e-9
    assert otsu_level(np.full((2, 2), 0.3)) == 0.3


def test_scaled_maps_span_zero_to_one():
    maps = scaled(np.array([[[2, 4], [3, 2]], [[1, 1], [1, 1]]], dtype=np.float16))
    assert maps.tolist() == [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]]


def test_resize_is_linear_between_cell_centres():
    ramp = np.arange(8, dtype=float)[None, None].repeat(3, axis=1)  # cell x holds x, so its centre x + 1/2 does
    wide = resize(ramp, (3, 64))[0]
    centres = (np.arange(64) + 0.5) / 8 - 0.5
    assert wide == pytest.approx(np.clip(centres, 0, 7)[None].repeat(3, axis=0), abs=1e-5)
    tall = np.arange(12, dtype=float).reshape(1, 4, 3)
    assert (resize(tall, (4, 3)) == tall).all()
    assert resize(tall, (2, 3))[0, 0].mean() < resize(tall, (2, 3))[0, 1].mean()  # upright


@pytest.mark.parametrize("column", [28, 30, 32, 35])
def test_outline_follows_the_colours(column):
    """The attention ends about pixel 32, give or take a cell; the colours tell where exactly."""
    image = np.full((64, 64, 3), 90, dtype=np.uint8)
    image[:, :column] = 160
    weights = np.clip((7.5 - np.arange(16)) / 4 + 0.5, 0, 1)[None, None].repeat(16, axis=1)
    contrast_alone = REFINERS.build(Choice("attentioncut", {"palette": 0.0, "level": 0.5}))
    (mask,) = contrast_alone.refine(image, make_maps(weights))
    assert (mask == (np.arange(64) < column)).all()


def test_no_cut_takes_all_or_nothing():
    image, maps, _ = make_scene(5, 2)
    for options in ({"affinity": 1e3}, {"color": 1e3}):
        masks = check(REFINERS.build(Choice("attentioncut", options)), image, maps)
        assert masks.any(axis=(1, 2)).all()
        assert not masks.any(axis=0).all()


def test_small_objects_survive_the_cut():
    image = np.full((128, 128, 3), (40, 60, 40), dtype=np.uint8)
    truth = peak(128, 128, 60, 70, 6) > 0.5
    image[truth] = (220, 200, 60)
    (mask,) = REFINERS.build("attentioncut").refine(image, make_maps(peak(16, 16, 7.5, 8.75, 1.0)[None]))
    assert iou(mask, truth) > 0.8


def test_self_attention_decides_where_colour_cannot():
    """Half the object is dim in cross-attention; only self-attention says that the other half belongs to it."""
    image = np.full((64, 64, 3), 128, dtype=np.uint8)
    truth = np.zeros((16, 16), dtype=bool)
    truth[4:12, 4:12] = True
    weights = np.where(truth, np.where(np.arange(16) < 8, 1.0, 0.4), 0.0)[None]
    affinity = np.zeros((len(AFFINITY_OFFSETS), 16, 16))
    for edge, (dy, dx) in enumerate(AFFINITY_OFFSETS):
        affinity[edge] = np.where(truth == np.roll(truth, (-dy, -dx), axis=(0, 1)), 4.0, 0.1)
    fine = truth.repeat(4, axis=0).repeat(4, axis=1)
    maps = make_maps(weights, affinity)
    walks, stays = (
        REFINERS.build(Choice("attentioncut", {"num_steps": steps, "spread": 0.5})).refine(image, maps)[0]
        for steps in (8, 0)
    )
    assert iou(walks, fine) > 0.85
    assert iou(walks, fine) > iou(stays, fine) + 0.2


@pytest.mark.parametrize(("num_words", "least", "gain"), [(1, 0.9, 0.1), (2, 0.85, 0.15)])
def test_the_cut_beats_the_threshold(num_words, least, gain):
    scores = {name: [] for name in ("threshold", "attentioncut")}
    for seed in range(20):
        image, maps, truth = make_scene(seed, num_words)
        for name, values in scores.items():
            masks = REFINERS.build(name).refine(image, maps)
            values.append(np.mean([iou(mask, true) for mask, true in zip(masks, truth, strict=True)]))
    otsu, cut = np.array(scores["threshold"]), np.array(scores["attentioncut"])
    assert cut.mean() > least
    assert cut.mean() > otsu.mean() + gain
    assert (cut > otsu).mean() >= 0.9
