"""DARL: what may be known of a patch, how its noise is drawn, what the loss weighs, and images patch by patch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.methods.darl import causal_block, mixed
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import patchify
from synthgen.models.vit import EncoderConfig, VisionTransformer

CONFIG = EncoderConfig(image_size=16, patch_size=4, dim=32, depth=2, num_heads=4)
N, P = 16, 48  # patches, and numbers in each
HEADS = [{}, {"condition_on_gamma": True}, {"head": "mse"}, {"head": "mse", "norm_pixels": True}]


def build(config=CONFIG, **options):
    torch.manual_seed(0)
    return METHODS.build(Choice("darl", options), encoder=VisionTransformer(config))


def make_batch(images, masks=None, first_seed=0):
    count, _, height, width = images.shape
    masks = torch.zeros(count, 0, height, width, dtype=torch.bool) if masks is None else masks
    seeds = torch.arange(count) + first_seed
    present = masks.flatten(2).any(2)
    return Batch(images, masks, present, seeds, ("",) * count, ("",) * count, ((),) * count, (None,) * count)


def some_images(count=4, config=CONFIG, seed=0):
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(seed))


def some_masks(count=4):
    """A square in every image but the last, of another size in each; a second word inside the first."""
    masks = torch.zeros(count, 2, 16, 16, dtype=torch.bool)
    for image in range(count - 1):
        masks[image, 0, : 6 + image, : 9 - image] = True
        masks[image, 1, :2, :2] = True
    return masks


def train(method, batches, rate=3e-3):
    optimizer = torch.optim.AdamW(method.parameters(), rate)
    for batch in batches:
        loss = method(batch, 0.0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# -- what is known of a patch


@torch.no_grad()
def test_the_context_of_a_patch_excludes_it_and_later_ones():
    method, patches = build(), patchify(some_images(2), 4)
    context, _ = method.read(patches)  # one more than in training
    for place in range(N):
        changed = patches.clone()
        changed[:, place] += 1.0
        after, _ = method.read(changed)
        differs = (after != context).any(2)
        assert not differs[:, : place + 1].any()
        assert differs[:, place + 1 :].all()  # and all that follows it does


def test_the_encoder_reads_clean_patches_and_never_the_last(monkeypatch):
    method, images = build(beta_a=1.0), some_images()
    read = []
    embed = method.encoder.embed
    monkeypatch.setattr(method.encoder, "embed", lambda *given: read.append(given[0]) or embed(*given))
    method(make_batch(images), 0.0)
    assert len(read) == 1
    assert torch.equal(read[0], patchify(images, 4)[:, :-1])


@torch.no_grad()
def test_a_causal_block_is_the_plain_block_on_earlier_tokens():
    block = build().encoder.blocks[1]
    x = torch.randn(2, 7, 32)
    y, _ = causal_block(block, x)
    for count in range(1, 8):
        assert torch.allclose(y[:, count - 1], block(x[:, :count])[:, -1], atol=1e-6)
    assert not torch.allclose(y, block(x), atol=1e-3)


@torch.no_grad()
def test_reading_with_a_cache_equals_reading_at_once():
    method, patches = build(), patchify(some_images(2), 4)
    whole, _ = method.read(patches)
    parts, past = [], []
    for start, stop in ((0, 0), (0, 1), (1, 6), (6, 16)):
        said, past = method.read(patches[:, start:stop], past)
        parts.append(said)
    assert [part.shape[1] for part in parts] == [1, 1, 5, 10]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("condition_on_gamma", [False, True])
@torch.no_grad()
def test_noised_patches_do_not_affect_each_other(condition_on_gamma):
    decoder = build(condition_on_gamma=condition_on_gamma).decoder
    noised, context, gamma = torch.randn(2, N, P), torch.randn(2, N, 32), torch.rand(2, N)
    before = decoder(noised, context, gamma)
    for name in ("noised", "context", "gamma"):
        given = {"noised": noised.clone(), "context": context.clone(), "gamma": gamma.clone()}
        given[name][:, 5] = 0.123
        differs = (decoder(**given) != before).any(2)
        assert differs[:, 5].all() == (condition_on_gamma or name != "gamma")
        assert differs.sum() == differs[:, 5].sum()


# -- noise


def test_gamma_is_drawn_from_its_beta_distribution():
    """Shares that Beta(0.03, 1) has below and above some levels, to four deviations of what is drawn here."""
    gamma = build().gammas(torch.arange(500), 400)
    assert 0 <= gamma.min() < gamma.max() < 1
    for level, share in ((1e-6, 0.661), (0.01, 0.871), (0.1, 0.933), (0.5, 0.979)):
        assert float((gamma < level).float().mean()) == pytest.approx(share, abs=0.005)
    even = build(beta_a=1.0).gammas(torch.arange(500), 400)
    assert float(even.mean()) == pytest.approx(0.5, abs=0.003)


def test_every_patch_has_its_own_gamma():
    gamma = build(beta_a=1.0).gammas(torch.arange(40), N)
    assert len(gamma.unique()) == gamma.numel()
    assert torch.equal(build(beta_a=1.0).gammas(torch.tensor([7]), N)[0], gamma[7])


@torch.no_grad()
def test_the_limits_of_gamma():
    """At 0 nothing of the patch is left; at 1 it is there as it is; between, powers add to 1."""
    decoder, context = build().decoder, torch.randn(2, N, 32)
    noise = normal(torch.arange(2), N, P)
    one, other = torch.randn(2, N, P), torch.randn(2, N, P)
    zeros, ones = torch.zeros(2, N), torch.ones(2, N)
    assert torch.equal(
        decoder(mixed(one, noise, zeros), context, zeros), decoder(mixed(other, noise, zeros), context, zeros)
    )
    assert torch.equal(mixed(one, noise, ones), one)
    assert float(mixed(one, noise, torch.full((2, N), 0.3)).var()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("beta_a", "low", "high"), [(1e9, 0.0, 0.3), (1e-9, 0.95, 1.5)])
def test_copies_without_noise_can_be_predicted_and_noise_cannot(beta_a, low, high):
    """Patches that nothing predicts, of variance 1: with gamma near 1 the error goes to 0, with gamma near 0 to 1."""
    config = dataclasses.replace(CONFIG, image_size=8, patch_size=2)
    method = build(config, beta_a=beta_a)
    loss = train(method, (make_batch(some_images(16, config, seed), first_seed=100 * seed) for seed in range(25)))
    assert low < loss < high


# -- the loss


@pytest.mark.parametrize("options", HEADS)
def test_the_loss_is_its_formula(options):
    """Each patch by itself, from those before it alone."""
    method, images = build(beta_a=0.5, **options), some_images(2)
    patches, total = patchify(images, 4), 0.0
    with torch.no_grad():
        for image in range(2):
            seed = torch.tensor([image])
            gamma, noise = uniform(seed, N) ** (1 / 0.5), normal(seed, N, P, stream=1)
            for place in range(N):
                x = patches[image, place]
                context = method.read(patches[image : image + 1, :place])[0][:, -1:]
                if method.head == "mse":
                    said = method.decoder(context)[0, 0]
                else:
                    share = gamma[:, place : place + 1]
                    noised = share.sqrt() * x + (1 - share).sqrt() * noise[:, place]
                    said = method.decoder(noised[:, None], context, share)[0, 0]
                if method.norm_pixels:
                    x = (x - x.mean()) / (x.var() + 1e-6).sqrt()
                total += float(((said - x) ** 2).mean())
    assert method(make_batch(images), 0.0).loss.item() == pytest.approx(total / (2 * N), rel=1e-5)


@pytest.mark.parametrize("options", HEADS)
def test_every_head_gives_gradients_to_all_of_the_encoder(options):
    method, batch = build(**options), make_batch(some_images())
    before = method(batch, 0.0).loss
    before.backward()
    assert all(p.grad is not None for p in method.parameters())
    assert all(p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    assert train(method, [batch] * 12) < 0.9 * before.item()


def test_masks_weigh_patches():
    method, images, masks = build(head="mse", foreground_weight=3.0), some_images(), some_masks()
    output = method(make_batch(images, masks), 0.0)
    patches = patchify(images, 4)
    with torch.no_grad():
        error = ((method.decoder(method.read(patches[:, :-1])[0]) - patches) ** 2).mean(2)
    cover = masks.any(1).view(4, 4, 4, 4, 4).float().mean((2, 4)).flatten(1)  # image row . column . to image patch
    assert cover[0, :4].tolist() == [1, 1, 0.25, 0]
    total = 0.0
    for image in range(4):
        weights = [1 + 3 * float(c) for c in cover[image]]
        total += sum(w * float(e) for w, e in zip(weights, error[image], strict=True)) / sum(weights)
    assert output.loss.item() == pytest.approx(total / 4, rel=1e-5)
    assert output.metrics["foreground_error"].item() == pytest.approx(
        float((error * cover).sum() / cover.sum()), rel=1e-5
    )


@pytest.mark.parametrize("masks", [None, torch.zeros(4, 1, 16, 16, dtype=torch.bool)])
def test_without_masks_guided_is_plain(masks):
    batch = make_batch(some_images(), masks)
    guided, plain = build(foreground_weight=2.0), build()
    assert guided(batch, 0.0).loss.item() == pytest.approx(plain(batch, 0.0).loss.item(), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"foreground_weight": 2.0}, {"head": "mse", "foreground_weight": 2.0}])
def test_a_step_is_the_mean_of_its_halves(options):
    method, images, masks = build(**options), some_images(), some_masks()
    whole = method(make_batch(images, masks), 0.0).loss.item()
    halves = [method(make_batch(images[a:b], masks[a:b], a), 0.0).loss.item() for a, b in ((0, 2), (2, 4))]
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-5)
    assert abs(halves[0] - halves[1]) > 1e-4 * whole


# -- images


class Gaussian(nn.Module):
    """The best guess of x from its noised copy, where x has this mean and deviation."""

    mean, std = 0.4, 0.5

    def forward(self, noised, context, gamma):
        gain = self.std**2 * gamma.sqrt() / (gamma * self.std**2 + 1 - gamma)
        return self.mean + gain[..., None] * (noised - gamma.sqrt()[..., None] * self.mean)


def test_sampling_gives_the_distribution_of_the_decoder():
    method = build()
    method.decoder = Gaussian()
    noise = normal(torch.arange(2000), 201, 6)
    bound = torch.full((6,), 9.0)
    drawn = method.sample_patch(torch.zeros(2000, 1, 32), noise, -bound, bound)
    assert float(drawn.mean()) == pytest.approx(0.4, abs=0.02)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.03)  # from below, as steps get finer


def test_every_patch_is_sampled_from_noise_of_its_own():
    method = build()
    method.decoder = Gaussian()
    reds = patchify(method.sample(torch.arange(200), num_steps=4), 4)[:, :, ::3].transpose(0, 1).flatten(1)
    assert (torch.corrcoef(reds) - torch.eye(N)).abs().max() < 0.1  # 5 deviations


def test_sampled_images_are_those_of_the_training():
    """Red images and blue ones: some of each, and never one of both colours. A seed gives the same in any company."""
    config = dataclasses.replace(CONFIG, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    method = build(config, beta_a=0.3)
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])[:, :, None, None].expand(-1, -1, 8, 8)
    train(method, (make_batch((2 * colors - 1).repeat(8, 1, 1, 1), first_seed=16 * step) for step in range(100)))
    images = method.sample(torch.arange(20), num_steps=20)
    far = (images[:, None] - colors).abs().amax((2, 3, 4))  # of each image from red and from blue
    assert far.amin(1).max() < 0.2
    assert 3 <= int(far.argmin(1).sum()) <= 17
    assert torch.allclose(method.sample(torch.tensor([7, 3]), num_steps=20), images[[7, 3]], atol=1e-4)


def test_only_the_denoising_head_samples():
    with pytest.raises(ValueError, match='only head "denoise" samples'):
        build(head="mse").sample(torch.arange(2))
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        build().sample(torch.arange(2), num_steps=0)
    assert build().sample(torch.arange(2), num_steps=1).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"head": "flow"}, "'denoise' or 'mse'"),
        ({"beta_a": 0.0}, "beta_a must be above 0"),
        ({"foreground_weight": -1.0}, "foreground_weight must be at least 0"),
        ({"norm_pixels": True}, "goes with head mse"),
        ({"head": "mse", "condition_on_gamma": True}, "goes with head denoise"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build(**options)
