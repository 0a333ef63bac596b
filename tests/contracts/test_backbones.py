"""What every backbone promises, on the shipped model and on small Stable Diffusions of random weights."""

import numpy as np
import pytest

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.prompts import parse_line
from synthgen.records import AFFINITY_OFFSETS, Request

LINES = ["a photo of a [dog]", "a photo of a [dog] and a [cat]", "nothing"]


@pytest.fixture(scope="module")
def options(stable_diffusion):
    """What a backbone is built with here, where its defaults are slow or need weights."""
    return {"tiny": {"num_steps": 2}, "diffusers": {"num_steps": 2, "model": str(stable_diffusion)}}


@pytest.fixture(scope="module", params=BACKBONES.names())
def backbone(request, options):
    return BACKBONES.build(Choice(request.param, options.get(request.param, {})))


def requests():
    return [Request(f"{row:010d}", parse_line(line), row) for row, line in enumerate(LINES)]


def test_images_maps_and_words_belong_together(backbone):
    for request, generation in zip(requests(), backbone.generate(requests()), strict=True):
        assert generation.request.key == request.key
        assert generation.image.dtype == np.uint8
        assert generation.image.shape[2] == 3
        words, rows, columns = generation.maps.weights.shape
        assert generation.maps.words == generation.request.prompt.words == request.prompt.words
        assert words == len(request.prompt.words)
        assert generation.maps.affinity.shape == (len(AFFINITY_OFFSETS), rows, columns)
        assert generation.maps.weights.dtype == generation.maps.affinity.dtype == np.float16
        assert ((generation.maps.weights >= 0) & (generation.maps.weights <= 1)).all()
        assert np.isfinite(generation.maps.affinity).all()
        height, width = generation.image.shape[:2]
        assert (height % rows, width % columns) == (0, 0)


def test_the_same_request_gives_the_same_bytes(backbone):
    for one, other in zip(backbone.generate(requests()), backbone.generate(requests()), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)
        np.testing.assert_array_equal(one.maps.affinity, other.maps.affinity)


def test_another_seed_gives_another_image(backbone):
    first, second = (Request("0000000000", parse_line(LINES[0]), seed) for seed in (1, 2))
    one, other = (backbone.generate([request])[0].image for request in (first, second))
    assert not np.array_equal(one, other)


def test_recording_changes_no_pixel(backbone):
    asked = requests()
    texts, seeds = [request.prompt.text for request in asked], [request.seed for request in asked]
    sampler = getattr(backbone, "family", backbone)
    if not hasattr(sampler, "sample"):
        pytest.skip("it cannot make an image without recording")
    plain, _ = sampler.sample(texts, seeds, [], recorded=False)
    for image, generation in zip(plain, backbone.generate(asked), strict=True):
        np.testing.assert_array_equal(image, generation.image)


@pytest.mark.parametrize("name", BACKBONES.names())
def test_bad_options_are_refused(name):
    with pytest.raises(ConfigError, match="num_stepz"):
        BACKBONES.complete(Choice(name, {"num_stepz": 2}), "device")
    with pytest.raises(ConfigError, match="num_steps"):
        BACKBONES.build(Choice(name, {"num_steps": 0}))


@pytest.mark.parametrize("name", BACKBONES.names())
def test_every_backbone_says_what_may_be_done_with_its_images(name):
    assert BACKBONES.load(name).licence.endswith(".")
