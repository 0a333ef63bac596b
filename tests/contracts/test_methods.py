"""What every method must do, and what masked autoencoders must do besides."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from synthgen.augment import CenterCrop
from synthgen.config import Choice
from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import collate
from synthgen.methods import METHODS
from synthgen.models.layers import patchify, take
from synthgen.models.vit import EncoderConfig, VisionTransformer
from synthgen.train.loop import seed_everything
from synthgen.train.optim import OptimSettings, build_optimizer, learning_rate
from tests.factories import make_generation

NAMES = METHODS.names()
CONFIG = EncoderConfig(image_size=32, patch_size=4, dim=32, depth=2, num_heads=4)


def make_batch(count=4):
    samples = []
    for number in range(count):
        words = ("disc", "square") if number % 2 else ("disc",)
        generation, truth = make_generation("0", words, 32, seed=number)
        labels = (truth * np.arange(1, len(words) + 1)[:, None, None]).max(0).astype(np.uint8)
        samples.append(Sample(str(number), generation.image, "disc", generation.request.prompt.text, words, labels))
    return collate([CenterCrop(size=32)(sample) for sample in samples], CONFIG.mean, CONFIG.std)


def build(name, **options):
    torch.manual_seed(0)
    return METHODS.build(Choice(name, options), encoder=VisionTransformer(CONFIG))


@pytest.mark.parametrize("name", NAMES)
def test_every_method(name):
    """Builds with defaults, gives a finite loss and gradient to all of the encoder, repeats under a seed, travels."""
    method, batch = build(name), make_batch()
    losses = []
    for copy in (method, pickle.loads(pickle.dumps(method))):
        torch.manual_seed(3)
        output = copy(batch, 0.5)
        losses.append(output.loss.item())
        assert output.loss.ndim == 0
        assert output.loss.isfinite()
        assert all(value.numel() == 1 and not value.requires_grad for value in output.metrics.values())
    assert losses[0] == losses[1]
    method(batch, 0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.encoder.named_parameters())
    method.after_step(1)
    view = method.views()(Sample("0", np.zeros((40, 50, 3), np.uint8)), np.random.default_rng(0))
    assert view.image.shape == (32, 32, 3)
    with pytest.raises(ConfigError, match="unknown setting"):
        build(name, no_such_option=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_overfits_one_batch(name):
    method, batch = build(name), make_batch(8)
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    losses = []
    for _ in range(120):
        seed_everything(0)  # the same draw each step: what is left is fitting
        loss = method(batch, 0.0).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0]


# -- masked autoencoder


def test_mae_loss_is_its_formula():
    method, batch = build("mae"), make_batch()
    torch.manual_seed(5)
    loss = method(batch, 0.0).loss
    torch.manual_seed(5)
    visible, hidden = method.split(torch.zeros(4, 64), 0.0)
    patches = patchify(batch.images, 4)
    predicted = method.decoder(method.encoder.encode(take(patches, visible), visible), visible, hidden)
    total = 0.0
    for image in range(4):
        for row, place in enumerate(hidden[image].tolist()):
            pixels = patches[image, place].double()
            mean = pixels.mean()
            variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
            target = (pixels - mean) / (variance + 1e-6).sqrt()
            total += float(((predicted[image, row].detach().double() - target) ** 2).mean())
    assert loss.item() == pytest.approx(total / hidden.numel(), rel=1e-5)


def test_mae_is_that_of_transformers():
    """Same weights, same draw: the loss of ``ViTMAEForPreTraining``."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from synthgen.export import _blocks, _renamed

    method, batch = build("mae", decoder_dim=64, decoder_depth=1), make_batch()
    twin = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
            patch_size=4, decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=256, layer_norm_eps=1e-6, norm_pix_loss=True,
        )
    )  # fmt: skip
    newer = any(name.startswith("vit.layers.") for name in twin.state_dict())
    ours = method.decoder.state_dict()
    state = {f"vit.{name}": tensor for name, tensor in _renamed(method.encoder, newer=newer).items()}
    state |= {f"decoder.{name}": tensor for name, tensor in _blocks(ours, "decoder_layers", newer=newer).items()}
    state |= {
        f"decoder.decoder_{there}.{end}": ours[f"{here}.{end}"]
        for here, there in (("embed", "embed"), ("norm", "norm"), ("predict", "pred"))
        for end in ("weight", "bias")
    }
    state["decoder.mask_token"] = ours["mask_token"]
    state["decoder.decoder_pos_embed"] = method.decoder.positions
    twin.load_state_dict(state)
    torch.manual_seed(9)
    loss = method(batch, 0.0).loss
    torch.manual_seed(9)
    assert twin(batch.images, noise=torch.rand(4, 64)).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_hidden_pixels_do_not_leak_into_the_prediction():
    method, batch = build("mae"), make_batch()
    torch.manual_seed(5)
    visible, hidden = method.split(torch.zeros(4, 64), 0.0)
    patches = patchify(batch.images, 4)
    changed = patches.scatter(1, hidden[:, :, None].expand(-1, -1, 48), 7.0)
    predictions = [
        method.decoder(method.encoder.encode(take(p, visible), visible), visible, hidden) for p in (patches, changed)
    ]
    assert torch.equal(*predictions)


def test_every_patch_is_visible_or_hidden_once_and_in_the_same_number():
    for share in (0.0, 0.3, 1.0):
        method = build("mae", foreground_share=share)
        visible, hidden = method.split(torch.rand(5, 64), 1.0)
        assert (visible.shape, hidden.shape) == ((5, 16), (5, 48))
        assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(64).expand(5, -1))


def test_plain_hiding_is_uniform():
    method = build("mae")
    torch.manual_seed(0)
    _, hidden = method.split(torch.zeros(4000, 64), 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 4000
    assert (often - 0.75).abs().max() < 0.04


def test_guidance_hides_foreground_first():
    """Free-ATM as read in docs/methods.md: a share of the hidden patches comes from the foreground, best first."""
    method = build("mae", foreground_share=0.5)
    foreground = torch.zeros(1, 64)
    foreground[0, :10] = 1.0  # fewer than half of 48: all are hidden
    foreground[0, 10:20] = 0.4  # not foreground: less than half covered
    foreground = foreground.expand(2000, -1)
    torch.manual_seed(0)
    _, hidden = method.split(foreground, 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 2000
    assert (often[:10] == 1).all()
    assert (often[10:] - 38 / 54).abs().max() < 0.06  # the others share what is left, whatever their score


def test_guidance_takes_the_best_covered_up_to_its_share():
    method = build("mae", foreground_share=0.5)
    foreground = torch.linspace(0.5, 1, 64).expand(500, -1)  # all are foreground; 24 of the 48 hidden are guided
    torch.manual_seed(0)
    _, hidden = method.split(foreground, 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 500
    assert (often[40:] == 1).all()
    assert (often[:40] - 24 / 40).abs().max() < 0.1


def test_ties_are_broken_by_lot():
    method = build("mae", foreground_share=0.25)
    torch.manual_seed(0)
    _, hidden = method.split(torch.ones(4000, 64), 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 4000
    assert (often - 0.75).abs().max() < 0.04


def test_the_share_rises_over_training():
    method = build("mae", foreground_share=0.5)
    foreground = torch.zeros(400, 64)
    foreground[:, :24] = 1.0
    hidden_share = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        torch.manual_seed(0)
        _, hidden = method.split(foreground, progress)
        hidden_share.append(float((hidden < 24).float().sum() / 400 / 24))
    assert hidden_share[0] == pytest.approx(0.75, abs=0.02)
    assert hidden_share == sorted(hidden_share)
    assert hidden_share[-1] == 1.0


def test_without_foreground_guidance_is_plain_hiding():
    plain, guided, batch = build("mae"), build("mae", foreground_share=0.5), make_batch()
    empty = dataclasses.replace(batch, masks=batch.masks[:, :0], present=batch.present[:, :0])
    losses = []
    for method in (plain, guided):
        torch.manual_seed(1)
        losses.append(method(empty, 1.0).loss.item())
    assert losses[0] == losses[1]
    assert guided.uses_masks
    assert not plain.uses_masks


def test_coverage_is_the_share_of_a_patch_under_any_mask():
    method = build("mae", foreground_share=0.5)
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.bool)
    masks[0, 0, 0:4, 0:2] = True  # half of patch 0
    masks[0, 1, 0:4, 0:1] = True  # and again a part of that half
    masks[0, 1, 4:8, 4:8] = True  # all of patch 9
    coverage = method.coverage(masks)[0]
    assert coverage[0] == 0.5
    assert coverage[9] == 1.0
    assert coverage.sum() == 1.5
    output = method(make_batch(), 1.0)
    assert 0.75 < output.metrics["foreground_hidden"] <= 1.0


def test_rebuilding_keeps_what_is_visible():
    method, batch = build("mae"), make_batch()
    whole, was_hidden = method.rebuild(batch)
    assert was_hidden.sum(1).tolist() == [48] * 4
    kept = ~was_hidden
    assert torch.equal(patchify(whole, 4)[kept], patchify(batch.images, 4)[kept])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"mask_ratio": 0.99}, "leave some visible"),
        ({"foreground_share": 1.5}, "between 0 and 1"),
        ({"decoder_dim": 40}, "multiple of 32"),
        ({"mask_ratio": "most"}, "mask_ratio"),
    ],
)
def test_bad_options_are_told(options, said):
    with pytest.raises(ConfigError, match=said):
        build("mae", **options)


# -- the optimizer


def test_decay_spares_biases_norms_and_tokens():
    method = build("mae")
    settings = OptimSettings(base_learning_rate=1e-3, batch_size=64, warmup_ratio=0.1, weight_decay=0.05, max_norm=0.0)
    decayed, spared = build_optimizer(method, settings).param_groups
    names = {id(p): name for name, p in method.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.norm.weight"} <= {
        names[id(p)] for p in spared["params"]
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_rate_rises_then_falls_to_nothing():
    settings = OptimSettings(base_learning_rate=1e-3, batch_size=512, warmup_ratio=0.1, weight_decay=0.0, max_norm=0.0)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[55] == pytest.approx(1e-3, rel=0.02)  # half way down
    assert 0 < rates[0] < 3e-4
    assert rates[-1] < 1e-5
