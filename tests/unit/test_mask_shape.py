"""What is read off masks alone, held against counting by hand and against SciPy's own labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from synthgen.mask_shape import MIN_OBJECT, UNKNOWN, box, describe_masks, split
from synthgen.records import WordMasks


def one_mask(mask: np.ndarray, **figures: object) -> WordMasks:
    return WordMasks(("thing",), mask[None], np.array([0.25], np.float32), ("",), **figures)


def random_mask(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(size=(40, 56)), rng.uniform(0.5, 4)) > rng.uniform(-0.05, 0.1)


def test_two_squares_and_a_speck() -> None:
    mask = np.zeros((20, 40), bool)
    mask[2:8, 3:9] = True  # 36 pixels
    mask[10:20, 30:40] = True  # 100 pixels, at two borders
    mask[0, 20] = True  # less than a tenth of 100
    (described,) = describe_masks(one_mask(mask))
    assert described["area"] == pytest.approx(137 / 800)
    assert described["box"] == [3, 0, 40, 20]
    assert described["touches_border"] is True
    assert described["components"] == 3  # one pixel is more than 0.05 % of these 800
    assert described["instances"] == [
        {"area": pytest.approx(100 / 800), "box": [30, 10, 40, 20]},
        {"area": pytest.approx(36 / 800), "box": [3, 2, 9, 8]},
    ]
    (whole,) = describe_masks(one_mask(mask), instances=False)
    assert whole["instances"] == [{"area": pytest.approx(137 / 800), "box": [3, 0, 40, 20]}]
    assert {key: whole[key] for key in whole if key != "instances"} == {
        key: described[key] for key in described if key != "instances"
    }


def test_specks_are_no_components() -> None:
    mask = np.zeros((100, 100), bool)  # 0.05 % of it are five pixels
    mask[10:50, 10:50] = True
    mask[80, 10:14] = True
    mask[90, 10:15] = True
    (described,) = describe_masks(one_mask(mask))
    assert (described["components"], len(described["instances"])) == (2, 1)
    assert described["touches_border"] is False


def test_pixels_that_meet_at_a_corner_are_one_part() -> None:
    mask = np.eye(6, dtype=bool)
    assert [part.sum() for part in split(mask)] == [6]
    (described,) = describe_masks(one_mask(mask))
    assert (described["components"], len(described["instances"])) == (1, 1)


def test_an_empty_mask_has_zeros_and_unmeasured_figures_are_unknown() -> None:
    (described,) = describe_masks(one_mask(np.zeros((8, 8), bool)))
    assert described == {
        "word": "thing", "value": 1, "score": 0.25, "confidence": UNKNOWN, "area": 0.0, "box": [0, 0, 0, 0],
        "touches_border": False, "components": 0, "instances": [], "sharpness": UNKNOWN, "disagreement": UNKNOWN,
        "dropped": "",
    }  # fmt: skip
    half = np.array([0.5], np.float32)
    (described,) = describe_masks(one_mask(np.ones((8, 8), bool), confidence=half, sharpness=half, disagreement=half))
    assert [described[name] for name in ("confidence", "sharpness", "disagreement")] == [0.5, 0.5, 0.5]


def test_no_words() -> None:
    assert describe_masks(WordMasks((), np.zeros((0, 8, 8), bool), np.zeros(0, np.float32))) == []


@pytest.mark.parametrize("seed", range(8))
def test_objects_are_scipys_parts_above_the_share(seed: int) -> None:
    mask = random_mask(seed)
    labels, num = ndimage.label(mask, np.ones((3, 3)))
    sizes = sorted(((labels == number).sum() for number in range(1, num + 1)), reverse=True)
    objects = split(mask)
    assert [part.sum() for part in objects] == [size for size in sizes if size >= MIN_OBJECT * sizes[0]]
    assert np.sum(objects, axis=0).max() == 1
    assert not (np.any(objects, axis=0) & ~mask).any()
    (described,) = describe_masks(one_mask(mask))
    assert [tuple(one["box"]) for one in described["instances"]] == [box(part) for part in objects]
    assert [one["area"] for one in described["instances"]] == pytest.approx([part.mean() for part in objects], abs=1e-6)
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert described["touches_border"] == edge.any()
    left, top, right, bottom = described["box"]
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert mask[:, left].any() and mask[:, right - 1].any() and mask[top].any() and mask[bottom - 1].any()  # noqa: PT018
