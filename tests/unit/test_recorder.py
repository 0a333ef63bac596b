"""Recorded attention against a softmax written out by hand over the same queries and keys."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthgen.attention.recorder import Recorder, _Tap, record
from synthgen.backbones.diffusers import Diffusers
from synthgen.prompts import parse_line
from synthgen.records import AFFINITY_OFFSETS, Request

LINES = ["a photo of a [dog]", "a [golden dog] and a [cat]", "the [park]"]


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return Diffusers(model=str(stable_diffusion), num_steps=3, guidance_scale=3.0, height=32, width=32).family


def requests(lines=LINES):
    return [Request(f"{index:010d}", parse_line(line), index) for index, line in enumerate(lines)]


class Witness:
    """An attention processor that keeps queries and keys of every call, then does what the model would do."""

    def __init__(self, inner, calls):
        self.inner, self.calls = inner, calls

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        self.calls.append(
            (attn.heads, encoder_hidden_states is None, attn.to_q(hidden_states).double(), attn.to_k(text).double())
        )
        return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def by_hand(model, guided):
    """Mean word maps (level 2 and 4) and affinity from written-out softmaxes, images x words x h x w."""
    unet = model.pipeline.unet
    calls, before = [], dict(unet.attn_processors)
    unet.set_attn_processor({name: Witness(inner, calls) for name, inner in before.items()})
    asked = requests()
    model.sample([request.prompt.text for request in asked], [request.seed for request in asked], [], recorded=False)
    unet.set_attn_processor(before)
    grids, affinity = {8: [], 4: []}, []
    for heads, own, q, k in calls:
        side = round(q.shape[1] ** 0.5)
        rows = []
        for image in range(len(asked)):
            row = image + len(asked) * guided  # the conditional half comes second
            dim = q.shape[-1] // heads
            maps = [
                torch.softmax(q[row][:, h * dim : (h + 1) * dim] @ k[row][:, h * dim : (h + 1) * dim].T / dim**0.5, -1)
                for h in range(heads)
            ]
            rows.append(torch.stack(maps).mean(0))
        if own and side == 8:
            affinity.append(torch.stack(rows))
        elif not own and side in grids:
            grids[side].append(torch.stack(rows))
    return {side: torch.stack(found).mean(0) for side, found in grids.items()}, torch.stack(affinity).mean(0)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_maps_equal_a_softmax_by_hand(model, guidance):
    model.sampling = replace(model.sampling, guidance_scale=guidance)
    grids, affinity = by_hand(model, guided=guidance > 1)
    generations = model.generate(requests())
    positions = [[(5,)], [(2, 3), (6,)], [(2,)]]
    for image, generation in enumerate(generations):
        for word, tokens in enumerate(positions[image]):
            fine = grids[8][image][:, list(tokens)].mean(1).reshape(1, 1, 8, 8)
            coarse = grids[4][image][:, list(tokens)].mean(1).reshape(1, 1, 4, 4)
            coarse = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)
            expected = ((fine + coarse) / 2)[0, 0].numpy()
            np.testing.assert_allclose(generation.maps.weights[word].astype(float), expected, atol=5e-5)  # float16
        for edge, (down, right) in enumerate(AFFINITY_OFFSETS):
            expected = np.zeros((8, 8))
            for y in range(8):
                for x in range(8):
                    if 0 <= y + down < 8 and 0 <= x + right < 8:
                        here, there = y * 8 + x, (y + down) * 8 + x + right
                        expected[y, x] = 32 * (affinity[image][here, there] + affinity[image][there, here])
            np.testing.assert_allclose(generation.maps.affinity[edge].astype(float), expected, atol=2e-3, rtol=2e-3)


def test_recorded_sums_are_exact_in_float32(model):
    model.sampling = replace(model.sampling, guidance_scale=3.0)
    grids, _ = by_hand(model, guided=True)
    asked = requests()
    _, recorder = model.sample([r.prompt.text for r in asked], [r.seed for r in asked], [[(5,)], [(2, 3)], [(2,)]])
    mean = recorder._cross[(8, 8)] / recorder._counts[(8, 8)]
    expected = torch.stack([grids[8][0][:, 5], grids[8][1][:, 2:4].mean(1), grids[8][2][:, 2]])
    torch.testing.assert_close(mean[:, 0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_recording_changes_no_pixel(model, guidance, size):
    model.sampling = replace(model.sampling, guidance_scale=guidance, height=size[0], width=size[1])
    generations = model.generate(requests())
    plain, _ = model.sample([r.prompt.text for r in requests()], [r.seed for r in requests()], [], recorded=False)
    model.sampling = replace(model.sampling, height=32, width=32)
    for image, generation in zip(plain, generations, strict=True):
        assert image.shape == (*size, 3)
        np.testing.assert_array_equal(image, generation.image)
        assert generation.maps.weights.shape[1:] == (size[0] // 4, size[1] // 4)


def test_recording_changes_no_pixel_in_bfloat16_and_with_slicing(stable_diffusion):
    model = Diffusers(model=str(stable_diffusion), num_steps=2, guidance_scale=3.0, dtype="bfloat16").family
    model.pipeline.enable_attention_slicing(1)
    asked = requests()
    plain, _ = model.sample([r.prompt.text for r in asked], [r.seed for r in asked], [], recorded=False)
    for image, generation in zip(plain, model.generate(asked), strict=True):
        np.testing.assert_array_equal(image, generation.image)


def test_an_image_does_not_depend_on_its_batch(model):
    together = model.generate(requests())
    for one, alone in zip(together, [model.generate([request])[0] for request in requests()], strict=True):
        assert np.abs(one.image.astype(int) - alone.image.astype(int)).max() <= 1
        np.testing.assert_allclose(one.maps.weights.astype(float), alone.maps.weights.astype(float), atol=2e-4)


def test_processors_are_restored_even_after_an_error(model):
    unet = model.pipeline.unet
    before = dict(unet.attn_processors)
    with pytest.raises(ZeroDivisionError), record(unet, Recorder((16, 16), [], lambda: False, cross_levels=(1, 2))):
        raise ZeroDivisionError
    assert unet.attn_processors == before


@pytest.mark.parametrize("kind", ["is_causal", "enable_gqa"])
def test_causal_and_grouped_attention_is_refused(kind):
    query = torch.zeros(1, 2, 4, 8)
    with _Tap(lambda seen: None), pytest.raises(RuntimeError, match="cannot be recorded"):
        F.scaled_dot_product_attention(query, query, query, **{kind: True})


def test_rows_of_a_grid_that_does_not_halve_evenly():
    recorder = Recorder((15, 9), [], lambda: False, cross_levels=(1, 2))
    assert [recorder.grid(level) for level in (1, 2, 4)] == [(15, 9), (8, 5), (4, 3)]


def test_words_that_were_cut_off_leave_the_record(model):
    long = Request("0000000000", parse_line("a [dog] and an [umbrella umbrella]"), 0)
    (generation,) = model.generate([long])
    assert generation.request.prompt.words == generation.maps.words == ("dog",)
    assert len(generation.warnings) == 2


def test_a_recorder_without_layers_on_its_grids_is_an_error(model):
    (asked, *_) = requests()
    model.selection, before = (
        replace(model.selection, layers=("mid_block",), cross_levels=(2,), self_level=2),
        model.selection,
    )
    try:
        _, recorder = model.sample([asked.prompt.text], [0], [[(5,)]])
    finally:
        model.selection = before
    for found, kind in ((recorder.weights, "cross"), (recorder.affinity, "self")):
        with pytest.raises(RuntimeError, match=f"no recorded layer has {kind}-attention on a 8 x 8 grid"):
            found()
