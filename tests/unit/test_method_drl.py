"""DRL: the loss, the code, sampling, and weights of masked pixels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.models.draws import normal, uniform
from synthgen.models.score import ResidualBlock, ScoreNetwork
from synthgen.models.vit import EncoderConfig, VisionTransformer

CONFIG = EncoderConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)
SMALL = {"denoised_size": 8, "score_width": 8, "code_dim": 8}
LEARNING = {"variational": False, "sigma_min": 0.5, "sigma_max": 2.0}


def build(**options):
    torch.manual_seed(0)
    return METHODS.build(Choice("drl", SMALL | options), encoder=VisionTransformer(CONFIG))


def make_batch(images, masks=None, first_seed=0):
    count = len(images)
    masks = torch.zeros(count, 0, *images.shape[2:], dtype=torch.bool) if masks is None else masks
    seeds = torch.arange(first_seed, first_seed + count)
    names = tuple(str(number) for number in range(count))
    return Batch(images, masks, masks.any((2, 3)), seeds, names, ("",) * count, ((),) * count, (None,) * count)


def speckled(count=4, masks=None):
    return make_batch(torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3)), masks)


def flat(count, number):
    """Images of one colour each: three numbers say all."""
    colours = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(number))
    return make_batch(colours.expand(-1, -1, 32, 32).contiguous(), first_seed=1000 * number)


def train(method, steps, batch_of):
    optimizer = torch.optim.AdamW(method.parameters(), betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 5) * (1 - step / steps)
        loss = method(batch_of(step), step / steps).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
    return method


def without_code(module, arguments):
    noised, sigma, code = arguments
    return noised, sigma, 0 * code


@pytest.fixture(scope="module")
def with_code():
    """Trained on flat images."""
    return train(build(**LEARNING), 40, lambda step: flat(32, step))


@pytest.fixture(scope="module")
def ignoring_code():
    """The same, with a score network that ignores the code."""
    method = build(**LEARNING)
    method.score.register_forward_pre_hook(without_code)
    return train(method, 40, lambda step: flat(32, step))


# -- the objective


@pytest.mark.parametrize("variational", [True, False])
def test_the_loss_is_the_papers_over_the_number_of_pixels(variational):
    """Half the sum of sigma^2 (score - its target)^2, and the penalty: here as a mean, so twice, over P."""
    method, batch = build(variational=variational, penalty=0.7), speckled()
    total = 0.0
    for image, seed in zip(batch.images, batch.seeds, strict=True):
        sigma = 0.01 * 5000 ** float(uniform(seed[None], stream=0))
        noise = normal(seed[None], 3, 8, 8, stream=1)
        clean = image.view(3, 8, 4, 8, 4).mean((2, 4))[None]
        with torch.no_grad():
            said = method.head(method.encoder(image[None])[:, 1:].mean(1))
            if variational:
                mean, deviation = said[:, :8], (said[:, 8:] / 2).exp()
                code = mean + deviation * normal(seed[None], 8, stream=2)
                normals = torch.distributions.Normal
                price = torch.distributions.kl_divergence(normals(mean, deviation), normals(0.0, 1.0)).sum()
            else:
                code, price = said, said.abs().sum()
            score = method.score(clean + sigma * noise, torch.tensor([sigma]), code) / sigma
        matched = sigma**2 * ((score - -noise / sigma) ** 2).sum() / 2
        total += float(matched + 0.7 * price)
    assert method(batch, 0.0).loss.item() == pytest.approx(total / 4 * 2 / (3 * 8 * 8), rel=1e-4)


def test_noise_levels_follow_their_law():
    """The shares below sigma 0.1, 0.5, 1 and 5 of a geometric path from 0.01 to 50, and of an even one."""
    seeds = torch.arange(40000)
    for law, shares in (("log-uniform", [0.270, 0.459, 0.541, 0.730]), ("uniform", [0.0018, 0.0098, 0.0198, 0.0998])):
        sigma = build(sigma_law=law).sigmas(seeds)
        assert [(sigma < level).float().mean().item() for level in (0.1, 0.5, 1, 5)] == pytest.approx(shares, abs=0.01)
        assert 0.01 <= sigma.min() < sigma.max() <= 50
    assert set(build(sigma_min=5.0, sigma_max=5.0).sigmas(seeds[:9]).tolist()) == {5.0}


def test_a_step_is_the_mean_of_its_halves():
    masks = torch.zeros(8, 1, 32, 32, dtype=torch.bool)
    masks[:5, :, 4:20, 8:30] = True
    method, whole = build(foreground_weight=2.0, time_dependent=True), speckled(8, masks)
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = {f.name: getattr(whole, f.name)[rows] for f in dataclasses.fields(Batch) if f.name != "second"}
        halves.append(method(Batch(**part), 0.0).loss.item())
    assert method(whole, 0.0).loss.item() == pytest.approx(sum(halves) / 2, rel=1e-5)


# -- who sees what


def test_the_encoder_sees_the_clean_image_and_the_score_network_never_does():
    method, batch = build(time_dependent=True), speckled()
    seen, given, levels = [], [], []
    method.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    method.score.register_forward_pre_hook(lambda module, arguments: given.append(arguments))
    method.level.register_forward_pre_hook(lambda module, arguments: levels.append(arguments))
    method(batch, 0.0)
    ((images,),) = seen
    assert torch.equal(images, batch.images)
    noised, sigma, code = given[0]
    clean = F.avg_pool2d(batch.images, 4)
    noise = normal(batch.seeds, 3, 8, 8, stream=1)
    assert torch.allclose(noised, clean + sigma[:, None, None, None] * noise, atol=1e-5)
    assert code.shape == (4, 8)
    ((level,),) = levels
    assert torch.equal(level, sigma)  # the encoder's time is that of the noise


def test_the_encoder_learns_through_the_code_alone():
    method, batch = build(penalty=0.0), speckled()
    with torch.no_grad():
        method.score.code.weight.zero_()
    method(batch, 0.0).loss.backward()
    assert all(not p.grad.any() for p in (*method.encoder.parameters(), *method.head.parameters()))
    method = build(penalty=0.0)
    method(batch, 0.0).loss.backward()
    assert all(p.grad.any() for p in (*method.encoder.parameters(), *method.head.parameters()))


def test_the_code_reaches_every_block_and_the_map():
    method = build()
    method(speckled(), 0.0).loss.backward()
    blocks = [module for module in method.score.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 4 + 1 + 4
    for linear in (*(block.tell for block in blocks), method.score.paint[0]):
        level, code = linear.weight.grad.chunk(2, dim=1)
        assert level.any()
        assert code.any()


def test_time_changes_the_code_and_not_the_encoder():
    static, method = build(), build(time_dependent=True)
    images = speckled().images
    low, high = torch.full((4,), 0.1), torch.full((4,), 9.0)
    with torch.no_grad():
        features = method.encoder.features(images)
        method.head.load_state_dict(static.head.state_dict())
        assert torch.equal(method.code(features, low)[0], static.code(features, high)[0])  # at first
    train(method, 3, lambda step: speckled())
    with torch.no_grad():
        assert not torch.allclose(method.code(features, low)[0], method.code(features, high)[0], atol=1e-4)
    assert method.encoder.state_dict().keys() == VisionTransformer(CONFIG).state_dict().keys()


# -- what it learns


def error(method, batch, sigma, codes):
    levels = torch.full((len(batch),), sigma)
    noise = normal(batch.seeds, 3, 8, 8, stream=9)
    return method.error(F.avg_pool2d(batch.images, 4) + sigma * noise, levels, codes, noise).mean().item()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_code_helps_at_every_level(with_code, ignoring_code, sigma):
    """Its own, more than another image's or none; and more than no code at all from the start."""
    batch = flat(128, 777)
    with torch.no_grad():
        codes, _ = with_code.code(with_code.encoder.features(batch.images), torch.full((128,), sigma))
        own = error(with_code, batch, sigma, codes)
        assert own < 0.8 * error(with_code, batch, sigma, codes.roll(1, 0))
        assert own < 0.8 * error(with_code, batch, sigma, 0 * codes)
        assert own < 0.97 * error(ignoring_code, batch, sigma, codes)


def test_the_gain_is_recorded(with_code, ignoring_code):
    batch = flat(64, 778)
    assert with_code(batch, 1.0).metrics["code_gain"] > 0.05
    assert abs(ignoring_code(batch, 1.0).metrics["code_gain"]) < 1e-5
    assert abs(with_code(flat(1, 779), 1.0).metrics["code_gain"]) < 1e-5  # no other image


def test_noise_and_the_code_give_the_image_back(with_code):
    """The auto-encoding limit: what is denoised here has nothing of the image in it."""
    batch = flat(64, 780)
    noise, sigma = 2 * normal(batch.seeds, 3, 8, 8), torch.full((64,), 2.0)
    with torch.no_grad():
        codes, _ = with_code.code(with_code.encoder.features(batch.images), sigma)
        likeness = []
        for code in (codes, 0 * codes):
            colours = (noise + 2 * with_code.score(noise, sigma, code)).mean((2, 3))
            pairs = torch.stack([colours.flatten(), batch.images[:, :, 0, 0].flatten()])
            likeness.append(torch.corrcoef(pairs)[0, 1])
    assert likeness[0] > 0.7
    assert abs(likeness[1]) < 0.2


def test_images_are_sampled_from_codes(with_code):
    batch = flat(16, 781)
    drawn = with_code.redraw(batch.images, batch.seeds, num_steps=5)
    assert drawn.shape == (16, 3, 8, 8)
    assert 0 <= drawn.min() < drawn.max() <= 1
    mean, std = torch.tensor(CONFIG.mean), torch.tensor(CONFIG.std)
    true = (batch.images[:, :, 0, 0] * std + mean).clamp(0, 1)
    assert torch.corrcoef(torch.stack([drawn.mean((2, 3)).flatten(), true.flatten()]))[0, 1] > 0.7
    assert torch.equal(with_code.redraw(batch.images, batch.seeds, num_steps=5), drawn)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        with_code.redraw(batch.images, batch.seeds, num_steps=0)


# -- guided


def test_pixels_under_masks_weigh_more_and_images_the_same():
    masks = torch.zeros(4, 2, 32, 32, dtype=torch.bool)
    masks[0, 0, :16, :16] = masks[0, 1, 8:16, :24] = True  # they overlap
    masks[1, 0, :4, :2] = True  # half a pixel of the copy
    masks[2] = True  # all of it: as none
    plain, guided = build(penalty=0.0), build(penalty=0.0, foreground_weight=3.0)
    batch = speckled(4, masks)
    errors = []
    plain.score.register_forward_hook(
        lambda module, arguments, said: errors.append((said + normal(batch.seeds[: len(said)], 3, 8, 8, stream=1)) ** 2)
    )
    whole = plain(batch, 0.0).loss.item()
    error = errors[0].detach().mean(1)  # b 8 8
    covered = torch.stack([image.any(0).view(8, 4, 8, 4).float().mean((1, 3)) for image in masks])
    assert covered[1, 0, 0] == 0.5
    expected = 0.0
    for one, cover in zip(error, covered, strict=True):
        weights = 1 + 3 * cover
        expected += float((weights * one).sum() / weights.sum()) / 4
    output = guided(batch, 0.0)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.loss.item() != pytest.approx(whole, rel=1e-4)
    assert output.metrics["noise_error"].item() == pytest.approx(whole, rel=1e-6)
    assert output.metrics["foreground_error"].item() == pytest.approx(float((error * covered).sum() / covered.sum()))
    assert guided(speckled(), 0.0).loss.item() == plain(speckled(), 0.0).loss.item()


# -- sizes


@pytest.mark.parametrize(("size", "lowest"), [(8, 1), (30, 4), (32, 4), (100, 13), (224, 28)])
def test_the_score_network_takes_every_size(size, lowest):
    network = ScoreNetwork(size, code_dim=8, width=4)
    with torch.no_grad():
        assert network(torch.randn(1, 3, size, size), torch.ones(1), torch.randn(1, 8)).shape == (1, 3, size, size)
        assert network.paint(torch.randn(1, 32)).shape == (1, 8, lowest, lowest)


def test_large_images_are_denoised_in_the_papers_size():
    config = dataclasses.replace(CONFIG, image_size=224, patch_size=56)
    method = METHODS.build(Choice("drl", {"score_width": 4}), encoder=VisionTransformer(config))
    given = []
    method.score.register_forward_pre_hook(lambda module, arguments: given.append(arguments))
    method(make_batch(torch.randn(1, 3, 224, 224)), 0.0)
    assert given[0][0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"code_dim": 0}, "code_dim must be at least 1"),
        ({"penalty": -1.0}, "penalty must be at least 0"),
        ({"sigma_min": 0.0}, "1e-6 or more"),
        ({"sigma_max": 0.001}, "at most sigma_max"),
        ({"sigma_law": "normal"}, "sigma_law"),
        ({"denoised_size": 4}, "between 8 and"),
        ({"denoised_size": 64}, "the image's 32 pixels"),
        ({"score_width": 10}, "multiple of 4"),
        ({"foreground_weight": -1.0}, "foreground_weight must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build(**options)
