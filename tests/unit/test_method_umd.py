"""UMD: the loss, the noise schedule, and sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthgen.errors import ConfigError
from synthgen.methods.umd import cosine_schedule
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import patchify, take
from tests.methods import build, make_batch, train


def test_the_loss_is_its_formula():
    method, batch = build("umd"), make_batch(4)
    train(method, batch, 3)  # so that the time matters
    patches = patchify(batch.images, 4)
    lot, seeds = uniform(batch.seeds, 64), batch.seeds
    order = lot.argsort(1)
    left = cosine_schedule(1000)
    total = 0.0
    with torch.no_grad():
        for image in range(2):
            level = int(uniform(seeds[image : image + 1], stream=1) * 1000)
            noise = normal(seeds[image : image + 1], 64, 48, stream=2)
            visible, hidden = order[image : image + 1, :40], order[image : image + 1, 40:]
            x = patches[image : image + 1]
            noised = left[level].sqrt() * x + (1 - left[level]).sqrt() * noise
            pixels, guess = method.run(noised, visible, hidden, torch.tensor([level + 1]))
            noise_error = ((guess[:, :40] - take(noise, visible)) ** 2).mean()
            total += float(noise_error + ((pixels[:, 40:] - take(x, hidden)) ** 2).mean()) / 2 / 4
        for image in (2, 3):
            visible, hidden = order[image : image + 1, :16], order[image : image + 1, 16:]
            x = patches[image : image + 1]
            pixels, _ = method.run(x, visible, hidden)
            total += float(((pixels[:, 16:] - take(x, hidden)) ** 2).mean()) / 4
    assert method(batch, 0.0).loss.item() == pytest.approx(total, rel=1e-5)


def test_the_noise_schedule_is_the_papers():
    """Standard deviations of the noise as the paper's code has them."""
    noise = (1 - cosine_schedule(1000)).sqrt()
    assert noise[[50, 100, 250, 500, 750]].tolist() == pytest.approx([0.091, 0.169, 0.393, 0.713, 0.926], abs=2e-3)


def test_hidden_patches_are_no_input():
    method, batch = build("umd"), make_batch()
    train(method, batch, 2)
    x = patchify(batch.images, 4)
    order = uniform(batch.seeds, 64).argsort(1)
    for count, times in ((16, None), (40, torch.tensor([1, 300, 700, 1000]))):
        visible, hidden = order[:, :count], order[:, count:]
        changed = x.scatter(1, hidden[:, :, None].expand(-1, -1, 48), 7.0)
        with torch.no_grad():
            before, after = method.run(x, visible, hidden, times), method.run(changed, visible, hidden, times)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


def test_the_encoder_is_plain_for_clean_images():
    """At time 0 nothing is modulated: the exported encoder is the one that was trained there."""
    method, batch = build("umd"), make_batch()
    train(method, batch, 3)
    x = patchify(batch.images, 4)
    vector = method.time(torch.tensor([5, 5, 5, 5]))
    with torch.no_grad():
        plain = method.encoder.encode(x)
        assert torch.equal(plain, method.encoder(batch.images))
        noisy = method.encoder.encode(x, None, [change(vector) for change in method.changes])
    assert not torch.allclose(plain, noisy, atol=1e-4)


def test_without_hiding_it_is_a_diffusion_model():
    method, batch = build("umd", noisy_mask_ratio=0.0, clean_share=0.0), make_batch()
    output = method(batch, 0.0)
    assert output.loss.item() == pytest.approx(
        float(output.metrics["noise_error"] + output.metrics["noisy_pixel_error"]) / 2
    )
    assert "clean_pixel_error" not in output.metrics


@pytest.mark.parametrize("num_steps", [1, 2, 7, 125, 300, 600, 1000])
def test_sampling_takes_num_steps(num_steps):
    method, times = build("umd"), []
    method.noise = lambda x, time, numbers=None: times.append(time) or torch.zeros_like(x)
    method.sample(torch.tensor([1]), num_steps)
    assert len(times) == num_steps
    assert (times[0], times[-1]) == (1000, 1 if num_steps > 1 else 1000)  # from pure noise to the least
    gaps = -np.diff(times)
    assert num_steps == 1 or 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1


def test_sampling():
    method = build("umd")
    images = method.sample(torch.tensor([1, 2, 1]), num_steps=4)
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"clean_share": 1.0}, "below 1"),
        ({"clean_mask_ratio": 0.0}, "must hide some"),
        ({"noisy_mask_ratio": 1.0}, "leave some visible"),
        ({"foreground_share": -0.5}, "at least 0 and at most 1"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build("umd", **options)
