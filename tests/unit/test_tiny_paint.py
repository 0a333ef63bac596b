import colorsys

import numpy as np
import pytest

from synthgen.tiny.paint import COLOURS, paint

HUES = {"red": 0, "orange": 30, "yellow": 50, "green": 128, "blue": 223, "purple": 276}


def sprite(hue: float = 200, saturation: float = 0.8) -> np.ndarray:
    """A disc of one hue, darker downward, with a highlight, a gray rim and soft edges; premultiplied."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x, y)
    base = np.array(colorsys.hsv_to_rgb(hue / 360, saturation, 1))
    rgb = (0.9 - 0.3 * y)[..., None].clip(0, 1) * base
    rgb += 0.9 * np.exp(-((x + 0.3) ** 2 + (y + 0.3) ** 2) / 0.01)[..., None]
    rgb = np.where(radius[..., None] > 0.7, 0.4, rgb.clip(0, 1))
    alpha = ((0.95 - radius) * 20).clip(0, 1)[..., None]
    out = np.concatenate([rgb * alpha, alpha], axis=2)
    return (out * 255).round().astype(np.uint8)


@pytest.fixture
def disc():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    return np.hypot(x, y) < 0.65


@pytest.mark.parametrize("hue", [10, 45, 130, 200, 280, 330])
@pytest.mark.parametrize("colour", HUES)
def test_the_material_gets_the_hue(colour, hue, disc):
    mean = paint(sprite(hue), colour)[disc][:, :3].mean(0) / 255
    h, s, _ = colorsys.rgb_to_hsv(*mean)
    assert abs((h * 360 - HUES[colour] + 180) % 360 - 180) < 12
    assert s > 0.5


@pytest.mark.parametrize(("colour", "low", "high"), [("white", 180, 255), ("black", 0, 80)])
def test_white_and_black_are_grey_and_light_or_dark(colour, low, high, disc):
    mean = paint(sprite(), colour)[disc][:, :3].mean(0)
    assert np.ptp(mean) < 12
    assert low < mean.mean() < high


@pytest.mark.parametrize("colour", COLOURS)
def test_grey_parts_and_the_outline_are_unchanged(colour):
    before = sprite()
    after = paint(before, colour)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    rim = np.hypot(x, y) > 0.72
    assert np.abs(after[rim].astype(int) - before[rim]).max() <= 2
    assert np.array_equal(after[..., 3], before[..., 3])
    assert (after[..., :3] <= after[..., 3:]).all()


@pytest.mark.parametrize("colour", ["red", "green", "white"])
def test_shading_and_highlight_are_kept(colour):
    value = paint(sprite(), colour)[..., :3].astype(int).sum(2)
    assert value[22, 32] > 1.05 * value[48, 32]  # light above, shade below
    assert value[22, 22] >= value[:, :].max() - 30  # the highlight


def test_an_image_without_colour_is_unchanged():
    before = sprite(saturation=0)
    assert np.array_equal(paint(before, "red"), before)
    empty = np.zeros((8, 8, 4), dtype=np.uint8)
    assert np.array_equal(paint(empty, "red"), empty)


def test_a_hue_selects_another_material_than_the_dominant_one():
    two = np.concatenate([sprite(200), sprite(200), sprite(40)], axis=1)
    after = paint(two, "red", hue=40)
    assert np.array_equal(after[:, :128], two[:, :128])
    assert np.array_equal(after[:, 128:], paint(sprite(40), "red", hue=40))
    assert np.array_equal(paint(two, "red", hue=300), two)  # no part has this hue


def test_the_argument_is_not_changed():
    before = sprite()
    paint(before, "red")
    assert np.array_equal(before, sprite())
