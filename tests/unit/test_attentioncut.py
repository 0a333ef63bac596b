"""The parts of AttentionCut: probabilities between cell centres, and colour histograms."""

from __future__ import annotations

import numpy as np
import pytest

from synthgen.records import AFFINITY_OFFSETS, Maps
from synthgen.refiners._palette import Palette, nearest_windows
from synthgen.refiners.attentioncut import AttentionCut, upsampled


def halves(width=64):
    """Weights of two labels that are sure of the left and the right half."""
    left = np.where(np.arange(width) < width // 2, 0.99, 0.01)[None].repeat(width, axis=0)
    return np.stack([left, 1 - left]).astype(np.float32)


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def test_log_odds_are_linear_between_the_cells():
    share = upsampled(np.array([[[0.9, 0.1]], [[0.1, 0.9]]]), (1, 16))
    assert share.sum(axis=0) == pytest.approx(np.ones((1, 16)), abs=1e-6)
    odds = np.log(share[0, 0] / share[1, 0])
    assert np.diff(odds)[4:11] == pytest.approx(np.full(7, -2 * np.log(9) / 8), abs=1e-4)
    assert odds[[0, -1]] == pytest.approx([np.log(9), -np.log(9)], abs=1e-4)


@pytest.mark.parametrize(("size", "count"), [(16, 5), (5, 5), (3, 1), (1, 1), (128, 4)])
def test_nearest_windows_lie_around_a_pixel(size, count):
    (before, low), (after, high) = nearest_windows(size, count)
    assert low + high == pytest.approx(np.ones(size))
    place = (np.arange(size) + 0.5) * count / size - 0.5
    assert before * low + after * high == pytest.approx(np.clip(place, 0, count - 1), abs=1e-5)


def test_colours_that_separate_nothing_have_no_unary():
    one_colour = np.full((64, 64, 3), 90, np.uint8)
    even = np.full((2, 64, 64), 0.5, np.float32)
    assert Palette(one_colour).nll(halves()) == pytest.approx(np.zeros((2, 64, 64)), abs=1e-4)
    assert Palette(noise((64, 64))).nll(even) == pytest.approx(np.zeros((2, 64, 64)), abs=1e-6)


def test_colours_that_separate_all_have_unaries_in_nats():
    image = np.full((64, 64, 3), 40, np.uint8)
    image[:, 32:] = 200
    vote = Palette(image).nll(halves())
    assert (vote[0] == 0).all(), "prices count from label 0's"
    assert (vote[1, :, :32] > 2).all()
    assert (vote[1, :, 32:] < -2).all()


def test_colour_histograms_are_local():
    """Grey squares on black above, black squares on grey below: no palette of the whole image tells which is which."""
    truth = np.zeros((128, 128), bool)
    truth[16:40, 48:80] = truth[88:112, 48:80] = True
    upper = (np.arange(128) < 64)[:, None]
    image = (np.where((truth == upper)[..., None], 150, 30) + noise((128, 128)) // 8).astype(np.uint8)
    inside = np.where(truth, 0.9, 0.1)
    vote = Palette(image).nll(np.stack([1 - inside, inside]).astype(np.float32))
    assert (vote[1][truth] < 0).mean() > 0.95
    assert (vote[1][~truth & (abs(np.arange(128) - 64) > 24)[:, None]] > 0).mean() > 0.95


def test_a_small_object_does_not_take_a_large_one():
    """A word with concentrated attention has a larger share of it there; that alone makes no cell its own."""
    weights = np.full((2, 16, 16), 0.02)
    weights[0, 2:14, 2:9] = 1.0  # the large one
    weights[1, 6:10, 10:13] = 1.0  # the small one
    weights[1, 2:14, 7:9] = 0.6  # and, less than the other, a side of the large one
    image = np.full((128, 128, 3), 90, np.uint8)
    affinity = np.ones((len(AFFINITY_OFFSETS), 16, 16), np.float16)
    large, small = AttentionCut().refine(image, Maps(("large", "small"), weights.astype(np.float16), affinity))
    assert large[24:104, 24:64].all()
    assert not small[24:104, 24:64].any()
    assert small[56:72, 88:96].all()


def test_rounding_in_a_grey_image_separates_nothing(monkeypatch):
    """Two axes of its colours have no variance: another LAPACK puts them elsewhere, and the bins are the same."""
    grey = noise((64, 64))[:, :, :1].repeat(3, axis=2)
    found = Palette(grey).bins
    assert len(np.unique(found)) <= 8
    eigh, turn = np.linalg.eigh, np.array([[0.6, 0.8], [-0.8, 0.6]])

    def other(matrix):
        variance, axes = eigh(matrix)
        return variance, np.concatenate([axes[:, :2] @ turn, axes[:, 2:]], axis=1)

    monkeypatch.setattr(np.linalg, "eigh", other)
    assert (Palette(grey).bins == found).all()
