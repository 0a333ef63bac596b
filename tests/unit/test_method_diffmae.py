"""DiffMAE: what is noised, who sees whom, and hidden patches that are filled in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from synthgen.augment import Augment
from synthgen.config import Choice
from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import collate
from synthgen.methods import METHODS
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import patchify, take, unpatchify
from synthgen.models.masked_denoiser import MaskedDenoiser
from synthgen.models.vit import EncoderConfig, VisionTransformer
from tests.factories import make_generation

CONFIG = EncoderConfig(image_size=32, patch_size=4, dim=32, depth=2, num_heads=4)
DECODERS = ("cross-self", "cross", "joint")


def build(**options):
    torch.manual_seed(0)
    return METHODS.build(Choice("diffmae", options), encoder=VisionTransformer(CONFIG))


def make_batch(count=4):
    samples = []
    for number in range(count):
        generation, truth = make_generation("0", ("disc",), 32, seed=number)
        sample = Sample(str(number), generation.image, "disc", "a disc", ("disc",), truth[0].astype(np.uint8))
        samples.append(Augment(size=32)(sample, np.random.default_rng(number)))
    return collate(samples, CONFIG.mean, CONFIG.std)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def split(seeds):
    """Which patches stay visible and which are hidden, by the lot alone."""
    order = uniform(seeds, 64).argsort(1)
    return order[:, :16], order[:, 16:]


def signal(rho):
    """a_t for t = 0..1000, step by step."""
    left = [1.0]
    for number in range(1000):
        left.append(left[-1] * (1 - (1e-4 + (0.02 - 1e-4) * number / 999) ** rho))
    return left


# -- the loss


@pytest.mark.parametrize("norm_target", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_is_its_formula(decoder, norm_target, batch):
    """Pixels of hidden patches alone are noised and asked for, each image at one time; mae hides the same ones."""
    method = build(decoder=decoder, norm_target=norm_target, rho=0.9)
    patches, left, total = patchify(batch.images, 4), signal(0.9), 0.0
    for image in range(4):
        seeds, own = batch.seeds[image : image + 1], patches[image : image + 1]
        visible, hidden = split(seeds)
        time = 1 + int(uniform(seeds, stream=1) * 1000)
        x = take(own, hidden)
        noised = left[time] ** 0.5 * x + (1 - left[time]) ** 0.5 * normal(seeds, 48, 48, stream=2)
        with torch.no_grad():
            said = method.decoder(noised, torch.tensor([time]), hidden, method.read(own, visible))[0].double()
        for row, pixels in zip(said, x[0].double(), strict=True):
            deviation = (pixels.var(unbiased=True) + 1e-6).sqrt()
            total += float(((row - ((pixels - pixels.mean()) / deviation if norm_target else pixels)) ** 2).mean())
    assert method(batch, 0.0).loss.item() == pytest.approx(total / 4 / 48, rel=1e-4)


def test_the_encoder_sees_clean_visible_patches_alone(batch):
    method = build()
    visible, hidden = split(batch.seeds)
    patches, asked = patchify(batch.images, 4), []
    method.encoder.patch_embed.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    method(batch, 0.0)
    (seen,) = asked
    assert torch.equal(seen, take(patches, visible))
    changed = patches.scatter(1, hidden[:, :, None].expand(-1, -1, 48), 7.0)
    for before, after in zip(method.read(patches, visible), method.read(changed, visible), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("rho", [1.0, 0.8, 0.1])
def test_the_schedule_is_the_product_of_its_steps(rho):
    log = build(rho=rho).log_signal.double()
    assert log.isfinite().all()
    assert torch.allclose(log.exp(), torch.tensor(signal(rho), dtype=torch.float64), rtol=1e-4, atol=1e-12)


def test_a_lower_rho_leaves_less_signal():
    """Shares of the times at which less than 1 % is left, worked out apart."""
    faint = [float((build(rho=rho).log_signal[1:].exp() < 0.01).float().mean()) for rho in (1.0, 0.8, 0.6)]
    assert faint == pytest.approx([0.33, 0.61, 0.81], abs=0.005)


def test_times_are_even_from_1_to_1000():
    times = build().times(torch.arange(50000))
    assert (int(times.min()), int(times.max())) == (1, 1000)
    assert torch.histc(times.float(), 10, 1, 1000).sub(5000).abs().max() < 300  # 4 deviations of 67


def test_hardly_any_noise_is_easy_and_time_1000_leaves_nothing(batch):
    """The two ends: at time 1 the decoder sees the answer, at time 1000 no more of it than mae's."""
    x, ends = torch.ones(4, 48, 48), {}
    for time in (1, 1000):
        method = build()
        times = torch.full((4,), time)
        method.times = lambda seeds, times=times: times
        shown = method.noised(x, torch.zeros_like(x), times)
        assert 0.999 < float(shown.min()) < 1 if time == 1 else float(shown.max()) < 1e-3
        optimizer = torch.optim.AdamW(method.parameters(), 1e-2)
        for _ in range(15):
            loss = method(batch, 0.0).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[time] = loss.item()
    assert ends[1] < 0.5 * ends[1000]


def part(batch, rows):
    values = {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch) if item.name != "second"}
    return dataclasses.replace(batch, **{name: value[rows] for name, value in values.items()})


def test_metrics_weight_errors_by_noise(batch):
    """Each metric is nearly the error of the only image at its end of the schedule."""
    method, alone = build(), part(batch, slice(1))
    for time, name in ((1, "error_less_noise"), (1000, "error_more_noise")):
        times = torch.tensor([time, 1001 - time, 1001 - time, 1001 - time])
        method.times = lambda seeds, times=times: times[: len(seeds)]
        assert method(batch, 0.0).metrics[name].item() == pytest.approx(method(alone, 0.0).loss.item(), rel=1e-2)


def test_guidance_hides_the_foreground(batch):
    guided = build(foreground_share=0.9)
    start, end = (guided(batch, progress) for progress in (0.0, 1.0))
    assert start.metrics["foreground_hidden"] + 0.05 < end.metrics["foreground_hidden"]
    assert start.loss.item() == build()(batch, 0.0).loss.item()  # the share has not risen yet


# -- the decoders


@pytest.mark.parametrize("decoder", DECODERS)
def test_whether_noised_patches_attend_to_each_other(decoder, batch):
    method = build(decoder=decoder, decoder_depth=2)
    visible, hidden = split(batch.seeds)
    memory = method.read(patchify(batch.images, 4), visible)
    noised, times = torch.randn(4, 48, 48), torch.tensor([1, 10, 500, 1000])
    other = noised.clone()
    other[:, 5] += 1.0
    with torch.no_grad():
        change = (method.decoder(noised, times, hidden, memory) - method.decoder(other, times, hidden, memory)).abs()
    changed = change.amax(2) > 1e-6
    assert changed[:, 5].all()
    assert changed.all() if decoder != "cross" else changed.sum() == 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_prediction_depends_on_position_time_and_visible_patches(decoder, batch):
    method = build(decoder=decoder)
    visible, hidden = split(batch.seeds)
    patches, times = patchify(batch.images, 4), torch.full((4,), 500)
    noised = torch.zeros(4, 48, 48)
    memory = method.read(patches, visible)
    with torch.no_grad():
        said = method.decoder(noised, times, hidden, memory)
        assert not torch.allclose(said[:, 0], said[:, 1], atol=1e-3)
        for other in (
            method.decoder(noised, times + 400, hidden, memory),
            method.decoder(noised, times, hidden, method.read(patches.flip(0), visible)),
        ):
            assert not torch.allclose(said, other, atol=1e-3)


@pytest.mark.parametrize("decoder", ["cross-self", "cross"])
def test_later_decoder_blocks_are_linked_to_earlier_encoder_blocks(decoder, batch):
    visible, hidden = split(batch.seeds)
    for u_links, links in ((True, [2, 1]), (False, [2, 2])):
        network = build(decoder=decoder, decoder_depth=2, u_links=u_links).decoder
        layers = [torch.randn(4, 17, 32, requires_grad=True) for _ in range(2)]
        memory = network.read(layers, visible)
        for link, kv in zip(links, memory, strict=True):
            grads = torch.autograd.grad(kv.square().sum(), layers, allow_unused=True, retain_graph=True)
            assert [grad is not None for grad in grads] == [link == 1, link == 2]
        said = network(torch.zeros(4, 48, 48), torch.ones(4, dtype=torch.long), hidden, memory)
        (grad,) = torch.autograd.grad(said.square().sum(), memory[1])
        assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("depth", "links"), [(1, [12]), (4, [12, 9, 6, 3]), (8, [12, 11, 9, 8, 6, 5, 3, 2]), (12, list(range(12, 0, -1)))]
)
def test_links_reach_evenly_from_the_last_layer_to_an_early_one(depth, links):
    encoder = VisionTransformer(EncoderConfig(image_size=8, patch_size=4, dim=8, depth=12, num_heads=1))
    assert MaskedDenoiser(encoder, kind="cross", dim=32, depth=depth, u_links=True).links == links


# -- sampling


@pytest.mark.parametrize("decoder", DECODERS)
def test_inpainting_keeps_visible_patches_and_runs_the_encoder_once(decoder, batch):
    method = build(decoder=decoder)
    hidden = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(n))[:20] for n in range(4)])
    asked = []
    method.encoder.norm.register_forward_pre_hook(lambda *_: asked.append(1))
    images = method.sample(batch.images, hidden, batch.seeds, num_steps=7)
    assert len(asked) == 1
    was_hidden = torch.zeros(4, 64, dtype=torch.bool).scatter(1, hidden, True)
    before, after = patchify(batch.images, 4), patchify(images, 4)
    assert torch.equal(after[~was_hidden], before[~was_hidden])
    assert ((after != before).any(2) == was_hidden).all()
    pixels = images * torch.tensor(CONFIG.std)[:, None, None] + torch.tensor(CONFIG.mean)[:, None, None]
    drawn = patchify(pixels, 4)[was_hidden]
    assert -1e-5 < drawn.min() < drawn.max() < 1 + 1e-5
    assert torch.equal(images, method.sample(batch.images, hidden, batch.seeds, num_steps=7))
    rest = unpatchify(before.masked_fill(was_hidden[:, :, None], 5.0), 4)
    assert torch.equal(
        patchify(method.sample(rest, hidden, batch.seeds, num_steps=7), 4)[was_hidden], after[was_hidden]
    )
    others = patchify(method.sample(batch.images, hidden, batch.seeds + 1, num_steps=7), 4)
    assert not torch.allclose(others[was_hidden], after[was_hidden], atol=1e-2)


@pytest.mark.parametrize("num_steps", [1, 9, 200])
def test_every_step_ends_where_noising_would(num_steps, batch):
    """With a decoder that knows the truth, what it is shown at time t is sqrt(a_t) x + sqrt(1 - a_t) noise."""
    method, left = build(), signal(0.8)
    hidden = torch.arange(20, 40).expand(4, -1)
    truth, shown = take(patchify(batch.images, 4), hidden), {}

    def knowing(noised, times, *_):
        shown[int(times[0])] = noised
        return truth

    method.decoder.forward = knowing
    images = method.sample(batch.images, hidden, batch.seeds, num_steps)
    assert torch.allclose(images, batch.images, atol=1e-6)
    assert next(iter(shown)) == 1000
    assert len(shown) == num_steps
    for time, x in shown.items():
        noise = (x - left[time] ** 0.5 * truth) / (1 - left[time]) ** 0.5
        assert (float(noise.mean()), float(noise.std())) == (pytest.approx(0, abs=0.08), pytest.approx(1, abs=0.06))


def test_bad_arguments_of_sampling_are_refused(batch):
    method, hidden = build(), torch.arange(20).expand(4, -1)
    for wrong in (hidden + 50, hidden - 1, hidden.clamp(max=18), hidden[:, :0]):
        with pytest.raises(ValueError, match="places from 0 to 63, each once"):
            method.sample(batch.images, wrong, batch.seeds)
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            method.sample(batch.images, hidden, batch.seeds, num_steps)
    with pytest.raises(ValueError, match="norm_target: false"):
        build(norm_target=True).sample(batch.images, hidden, batch.seeds)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"foreground_share": 1.5}, "at least 0 and at most 1"),
        ({"rho": 0.0}, "rho must be at least 0.01 and at most 3"),
        ({"decoder": "self"}, "diffmae.decoder"),
        ({"decoder_dim": 40}, "multiple of 32"),
        ({"decoder_depth": -1}, "1 or more"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build(**options)
