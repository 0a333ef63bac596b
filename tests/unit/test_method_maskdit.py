"""MaskDiT: its loss against loops, what hides, what the noise changes, and the sampler against a known solution."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.methods._hiding import coverage
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import Modulation, patchify, take
from synthgen.models.vit import EncoderConfig, VisionTransformer, load_encoder

CONFIG = EncoderConfig(image_size=32, patch_size=4, dim=32, depth=2, num_heads=4)


def build(**options):
    torch.manual_seed(0)
    return METHODS.build(Choice("maskdit", options), encoder=VisionTransformer(CONFIG))


def shaken(**options):
    """With weights that are nowhere zero, so that noise levels matter."""
    method = build(**options)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return method


def make_batch(count=4):
    """Even images with a brighter square, which a mask covers."""
    images = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 32).clone()
    masks = torch.zeros(count, 1, 32, 32, dtype=torch.bool)
    masks[:, :, 8:20, 4:16] = True  # 9 patches of 64
    images += masks * 1.5
    rows = range(count)
    names = {"keys": tuple(map(str, rows)), "texts": ("",) * count, "words": (("square",),) * count}
    return Batch(images, masks, masks.flatten(2).any(2), torch.arange(count), labels=(None,) * count, **names)


def part(batch, rows):
    tensors = {name: getattr(batch, name)[rows] for name in ("images", "masks", "present", "seeds")}
    names = {name: tuple(getattr(batch, name)[row] for row in rows) for name in ("keys", "texts", "words", "labels")}
    return dataclasses.replace(batch, **tensors, **names)


def noised(method, batch):
    x = 0.5 * patchify(batch.images, 4)
    sigma = method.levels(batch.seeds)
    return x, x + sigma[:, None, None] * normal(batch.seeds, 64, 48, stream=2), sigma


# -- the loss


def test_the_loss_is_its_formula():
    """EDM's error of D over visible patches, the standardised noisy patch over hidden ones: patch by patch."""
    method, batch = shaken(rebuild_weight=0.3), make_batch()
    order = uniform(batch.seeds, 64).argsort(1)
    visible, hidden = order[:, :32], order[:, 32:]
    x, y, sigma = noised(method, batch)
    with torch.no_grad():
        answers = method.outputs(y, sigma[:, None, None], visible, hidden).double()
        output = method(batch, 0.5)
    denoise = rebuild = 0.0
    for image in range(4):
        s = float(sigma[image])
        for row, place in enumerate(order[image].tolist()):
            clean, noisy = x[image, place].double(), y[image, place].double()
            d = 0.25 / (s**2 + 0.25) * noisy + s * 0.5 / math.sqrt(s**2 + 0.25) * answers[image, row]
            if row < 32:
                denoise += float((s**2 + 0.25) / (s * 0.5) ** 2 * ((d - clean) ** 2).mean())
            else:
                variance = ((noisy - noisy.mean()) ** 2).sum() / 47
                rebuild += float(((d - (noisy - noisy.mean()) / (variance + 1e-6).sqrt()) ** 2).mean())
    assert output.metrics["denoise"].item() == pytest.approx(denoise / 128, rel=1e-4)
    assert output.metrics["rebuild"].item() == pytest.approx(rebuild / 128, rel=1e-4)
    assert output.loss.item() == pytest.approx((denoise + 0.3 * rebuild) / 128, rel=1e-4)


def test_with_nothing_hidden_it_is_the_loss_of_edm():
    """To the bit, whatever is said about hidden patches."""
    method, batch = shaken(), make_batch()
    x, y, sigma = noised(method, batch)
    denoised = method.denoise(y, sigma, torch.arange(64).expand(4, -1), torch.zeros(4, 0, dtype=torch.long))
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    edm = (weight * ((denoised - x) ** 2).mean((1, 2))).mean()
    output = method(batch, 1.0)
    assert output.loss.item() == edm.item()
    assert list(output.metrics) == ["denoise"]
    assert shaken(mask_ratio=0.0, rebuild_weight=7.0, foreground_share=1.0)(batch, 0.2).loss.item() == edm.item()


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_a_step_is_the_mean_of_its_halves(share, progress):
    method, batch = shaken(foreground_share=share), make_batch(6)
    halves = [method(part(batch, rows), progress).loss.item() for rows in ([0, 2, 4], [1, 3, 5])]
    assert method(batch, progress).loss.item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_noise_levels_are_the_papers():
    levels = build().levels(torch.arange(40000))
    quantiles = levels.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    assert quantiles.tolist() == pytest.approx([0.042, 0.134, 0.30, 0.68, 2.17], rel=0.03)


# -- the network


def test_initially_the_output_is_the_skip():
    """No change by the noise, and D = c_skip y; the last layer's own answers are small, and nothing but they differ."""
    method, batch = build(), make_batch()
    assert all(
        not m.linear.weight.any() and not m.linear.bias.any() for m in method.modules() if isinstance(m, Modulation)
    )
    _, y, sigma = noised(method, batch)
    places = method.whole(4)
    with torch.no_grad():
        assert method.outputs(y, sigma[:, None, None], *places).std() < 0.3  # of answers that should have 1
        method.decoder.predict.weight.zero_()
        denoised = method.denoise(y, sigma, *places)
    assert torch.equal(denoised, (0.25 / (sigma**2 + 0.25))[:, None, None] * y)


def test_hidden_patches_are_no_input():
    """Only the skip does, as in the paper's code."""
    method, batch = shaken(), make_batch()
    visible, hidden = method.split(batch.seeds, coverage(batch.masks, 4), 0.0)
    _, y, sigma = noised(method, batch)
    changed = y.scatter(1, hidden[:, :, None].expand(-1, -1, 48), 7.0)
    level = sigma[:, None, None]
    with torch.no_grad():
        assert torch.equal(method.outputs(y, level, visible, hidden), method.outputs(changed, level, visible, hidden))
        before, after = (method.denoise(z, sigma, visible, hidden) for z in (y, changed))
    assert torch.equal(before[:, :32], after[:, :32])
    skipped = 0.25 / (level**2 + 0.25) * (7.0 - take(y, hidden))
    assert torch.allclose(after[:, 32:] - before[:, 32:], skipped, atol=1e-5)


def test_patches_keep_their_positions_in_any_order():
    """Positions are given before patches are taken out, and again in the decoder."""
    method, batch = shaken(), make_batch()
    visible, hidden = method.split(batch.seeds, coverage(batch.masks, 4), 0.0)
    _, y, sigma = noised(method, batch)
    with torch.no_grad():
        one = method.denoise(y, sigma, visible, hidden)
        other = method.denoise(y, sigma, visible.flip(1), hidden.flip(1))
        elsewhere = method.denoise(y, sigma, visible, hidden.roll(1, 1))
    assert torch.allclose(one, torch.cat([other[:, :32].flip(1), other[:, 32:].flip(1)], 1), atol=1e-4)
    assert not torch.allclose(one[:, 32:] - elsewhere[:, 32:], torch.zeros(1), atol=1e-2)


def test_without_noise_the_encoder_is_the_plain_one():
    """As sigma goes to 0, the decoder's input for a clean image approaches the exported encoder's features."""
    method, batch = shaken(), make_batch()
    inputs = []
    method.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x = 0.5 * patchify(batch.images, 4)
    with torch.no_grad():
        plain = method.encoder(batch.images)
        for sigma in (1.0, 1e-2, 1e-3, 1e-4):
            method.denoise(x, torch.full((4,), sigma), *method.whole(4))
    far = [(features - plain).norm() / plain.norm() for features in inputs]
    assert far[0] > 0.1
    assert far[1] > far[2] > far[3]
    assert far[3] < 1e-3


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_everything_learns_masked_and_in_tuning(progress):
    method = shaken()
    method(make_batch(), progress).loss.backward()
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learning.values())
    silent = {name for name, p in learning.items() if not p.grad.any()}
    assert silent == ({"decoder.mask_token"} if progress else set())


# -- hiding


def test_the_schedule_ends_with_nothing_hidden():
    ratios = [build().hidden_ratio(progress) for progress in (0.0, 0.5, 0.89, 0.9, 1.0)]
    assert ratios == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert build(tuning_share=0.0).hidden_ratio(1.0) == 0.5
    slow = build(tuning="cosine", tuning_share=0.2)
    falling = [slow.hidden_ratio(progress) for progress in (0.5, 0.8, 0.9, 1.0)]
    assert falling == pytest.approx([0.5, 0.5, 0.5 / 4, 0.0], abs=1e-9)  # cos(pi/4)^4 = 1/4
    seeds = torch.arange(4)
    counts = [slow.split(seeds, torch.zeros(4, 64), progress)[1].shape[1] for progress in (0.5, 0.85, 1.0)]
    assert counts == [32, 24, 0]  # 0.36 of 64, rounded up
    assert slow(make_batch(), 0.9).loss.isfinite()


def test_plain_hiding_is_even_and_every_patch_is_there_once():
    batch = make_batch(2000)
    visible, hidden = build(mask_ratio=0.3).split(batch.seeds, coverage(batch.masks, 4), 0.0)
    assert visible.shape[1] == int(64 * 0.7)
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(64).expand(2000, -1))
    often = torch.bincount(hidden.flatten(), minlength=64) / 2000
    assert (often - 20 / 64).abs().max() < 0.05


def test_guidance_hides_the_foreground():
    method, batch = build(foreground_share=0.5, tuning_share=0.0), make_batch()
    _, hidden = method.split(batch.seeds, coverage(batch.masks, 4), 1.0)
    square = {8 * row + column for row in (2, 3, 4) for column in (1, 2, 3)}
    assert hidden.shape == (4, 32)
    assert all(square <= set(image) for image in hidden.tolist())
    bare = dataclasses.replace(batch, masks=batch.masks[:, :0], present=batch.present[:, :0])
    assert method(bare, 0.8).loss.item() == build(tuning_share=0.0)(batch, 0.8).loss.item()


# -- the average, and drawing


def test_the_average_is_an_ema_and_is_exported(tmp_path):
    method = build(ema_decay=0.15)
    start = method.encoder.cls_token.detach().clone()
    expected = start.clone()
    for decay in (0.15, 0.15):  # at first (1 + 1) / (10 + 1), which is more
        with torch.no_grad():
            method.encoder.cls_token += 1.0
        method.after_step(0.0)
        expected = decay * expected + (1 - decay) * method.encoder.cls_token.detach()
    assert torch.allclose(method.average.encoder.cls_token, expected, atol=1e-6)
    early = build()
    with torch.no_grad():
        early.encoder.cls_token += 1.0
    early.after_step(0.0)
    assert torch.allclose(early.average.encoder.cls_token, start + 9 / 11, atol=1e-6)
    assert not any(p.requires_grad for p in method.average.parameters())
    method.export(tmp_path)
    images = make_batch().images
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "average")(images), method.average.encoder(images))


def test_sampling():
    method = shaken()
    seen = []
    method.average.decoder.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[2].shape[1])))
    images = method.sample(torch.tensor([1, 2, 1]), num_steps=4)
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert len(seen) == 7  # Heun: twice a step, but for the last
    assert all(torch.equal(visible, torch.arange(64).expand(3, -1)) and not hidden for visible, hidden in seen)
    with torch.no_grad():
        method.encoder.cls_token += 1.0  # what is not the average does not draw
    assert torch.equal(method.sample(torch.tensor([1, 2, 1]), num_steps=4), images)


def test_the_sampler_solves_its_equation():
    """With D = c_skip y, dy/dsigma = y sigma / (sigma^2 + s^2): the image is the noise, at the deviation s."""
    method = build()
    with torch.no_grad():
        method.average.decoder.predict.weight.zero_()
    true = 0.5 / math.sqrt(80**2 + 0.25) * 80 * normal(torch.arange(2), 64, 48, stream=3)
    mean, std = (torch.tensor(value)[:, None, None] for value in (CONFIG.mean, CONFIG.std))
    errors = []
    for num_steps in (20, 40):
        drawn = patchify((method.sample(torch.arange(2), num_steps) - mean) / std * 0.5, 4)
        inside = (true.abs() < 0.5) & (drawn.abs() < 0.75)  # where no pixel is cut at black or white
        errors.append(float((drawn - true)[inside].abs().max()))
    assert errors[1] < 5e-3
    assert errors[1] < errors[0] / 3  # second order


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_ratio": 1.0}, "leave some visible"),
        ({"tuning_share": 1.5}, "tuning_share must be at least 0 and at most 1"),
        ({"tuning": "slow"}, "tuning"),
        ({"rebuild_weight": -1.0}, "rebuild_weight must be at least 0"),
        ({"noise_std": -1.0}, "must keep ln sigma between"),
        ({"noise_mean": 20.0}, "the paper has -1.2 and 1.2"),
        ({"ema_decay": -0.1}, "ema_decay must be at least 0 and at most 1"),
        ({"foreground_share": 2.0}, "at least 0 and at most 1"),
        ({"decoder_dim": 40}, "multiple of 32"),
        ({"decoder_depth": -1}, "1 or more"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build(**options)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="2 or more"):
        build().sample(torch.arange(1), num_steps=1)
