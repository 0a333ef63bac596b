"""MAE: the loss, random hiding, and hiding guided by masks."""

from __future__ import annotations

import pytest
import torch

from synthgen.errors import ConfigError
from synthgen.methods._hiding import coverage
from synthgen.models.draws import uniform
from synthgen.models.layers import patchify, take
from synthgen.models.transformers_vit import _block_list, _theirs
from tests.methods import build, make_batch, without_masks


def test_the_loss_is_its_formula():
    method, batch = build("mae"), make_batch()
    loss = method(batch, 0.0).loss
    visible, hidden = method.split(batch.seeds, torch.zeros(4, 64), 0.0)
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


def test_the_loss_is_that_of_transformers():
    """Same weights, same draw: the loss of ``ViTMAEForPreTraining``."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    method, batch = build("mae", decoder_dim=64, decoder_depth=1), make_batch()
    twin = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
            patch_size=4, decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=256, layer_norm_eps=1e-6, norm_pix_loss=True,
        )
    )  # fmt: skip
    blocks, ours = _block_list(twin.vit.state_dict()), method.decoder.state_dict()
    state = {f"vit.{name}": tensor for name, tensor in _theirs(method.encoder.state_dict(), blocks).items()}
    of_blocks = _theirs({name: tensor for name, tensor in ours.items() if name.startswith("blocks.")}, blocks)
    state |= {name.replace(blocks, "decoder.decoder_layers", 1): tensor for name, tensor in of_blocks.items()}
    state |= {
        f"decoder.decoder_{there}.{end}": ours[f"{here}.{end}"]
        for here, there in (("embed", "embed"), ("norm", "norm"), ("predict", "pred"))
        for end in ("weight", "bias")
    }
    state["decoder.mask_token"] = ours["mask_token"]
    state["decoder.decoder_pos_embed"] = method.decoder.positions
    twin.load_state_dict(state)
    loss = method(batch, 0.0).loss
    assert twin(batch.images, noise=uniform(batch.seeds, 64)).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_hidden_pixels_do_not_leak_into_the_prediction():
    method, batch = build("mae"), make_batch()
    visible, hidden = method.split(batch.seeds, torch.zeros(4, 64), 0.0)
    patches = patchify(batch.images, 4)
    changed = patches.scatter(1, hidden[:, :, None].expand(-1, -1, 48), 7.0)
    predictions = [
        method.decoder(method.encoder.encode(take(p, visible), visible), visible, hidden) for p in (patches, changed)
    ]
    assert torch.equal(*predictions)


def test_visible_and_hidden_patches_are_a_partition_of_constant_sizes():
    for share in (0.0, 0.3, 1.0):
        method = build("mae", foreground_share=share)
        visible, hidden = method.split(torch.arange(5), torch.rand(5, 64), 1.0)
        assert (visible.shape, hidden.shape) == ((5, 16), (5, 48))
        assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(64).expand(5, -1))


def test_plain_hiding_is_uniform():
    method = build("mae")
    _, hidden = method.split(torch.arange(4000), torch.zeros(4000, 64), 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 4000
    assert (often - 0.75).abs().max() < 0.04


def test_guidance_hides_foreground_first():
    """The rule of docs/methods.md: a share of the hidden patches comes from the foreground, most covered first."""
    method = build("mae", foreground_share=0.5)
    foreground = torch.zeros(1, 64)
    foreground[0, :10] = 1.0  # fewer than half of 48: all are hidden
    foreground[0, 10:20] = 0.4  # not foreground: less than half covered
    foreground = foreground.expand(2000, -1)
    _, hidden = method.split(torch.arange(len(foreground)), foreground, 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 2000
    assert (often[:10] == 1).all()
    assert (often[10:] - 38 / 54).abs().max() < 0.06  # the others share what is left, whatever their score


def test_guidance_hides_the_most_covered_patches_up_to_its_share():
    method = build("mae", foreground_share=0.5)
    foreground = torch.linspace(0.5, 1, 64).expand(500, -1)  # all are foreground; 24 of the 48 hidden are guided
    _, hidden = method.split(torch.arange(len(foreground)), foreground, 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 500
    assert (often[40:] == 1).all()
    assert (often[:40] - 24 / 40).abs().max() < 0.1


def test_ties_are_broken_at_random():
    method = build("mae", foreground_share=0.25)
    _, hidden = method.split(torch.arange(4000), torch.ones(4000, 64), 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 4000
    assert (often - 0.75).abs().max() < 0.04


def test_the_share_rises_over_training():
    method = build("mae", foreground_share=0.5)
    foreground = torch.zeros(400, 64)
    foreground[:, :24] = 1.0
    hidden_share = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        _, hidden = method.split(torch.arange(400), foreground, progress)
        hidden_share.append(float((hidden < 24).float().sum() / 400 / 24))
    assert hidden_share[0] == pytest.approx(0.75, abs=0.02)
    assert hidden_share == sorted(hidden_share)
    assert hidden_share[-1] == 1.0


def test_without_foreground_guidance_is_plain_hiding():
    empty = without_masks(make_batch())
    losses = [method(empty, 1.0).loss.item() for method in (build("mae"), build("mae", foreground_share=0.5))]
    assert losses[0] == losses[1]


def test_coverage_is_the_share_of_a_patch_under_any_mask():
    method = build("mae", foreground_share=0.5)
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.bool)
    masks[0, 0, 0:4, 0:2] = True  # half of patch 0
    masks[0, 1, 0:4, 0:1] = True  # and again a part of that half
    masks[0, 1, 4:8, 4:8] = True  # all of patch 9
    covered = coverage(masks, 4)[0]
    assert covered[0] == 0.5
    assert covered[9] == 1.0
    assert covered.sum() == 1.5
    output = method(make_batch(), 1.0)
    assert 0.75 < output.metrics["foreground_hidden"] <= 1.0


def test_rebuilt_images_keep_visible_patches():
    method, batch = build("mae"), make_batch()
    whole, was_hidden = method.rebuild(batch)
    assert was_hidden.sum(1).tolist() == [48] * 4
    kept = ~was_hidden
    assert torch.equal(patchify(whole, 4)[kept], patchify(batch.images, 4)[kept])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"mask_ratio": 0.99}, "leave some visible"),
        ({"foreground_share": 1.5}, "at least 0 and at most 1"),
        ({"decoder_dim": 40}, "multiple of 32"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build("mae", **options)
