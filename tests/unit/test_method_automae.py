"""AutoMAE: the scorer, the sampled hiding, the two paths of the gradient, the prior, and the discriminator."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from synthgen.config import Choice
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.methods._hiding import coverage
from synthgen.methods.automae import rectangles
from synthgen.models.draws import uniform
from synthgen.models.layers import patchify, take
from synthgen.models.masker import MaskDiscriminator, MaskGenerator
from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder

CONFIG = EncoderConfig(image_size=32, patch_size=4, dim=32, depth=2, num_heads=4)


def build(name="automae", config=CONFIG, **options):
    torch.manual_seed(0)
    return METHODS.build(Choice(name, options), encoder=VisionTransformer(config))


def make_batch(count=4, words=1):
    """Noise; in the even images a mask covers 3 x 2 patches."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(count, words, 32, 32, dtype=torch.bool)
    masks[::2, :, 4:16, 8:16] = True
    names = tuple(str(number) for number in range(count))
    seeds = torch.arange(count) + 100
    return Batch(images, masks, masks.flatten(2).any(2), seeds, names, names, (("disc",),) * count, (None,) * count)


def gradients(method, batch):
    """The gradient of every parameter that learns."""
    method.zero_grad()
    method(batch, 0.5).loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.requires_grad}


def of(part, found):
    return [gradient for name, gradient in found.items() if name.startswith(part)]


class Fixed(nn.Module):
    """A generator with the same output for every image."""

    def __init__(self, chances):
        super().__init__()
        self.chances = chances

    def forward(self, attention):
        return self.chances.log().expand(len(attention), -1)


# -- where to hide


def test_the_scorer_gives_the_attention_of_the_class_token_per_head():
    method, batch = build(), make_batch()
    seen = []
    method.scorer.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, said: seen.append(said))
    method.scorer(batch.images)  # all of it, whole images
    q, k, _ = seen[0].chunk(3, dim=2)
    found = method.attention(patchify(batch.images, 4))
    assert found.shape == (4, 4, 64)
    for image, head in itertools.product(range(4), range(4)):
        own = slice(8 * head, 8 * head + 8)
        scores = torch.stack([q[image, 0, own] @ k[image, token, own] / 8**0.5 for token in range(65)])
        assert torch.allclose(found[image, head], scores.softmax(0)[1:], atol=1e-6)


def test_the_gumbel_softmax_is_soft_and_follows_the_generator():
    """The largest share falls on a patch as often as the generator says (the Gumbel trick), at any temperature."""
    chances = torch.full((64,), 0.25 / 62)
    chances[[5, 9]] = torch.tensor([0.5, 0.25])
    batch = make_batch(2)
    for temperature in (0.1, 1.0):
        method = build(temperature=temperature)
        method.generator, method.attention = Fixed(chances), lambda patches: torch.zeros(len(patches), 4, 64)
        p = method.sampled_shares(patchify(batch.images, 4)[:1].expand(4000, -1, -1), torch.arange(4000))
        assert torch.allclose(p.sum(1), torch.ones(4000), atol=1e-5)
        often = torch.bincount(p.argmax(1), minlength=64) / 4000
        assert often[[5, 9]].tolist() == pytest.approx([0.5, 0.25], abs=0.03)
        assert (p.max(1).values.median() > 0.9) == (temperature < 1)


@pytest.mark.parametrize(("alpha", "kept"), [(0.0, (0.25, 0.25)), (0.15, (0.1375, 0.2875)), (0.5, (0, 1 / 3))])
def test_selected_patches_are_hidden_more_often(alpha, kept):
    """Of 196 patches the 49 with the largest shares; the bounds follow from the quarter quantile of all scores."""
    method = build(config=EncoderConfig(image_size=56, patch_size=4, dim=8, depth=1, num_heads=2), alpha=alpha)
    p = torch.rand(400, 196, generator=torch.Generator().manual_seed(0))
    visible, hidden = method.split(p, torch.arange(400))
    assert visible.shape == (400, 49)
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(196).expand(400, -1))
    favoured = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(49).indices, True)
    is_visible = torch.zeros_like(favoured).scatter(1, visible, True)
    shares = [float(is_visible[group].float().mean()) for group in (favoured, ~favoured)]
    assert shares == pytest.approx(kept, abs=0.01)


# -- the two paths of the gradient


def test_without_alpha_it_is_mae():
    method, mae, batch = build(alpha=0.0, adversary_weight=0.0), build("mae"), make_batch()
    assert all(torch.equal(weight, method.state_dict()[name]) for name, weight in mae.state_dict().items())
    assert method(batch, 0.5).metrics["pixel_error"].item() == mae(batch, 0.5).loss.item()
    own, theirs = gradients(method, batch), gradients(mae, batch)
    assert all(torch.allclose(own[name], gradient, atol=1e-7) for name, gradient in theirs.items())
    assert all(not gradient.any() for gradient in of("generator", own))  # and D's loss does not reach it


def test_the_factor_of_the_tokens_changes_nothing_but_the_gradient():
    """d loss / d p_i is alpha <x_i, d loss / d x_i> for a visible patch, and 0 for a hidden one."""
    method, batch = build(), make_batch()
    patches = patchify(batch.images, 4)
    p = method.sampled_shares(patches, batch.seeds).detach().requires_grad_()
    visible, hidden = method.split(p, batch.seeds)
    features = method.encode(patches, visible, p)
    assert torch.equal(features, method.encoder.encode(take(patches, visible), visible))
    features[:, :, 0].square().sum().backward()
    x = method.encoder.embed(take(patches, visible), visible).detach().requires_grad_()
    y = x
    for block in method.encoder.blocks:
        y = block(y)
    method.encoder.norm(y)[:, :, 0].square().sum().backward()
    assert torch.allclose(p.grad.gather(1, visible), 0.5 * (x * x.grad).sum(2)[:, 1:], atol=1e-6)
    assert p.grad.gather(1, visible).abs().min() > 0
    assert not p.grad.gather(1, hidden).any()


def test_gradients_go_where_they_should():
    batch = make_batch()
    found = {weight: gradients(build(adversary_weight=weight), batch) for weight in (0.0, 5.0)}
    assert all(gradient.any() for gradient in of("generator.conv1", found[0.0]))  # from the pixels alone
    pairs = zip(of("generator.conv1", found[0.0]), of("generator.conv1", found[5.0]), strict=True)
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in pairs)  # and from L_G
    pairs = zip(of("discriminator", found[0.0]), of("discriminator", found[5.0]), strict=True)
    assert all(torch.equal(one, other) and one.any() for one, other in pairs)  # L_G does not teach D
    pairs = zip(of("encoder", found[0.0]), of("encoder", found[5.0]), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not of("scorer", found[5.0])


def test_hidden_pixels_do_not_leak_into_the_prediction():
    method, batch = build(), make_batch()
    patches = patchify(batch.images, 4)
    p = method.sampled_shares(patches, batch.seeds)
    visible, hidden = method.split(p, batch.seeds)
    changed = patches.scatter(1, hidden[:, :, None].expand(-1, -1, 48), 7.0)
    others = method.sampled_shares(changed, batch.seeds)
    assert not torch.equal(p, others)
    predicted = [
        method.decoder(method.encode(a, visible, b), visible, hidden) for a, b in ((patches, p), (changed, others))
    ]
    assert torch.equal(*predicted)


def test_the_loss_is_its_formula():
    method, batch = build(adversary_weight=0.7, prior="masks"), make_batch()
    output = method(batch, 0.0)
    p = method.sampled_shares(patchify(batch.images, 4), batch.seeds)
    r = method.real(batch.seeds, coverage(batch.masks, 4))
    generator = discriminator = 0.0
    with torch.no_grad():
        for image in range(4):
            proposed, drawn = (float(method.discriminator(x[image : image + 1])) for x in (p, r))
            generator += (proposed - 1) ** 2 / 4
            discriminator += ((drawn - 1) ** 2 + proposed**2) / 4
    assert output.metrics["generator_error"].item() == pytest.approx(generator, rel=1e-5)
    assert output.metrics["discriminator_error"].item() == pytest.approx(discriminator, rel=1e-5)
    assert output.loss.item() == pytest.approx(
        output.metrics["pixel_error"].item() + 0.7 * generator + discriminator, rel=1e-5
    )


# -- the real examples


def test_rectangles_are_those_of_the_paper():
    inside = rectangles(uniform(torch.arange(4000), 4), 14).view(-1, 14, 14)
    width, height = inside.any(1).sum(1), inside.any(2).sum(1)
    assert torch.equal(width * height, inside.sum((1, 2)))  # filled, and whole
    for line in (inside.any(1), inside.any(2)):
        assert (line.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
    assert sorted(set(width.tolist())) == list(range(4, 11))
    assert torch.bincount(width)[4:].sub(4000 / 7).abs().max() < 90  # 4 deviations of 22
    mean = sum(min(14, -(-area // w)) for area in range(40, 161) for w in range(4, 11)) / 121 / 7
    assert float(height.float().mean()) == pytest.approx(mean, abs=0.2)
    assert all(inside[:, row, column].any() for row in (0, 13) for column in (0, 13))


@pytest.mark.parametrize("grid", [4, 7, 8, 16])
def test_rectangles_fit_other_grids(grid):
    inside = rectangles(uniform(torch.arange(500), 4), grid).view(-1, grid, grid)
    share = inside.sum((1, 2)) / grid**2
    assert torch.equal(inside.any(1).sum(1) * inside.any(2).sum(1), inside.sum((1, 2)))
    assert float(share.min()) == pytest.approx(0.2, abs=0.02)  # 40 of 196
    assert float(share.max()) == pytest.approx(0.7, abs=0.06)  # 10 of 14 columns, all rows
    assert float(share.mean()) == pytest.approx(0.42, abs=0.04)  # that of all areas and widths on the paper's grid


def test_a_real_example_is_a_noisy_rectangle():
    method, seeds = build(), torch.arange(500)
    r = method.real(seeds, torch.zeros(500, 64))
    inside = rectangles(uniform(seeds, 4, stream=2), 8)
    assert torch.allclose(r.sum(1), torch.ones(500), atol=1e-5)
    outside = torch.where(inside, torch.inf, r.log()).min(1, keepdim=True).values  # even noise near 0
    assert float((r.log() - outside)[~inside].max()) < 1
    assert float((r.log() - outside)[inside].max()) < 1.5
    assert float(r.log()[inside].mean() - r.log()[~inside].mean()) == pytest.approx(0.5, abs=0.05)


def test_masks_replace_rectangles_where_there_are_any():
    guided, plain, batch = build(prior="masks"), build(), make_batch(words=2)
    foreground = coverage(batch.masks, 4)
    assert foreground[0].nonzero().flatten().tolist() == [10, 11, 18, 19, 26, 27]
    own, other = guided.real(batch.seeds, foreground), plain.real(batch.seeds, foreground)
    noise = uniform(batch.seeds, 64, stream=3)
    assert torch.allclose(own[::2], (noise + 0.5 * foreground).softmax(1)[::2])
    assert torch.equal(own[1::2], other[1::2])  # without a mask
    assert not torch.allclose(own[::2], other[::2])
    assert torch.equal(guided.real(batch.seeds, 0.07 * foreground), other)  # less than half a patch
    bare = dataclasses.replace(batch, masks=batch.masks[:, :0], present=batch.present[:, :0])
    assert guided(bare, 0.5).loss.item() == plain(bare, 0.5).loss.item()
    assert guided(batch, 0.5).metrics["foreground_hidden"].item() == pytest.approx(0.75, abs=0.25)


# -- the networks


@pytest.mark.parametrize("grid", [4, 5, 8, 14, 16])
def test_the_discriminator_has_one_output_and_no_state(grid):
    torch.manual_seed(0)
    judge, shares = MaskDiscriminator(grid), torch.rand(3, grid**2).softmax(1)
    said = judge(shares)
    assert said.shape == (3,)
    assert torch.equal(judge(shares), said)
    assert not list(judge.buffers())
    assert judge.layers[4].kernel_size == (grid // 4,) * 2  # 3 x 3 at the paper's 14
    with torch.no_grad():
        judge.layers[2].weight *= 7  # only the direction of a weight counts
    assert torch.allclose(judge(shares), said, atol=1e-6)


def test_weights_are_over_their_largest_singular_value():
    torch.manual_seed(0)
    layer = MaskDiscriminator(8).layers[2]
    reference = nn.Conv2d(16, 32, 4, stride=2, padding=1)
    reference.load_state_dict(layer.state_dict())
    nn.utils.parametrizations.spectral_norm(reference, n_power_iterations=200)  # torch's own
    x = torch.randn(2, 16, 4, 4)
    assert torch.allclose(layer(x), reference.eval()(x), atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_every_channel_of_the_generator_has_a_gradient_at_first(heads):
    for seed in range(20):
        torch.manual_seed(seed)
        generator = MaskGenerator(heads)
        generator(torch.rand(2, heads, 64) / 32)[:, 3].sum().backward()
        assert (generator.conv1.weight.grad.flatten(1).abs().sum(1) > 0).all()


# -- the scorer


def test_the_scorer_is_an_ema_of_the_encoder_by_default():
    method = build(momentum=0.9)
    assert torch.equal(method.scorer.cls_token, method.encoder.cls_token)
    with torch.no_grad():
        method.encoder.cls_token += 1.0
    start = method.scorer.cls_token.clone()
    method.after_step(0.0)
    assert torch.allclose(method.scorer.cls_token - start, torch.full_like(start, 0.1), atol=1e-6)
    before = method.scorer.cls_token.clone()
    method.after_step(1.0)
    assert torch.equal(method.scorer.cls_token, before)


def test_a_given_scorer_is_frozen_and_part_of_checkpoints(tmp_path):
    torch.manual_seed(1)
    other = VisionTransformer(EncoderConfig(image_size=32, patch_size=4, dim=24, depth=3, num_heads=6))
    save_encoder(other, tmp_path)
    method, batch = build(scorer=str(tmp_path)), make_batch()
    found = gradients(method, batch)
    assert not of("scorer", found)
    assert all(gradient.any() for gradient in of("generator.conv1", found))
    assert method.attention(patchify(batch.images, 4)).shape == (4, 6, 64)
    method.after_step(0.0)
    assert all(torch.equal(weight, method.scorer.state_dict()[name]) for name, weight in other.state_dict().items())
    with torch.no_grad():
        other.cls_token += 1.0
    save_encoder(other, tmp_path)  # trained anew meanwhile
    resumed = build(scorer=str(tmp_path))
    resumed.load_state_dict(method.state_dict())
    assert resumed(batch, 0.5).loss.item() == method(batch, 0.5).loss.item()


def test_a_scorer_of_another_patch_size_is_refused(tmp_path):
    with pytest.raises(MissingArtifact, match="there is no encoder in"):
        build(scorer=str(tmp_path))
    save_encoder(VisionTransformer(dataclasses.replace(CONFIG, patch_size=8)), tmp_path)
    with pytest.raises(ConfigError, match=r"the scorer in .* has patch_size 8 instead of 4; give one"):
        build(scorer=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"alpha": -0.1}, "alpha must be at least 0"),
        ({"adversary_weight": -1.0}, "adversary_weight must be at least 0, not -1.0"),
        ({"temperature": 0.0}, "temperature must be at least 0.001"),
        ({"momentum": 1.5}, "at least 0 and at most 1"),
        ({"prior": "circles"}, "automae.prior"),
        ({"config": dataclasses.replace(CONFIG, patch_size=16)}, "4 x 4 patches or more, not 2 x 2"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build(**options)
