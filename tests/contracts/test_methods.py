"""What every method must do, plain and guided, and what each must do besides."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from synthgen.augment import Augment
from synthgen.config import Choice
from synthgen.datasets import ImageDataset, Sample
from synthgen.errors import ConfigError
from synthgen.loader import Batch, collate
from synthgen.methods import METHODS
from synthgen.methods._products import products, unit
from synthgen.methods._regions import WHOLE
from synthgen.methods.umd import cosine_schedule
from synthgen.methods.vlp import FAR, _draw, blocks_of
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import patchify, take
from synthgen.models.transformers_vit import _block_list, _theirs, to_transformers
from synthgen.models.vit import EncoderConfig, VisionTransformer, load_encoder, save_encoder
from synthgen.train.optim import OptimSettings, build_optimizer, learning_rate
from tests.factories import make_generation

NAMES = METHODS.names()
TOLD = {"class_labels": True}  # options of those that can be told classes
FORMS = [(name, {}) for name in NAMES]
FORMS += [
    (name, TOLD) for name in NAMES if TOLD.keys() <= inspect.signature(METHODS.load(name).__init__).parameters.keys()
]
EACH = [(name, options, guided) for name, options in FORMS for guided in (False, True)]
CONFIG = EncoderConfig(image_size=32, patch_size=4, dim=32, depth=2, num_heads=4)


def make_samples(count):
    samples = []
    for number in range(count):
        words = ("disc", "square") if number % 2 else ("disc",)
        generation, truth = make_generation("0", words, 32, seed=number)
        labels = (truth * np.arange(1, len(words) + 1)[:, None, None]).max(0).astype(np.uint8)
        text = f"{generation.request.prompt.text} on table {number}"
        label = ("disc", "square", None)[number % 3]
        samples.append(Sample(str(number), generation.image, label, text, words, labels))
    return samples


class Held(ImageDataset):
    """Samples in memory."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def key(self, index):
        return self.samples[index].key

    def label(self, index):
        return self.samples[index].label

    def has_masks(self):
        return self.samples[0].label_map is not None


def make_batch(count=4, samples=None):
    """The same samples in two views."""
    samples = samples or make_samples(count)
    first, second = (
        collate(
            [Augment(size=32)(s, np.random.default_rng([n, v])) for n, s in enumerate(samples)], CONFIG.mean, CONFIG.std
        )
        for v in range(2)
    )
    return dataclasses.replace(first, second=second)


def without_masks(batch):
    bare = {"masks": batch.masks[:, :0], "present": batch.present[:, :0]}
    second = None if batch.second is None else dataclasses.replace(batch.second, **bare)
    return dataclasses.replace(batch, **bare, second=second)


def build(name, **options):
    torch.manual_seed(0)
    method = METHODS.build(Choice(name, options), encoder=VisionTransformer(CONFIG))
    method.fit_to(Held(make_samples(3)))
    return method


def build_each(name, options, guided):
    return build(name, **options, **(METHODS.load(name).guided if guided else {}))


def train(method, batch, steps, rate=2e-3):
    """So many steps on one batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], rate)
    losses = []
    for step in range(steps):
        loss = method(batch, step / steps).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step / steps)
    return losses


@pytest.mark.parametrize(("name", "options", "guided"), EACH)
def test_every_method(name, options, guided):
    """Gives a finite loss and gradient to all of the encoder, repeats whatever the seed of torch, and travels."""
    method, batch = build_each(name, options, guided), make_batch()
    assert method.uses_masks == guided
    losses = []
    for seed, copy in enumerate((method, pickle.loads(pickle.dumps(method)))):
        torch.manual_seed(seed)
        output = copy(batch, 0.5)
        losses.append(output.loss.item())
        assert output.loss.ndim == 0
        assert output.loss.isfinite()
        assert all(value.numel() == 1 and not value.requires_grad for value in output.metrics.values())
    assert losses[0] == losses[1]
    method(batch, 0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.encoder.named_parameters())
    assert all(
        p.grad is not None for p in method.parameters() if p.requires_grad
    )  # or processes could not share a step
    method.after_step(1.0)
    for view in (method.views(), method.second_views()):
        if view is not None:
            shown = view(Sample("0", np.zeros((40, 50, 3), np.uint8)), np.random.default_rng(0))
            assert shown.image.shape == (32, 32, 3)


@pytest.mark.parametrize(("name", "options", "guided"), EACH)
def test_every_method_learns_from_64_images(name, options, guided):
    losses = train(build_each(name, options, guided), make_batch(64), 8)
    assert np.mean(losses[-2:]) < 0.95 * losses[0]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_every_method_overfits_one_batch(name, options):
    losses = train(build(name, **options), make_batch(8), 80)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_every_encoder_is_the_same_when_exported(name, options, tmp_path):
    """What pretraining leaves behind, ours and that of transformers, says what the method's encoder says."""
    method, batch = build(name, **options), make_batch()
    train(method, batch, 2)
    save_encoder(method.encoder, tmp_path, method={"name": name})
    with torch.no_grad():
        features = method.encoder(batch.images)
        assert torch.equal(load_encoder(tmp_path)(batch.images), features)
        assert torch.allclose(to_transformers(method.encoder)(batch.images).last_hidden_state, features, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_wrong_type_is_told(name):
    parameters = inspect.signature(METHODS.load(name).__init__).parameters
    options = [option for option in parameters if option not in ("self", "encoder")]
    for option in options:
        wrong = 3 if isinstance(parameters[option].default, str) else "most"
        with pytest.raises(ConfigError, match=rf"{name}\.{option}"):
            build(name, **{option: wrong})
    with pytest.raises(ConfigError, match="unknown setting"):
        build(name, no_such_option=1)


@pytest.mark.parametrize("name", NAMES)
def test_options_that_came_later_are_by_default_what_earlier_versions_did(name):
    method = METHODS.load(name)
    parameters = inspect.signature(method.__init__).parameters
    assert {option: parameters[option].default for option in method.added} == method.added


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_every_method_knows_again_what_it_took_from_the_data(name, options):
    """A fresh one that has seen no data, as one that is loaded, has the same loss with the same state."""
    method, batch = build(name, **options), make_batch()
    train(method, batch, 1)
    fresh = METHODS.build(Choice(name, options), encoder=VisionTransformer(CONFIG))
    fresh.load_state_dict(method.state_dict())
    assert fresh(batch, 0.5).loss.item() == method(batch, 0.5).loss.item()


@pytest.mark.parametrize("name", [name for name, options in FORMS if options])
def test_every_method_that_tells_classes_asks_for_labels(name):
    method = build(name, **TOLD)
    bare = [dataclasses.replace(sample, label=None) for sample in make_samples(3)]
    with pytest.raises(ConfigError, match="no label in the 3 samples looked at"):
        method.check(bare)
    method.check([*bare, *make_samples(1)])
    batch = make_batch()
    assert method(dataclasses.replace(batch, labels=(None,) * 4), 0.5).loss.isfinite()
    build(name).check(bare)
    other = build(name)
    other.load_state_dict({key: value for key, value in method.state_dict().items() if "classes" not in key})


@pytest.mark.parametrize(("name", "options", "guided"), EACH)
def test_every_method_tells_the_same_figures_of_every_batch(name, options, guided):
    """Parts of a step, and processes, whose samples lack something are averaged with those that have it."""
    method, batch = build_each(name, options, guided), make_batch()
    wordless = dataclasses.replace(batch, words=((),) * 4, second=dataclasses.replace(batch.second, words=((),) * 4))
    lacking = [
        without_masks(wordless),
        dataclasses.replace(batch, masks=batch.masks & False, present=batch.present & False),
        dataclasses.replace(batch, texts=("",) * 4),
        dataclasses.replace(batch, labels=(None,) * 4),
    ]
    for progress in (0.0, 0.5, 1.0):
        told = method(batch, progress).metrics
        for other in lacking:
            metrics = method(other, progress).metrics
            assert list(metrics) == list(told)  # they are stacked in this order
            assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_guided_method_asks_for_masks(name):
    method = build_each(name, {}, guided=True)
    bare = [dataclasses.replace(sample, words=(), label_map=None) for sample in make_samples(3)]
    with pytest.raises(ConfigError, match="no mask in the 3 samples"):
        method.check(bare)
    method.check([*bare, *make_samples(2)])
    assert method(without_masks(make_batch()), 0.5).loss.isfinite()  # a batch without any does no harm
    build(name).check(bare)


@pytest.mark.parametrize(
    ("name", "options", "guided"), [form for form in EACH if form[0] not in ("contrastive", "vlp")]
)
def test_the_step_is_that_of_its_halves(name, options, guided):
    """Draws belong to the samples: however a step is cut, the mean loss is the same."""
    method, samples = build_each(name, options, guided), make_samples(8)
    whole = make_batch(samples=samples)

    def part(batch, rows):
        tensors = {
            f.name: v[rows] for f in dataclasses.fields(Batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)
        }
        names = {n: tuple(getattr(batch, n)[i] for i in rows) for n in ("keys", "texts", "words", "labels")}
        return dataclasses.replace(batch, **tensors, **names, second=None)

    halves = [method(part(whole, rows), 0.7).loss.item() for rows in ([0, 2, 4, 6], [1, 3, 5, 7])]
    assert method(whole, 0.7).loss.item() == pytest.approx(sum(halves) / 2, rel=1e-5)


# -- draws


def test_draws_are_even_and_belong_to_their_seed():
    seeds = torch.tensor([7, 2**62, 8])
    drawn = uniform(seeds, 200, 100)
    assert torch.equal(uniform(seeds[1:2], 200, 100)[0], drawn[1])
    assert (drawn.mean(), drawn.var() * 12) == (pytest.approx(0.5, abs=0.005), pytest.approx(1, abs=0.02))
    assert 0 <= drawn.min() < drawn.max() < 1
    assert torch.histc(drawn, 10).sub(6000).abs().max() < 300  # 4 deviations of 73
    others = uniform(seeds, 200, 100, stream=1)
    for one, other in (
        (drawn[0], drawn[1]),
        (drawn[0], drawn[2]),
        (drawn[0], others[0]),
        (drawn[0, :-1], drawn[0, 1:]),
    ):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.03
    assert uniform(seeds).shape == (3,)


def test_normal_draws_have_the_moments():
    drawn = normal(torch.arange(50), 2000).double()
    moments = [float((drawn**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)
    assert drawn.isfinite().all()


# -- masked autoencoder


def test_mae_loss_is_its_formula():
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


def test_mae_is_that_of_transformers():
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


def test_every_patch_is_visible_or_hidden_once_and_in_the_same_number():
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
    """Free-ATM as read in docs/methods.md: a share of the hidden patches comes from the foreground, best first."""
    method = build("mae", foreground_share=0.5)
    foreground = torch.zeros(1, 64)
    foreground[0, :10] = 1.0  # fewer than half of 48: all are hidden
    foreground[0, 10:20] = 0.4  # not foreground: less than half covered
    foreground = foreground.expand(2000, -1)
    _, hidden = method.split(torch.arange(len(foreground)), foreground, 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 2000
    assert (often[:10] == 1).all()
    assert (often[10:] - 38 / 54).abs().max() < 0.06  # the others share what is left, whatever their score


def test_guidance_takes_the_best_covered_up_to_its_share():
    method = build("mae", foreground_share=0.5)
    foreground = torch.linspace(0.5, 1, 64).expand(500, -1)  # all are foreground; 24 of the 48 hidden are guided
    _, hidden = method.split(torch.arange(len(foreground)), foreground, 1.0)
    often = torch.bincount(hidden.flatten(), minlength=64) / 500
    assert (often[40:] == 1).all()
    assert (often[:40] - 24 / 40).abs().max() < 0.1


def test_ties_are_broken_by_lot():
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
    ],
)
def test_bad_options_are_told(options, said):
    with pytest.raises(ConfigError, match=said):
        build("mae", **options)


# -- contrastive


def test_contrastive_loss_is_its_formula():
    """Words across and within crops, written out as loops over queries and keys."""
    method = build("contrastive", instance_share=1.0, queue=5, temperature=0.3)
    batch = make_batch(6)
    method(make_batch(3), 0.0)
    method.after_step(0.0)  # now something is in the queue
    regions = method.objects(batch, batch.second)
    with torch.no_grad():
        tokens = [method.encoder(view.images)[:, 1:] for view in (batch, batch.second)]
        targets = [method.teacher(view.images)[:, 1:] for view in (batch, batch.second)]

    def vectors(tokens, weights, *heads):
        found = {}
        for image, slot in regions.present.nonzero().tolist():
            w = weights[image, slot]
            x = sum(w[patch] * tokens[image, patch] for patch in range(64)) / w.sum()
            for head in heads:
                x = head(x[None, None])[0, 0]
            found[image, slot] = x / x.norm()
        return found

    total, count = 0.0, 0
    with torch.no_grad():
        weights = regions.shares
        for here, there in ((0, 1), (1, 0)):
            queries = vectors(tokens[here], weights[here], method.project, method.predict)
            across = vectors(targets[there], weights[there], method.teacher_project)
            within = vectors(targets[here], weights[here], method.teacher_project)
            for (image, slot), q in queries.items():
                word = int(regions.words[image, slot])
                positive = torch.exp(q @ across[image, slot] / 0.3)
                negative = sum(
                    torch.exp(q @ key / 0.3)
                    for (i, s), key in across.items()
                    if (i, s) != (image, slot) and (word == WHOLE or int(regions.words[i, s]) != word)
                )
                negative += sum(torch.exp(q @ key / 0.3) for (i, s), key in within.items() if i == image and s != slot)
                negative += sum(
                    torch.exp(q @ key / 0.3)
                    for key, other in zip(method.queue_keys, method.queue_words, strict=True)
                    if key.norm() > 0 and (word == WHOLE or int(other) != word)
                )
                total, count = total - 2 * 0.3 * float(torch.log(positive / (positive + negative))), count + 1
    assert 0 < int(method.queue_end) < 5  # a part of the queue is filled
    assert count > 12  # images with two words among them
    assert method(batch, 0.0).loss.item() == pytest.approx(2 * total / count, rel=1e-4)


def test_plain_contrastive_is_that_of_moco():
    method, batch = build("contrastive"), make_batch(5)
    loss = method(batch, 0.0).loss.item()
    total = 0.0
    with torch.no_grad():
        for a, b in ((batch, batch.second), (batch.second, batch)):
            q = method.predict(method.project(method.encoder(a.images)[:, 1:].mean(1)))
            k = method.teacher_project(method.teacher(b.images)[:, 1:].mean(1))
            logits = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T / 0.2
            total += 2 * 0.2 * torch.nn.functional.cross_entropy(logits, torch.arange(5)).item()
    assert loss == pytest.approx(total, rel=1e-5)


def test_words_count_where_both_views_show_them():
    method, batch = build("contrastive", instance_share=1.0, max_words=2), make_batch(3)
    masks = torch.zeros(3, 3, 32, 32, dtype=torch.bool)
    masks[0, 1, :8, :8] = masks[0, 2, 8:16, :8] = masks[1, 0, :8, :8] = True
    masks[2, 0, 0, 0] = True  # less than half a patch
    words = (("sky", "dog", "Cat"), ("cat",), ("dog",))
    there = {"present": masks.flatten(2).any(2), "words": words}
    first = dataclasses.replace(batch, masks=masks, **there)
    second = dataclasses.replace(batch.second, masks=masks.clone(), **there)
    second.masks[1] = False  # the second view shows the cat no more
    regions = method.objects(first, second)
    assert regions.present.tolist() == [[True, True], [True, False], [True, False]]
    assert (regions.words == WHOLE).tolist() == [[False, False], [True, True], [True, True]]
    assert regions.shares[0][0, 0].nonzero().flatten().tolist() == [0, 1, 8, 9]
    assert (regions.shares[0][1, 0] == 1).all()  # the whole image instead
    same = method.objects(dataclasses.replace(first, words=(("x", "dog", "cat"), *words[1:])), second)
    assert torch.equal(same.words, regions.words)  # case does not matter


def test_the_teacher_follows_at_a_falling_rate():
    method = build("contrastive", momentum=0.9)
    with torch.no_grad():
        method.encoder.cls_token += 1.0
    start = method.teacher.cls_token.clone()
    method.after_step(0.0)
    assert torch.allclose(method.teacher.cls_token - start, torch.full_like(start, 0.1), atol=1e-6)
    before = method.teacher.cls_token.clone()
    method.after_step(1.0)
    assert torch.equal(method.teacher.cls_token, before)
    assert not any(p.requires_grad for p in (*method.teacher.parameters(), *method.teacher_project.parameters()))


def test_the_queue_forgets_the_oldest():
    method = build("contrastive", queue=6)
    keys = []
    for number in range(3):
        method(make_batch(samples=make_samples(12)[4 * number : 4 * number + 4]), 0.0)
        keys.append(method._new_keys[0][0])
        method.after_step(1.0)
    assert int(method.queue_end) == 12
    assert torch.equal(method.queue_keys, torch.cat([keys[1][2:], keys[2]]))


def test_images_and_objects_have_their_own_negatives_in_the_queue():
    """The mixed loss is the mean of the two that each have a queue of their own."""
    first, second = make_batch(samples=make_samples(8)[:4]), make_batch(samples=make_samples(8)[4:])
    second.second.masks[0] = False  # an image without words is a whole one among the objects
    losses = []
    for share in (0.0, 1.0, 0.25):
        method = build("contrastive", instance_share=share, queue=40)
        method(first, 0.0)
        method.after_step(1.0)  # with the teacher as it was
        method(second, 0.0)
        method.after_step(1.0)
        losses.append(method(first, 0.0).loss.item())
    assert losses[2] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-6)
    assert int(method.queue_end) < 40


def test_one_word_has_no_other_to_be_told_from():
    method = build("contrastive", instance_share=0.5)
    one = [dataclasses.replace(sample, words=("disc",)) for sample in make_samples(4)]
    with pytest.raises(ConfigError, match="all 4 samples looked at have the one word 'disc'"):
        method.check(one)
    build("contrastive", instance_share=0.5, same_word_negatives=True).check(one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"instance_share": 1.5}, "between 0 and 1"),
        ({"momentum": -0.1}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"queue": -1}, "0 or more"),
        ({"jitter": 1.0}, "below 1"),
    ],
)
def test_bad_options_of_contrastive_are_told(options, said):
    with pytest.raises(ConfigError, match=said):
        build("contrastive", **options)


# -- vlp


def test_blocks_are_numbered_row_by_row():
    masks = torch.zeros(1, 4, 30, 30, dtype=torch.bool)
    masks[0, 0, 2:5, 2:5] = True
    masks[0, 1, 12:18, 22:29] = True
    masks[0, 2, 10:20, :] = True  # its box's middle is the image's
    masks[0, 3, 29, 0] = masks[0, 3, 29, 29] = True
    assert blocks_of(masks, 3).tolist() == [[1, 6, 5, 8]]
    assert blocks_of(masks.flip(3), 3).tolist() == [[3, 4, 5, 8]]


def test_the_sentence_says_where_the_word_is_after_crop_and_flip():
    method = build("vlp", position_share=1.0)
    image, labels = np.zeros((60, 60, 3), np.uint8), np.zeros((60, 60), np.uint8)
    labels[:20, :20] = 1
    sample = Sample("0", image, None, "a dog on a beach .", ("dog",), labels)
    said = set()
    for number in range(30):
        view = method.views()(sample, np.random.default_rng(number))
        batch = dataclasses.replace(collate([view], CONFIG.mean, CONFIG.std), seeds=torch.tensor([number]))
        rows, columns = np.nonzero(view.label_map)
        block = 3 * int(3 * (rows.min() + rows.max() + 1) / 64) + int(3 * (columns.min() + columns.max() + 1) / 64) + 1
        (text,) = method.texts(batch)
        assert text == f"a dog on a beach. The dog is in block {block}."
        said.add(block)
    assert {1, 3} <= said  # mirrored ones among them


def test_texts_that_say_where_need_masks_and_reach_the_encoder():
    """The other guidance of vlp, which ``--guided`` does not stand for."""
    method, batch = build("vlp", position_share=1.0), make_batch()
    method(batch, 0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.encoder.named_parameters())
    assert method.uses_masks
    bare = [dataclasses.replace(sample, words=(), label_map=None) for sample in make_samples(3)]
    with pytest.raises(ConfigError, match="no mask in the 3 samples"):
        method.check(bare)
    plain = build("vlp")
    assert method(without_masks(batch), 0.5).loss.item() == plain(without_masks(batch), 0.5).loss.item()


def test_a_text_that_names_a_side_is_not_mirrored():
    view = build("vlp").views()
    labels = np.zeros((32, 32), np.uint8)
    labels[:, :4] = 1
    for text, mirrored in (("a dog on the Left", False), ("a dog leftover", True)):
        sample = Sample("0", np.zeros((32, 32, 3), np.uint8), None, text, ("dog",), labels)
        views = [view(sample, np.random.default_rng(number)) for number in range(40)]
        assert any(v.label_map[:, -1].any() for v in views) == mirrored


def test_sentences_come_in_their_share_and_for_every_word():
    method = build("vlp", position_share=0.5, max_words=3)
    samples = [sample for sample in make_samples(400) if len(sample.words) == 2]
    batch = collate(samples, CONFIG.mean, CONFIG.std)
    texts = method.texts(batch)
    told = [text for text in texts if "block" in text]
    assert 0.4 < len(told) / len(texts) < 0.6
    assert 0.35 < sum("The disc" in text for text in told) / len(told) < 0.65
    assert all(text.startswith("a photo of") and "disc and" not in text for text in texts)  # three words of the caption
    assert build("vlp").texts(batch)[0] == batch.texts[0]


def test_vlp_loss_is_its_formula():
    """Equal texts share their target; images without a text are left out."""
    method = build("vlp")
    samples = make_samples(6)
    samples[1] = dataclasses.replace(samples[1], text=samples[3].text)
    samples[4] = dataclasses.replace(samples[4], text="")
    batch = make_batch(samples=samples)
    metrics = method(batch, 0.0).metrics
    with torch.no_grad():
        v = torch.nn.functional.normalize(method.image_head(method.encoder(batch.images)[:, 1:].mean(1)))
        u = torch.nn.functional.normalize(method.text_head(method.text(*method.tokenizer(batch.texts))[:, 0]))
    kept = [0, 1, 2, 3, 5]
    total = 0.0
    for near, far in ((v, u), (u, v)):
        for i in kept:
            chances = torch.stack([near[i] @ far[j] / 0.07 for j in kept]).softmax(0)
            fits = [chances[n] for n, j in enumerate(kept) if batch.texts[j] == batch.texts[i]]
            total -= sum(float(chance.log()) for chance in fits) / len(fits) / 2
    assert metrics["itc"].item() == pytest.approx(total / len(kept), rel=1e-4)
    assert metrics["with_text"].item() == pytest.approx(5 / 6)


def test_naming_regions_is_the_contrast_between_objects_and_words():
    """Means of patches, under masks and of all, against words alone; equal words share a target, faint ones none."""
    method = build("vlp", region_weight=1.0, max_regions=2)
    batch = make_batch(6)
    batch.masks[1, 0] = False  # nothing of the first disc is left
    batch.masks[1, 0, 0, :4] = True  # but a quarter of a patch
    metrics = method(batch, 0.0).metrics
    unit, regions, wholes, words = torch.nn.functional.normalize, [], [], []
    with torch.no_grad():
        tokens = method.encoder(batch.images)[:, 1:].view(6, 8, 8, -1)
        for image, own in enumerate(batch.words):
            for word, mask in zip(own, batch.masks[image].float(), strict=False):
                shares = mask.view(8, 4, 8, 4).mean((1, 3))
                if shares.sum() >= 0.5:
                    mean = (shares[..., None] * tokens[image]).sum((0, 1)) / shares.sum()
                    regions.append(unit(method.image_head(mean), dim=0))
                    wholes.append(unit(method.image_head(tokens[image].mean((0, 1))), dim=0))
                    words.append(word)
        read = {w: unit(method.text_head(method.text(*method.tokenizer([w]))[0, 0]), dim=0) for w in set(words)}
    named = [read[word] for word in words]
    assert 6 < len(words) < 9
    total = 0.0
    seen, said, meant = regions + wholes, named * 2, words * 2
    for near, far in ((seen, said), (said, seen)):
        for i, word in enumerate(meant):
            chances = torch.stack([near[i] @ other / 0.07 for other in far]).softmax(0)
            fits = [chance for chance, other in zip(chances, meant, strict=True) if other == word]
            total -= sum(float(chance.log()) for chance in fits) / len(fits) / 2
    assert metrics["regions"].item() == pytest.approx(total / len(meant), rel=1e-4)
    nearest = [words[int(torch.stack([region @ other for other in named]).argmax())] for region in regions]
    right = np.mean([one == other for one, other in zip(nearest, words, strict=True)])
    assert metrics["named"].item() == pytest.approx(right)


def test_regions_learn_their_words():
    method, batch = build("vlp", region_weight=1.0), make_batch(12)
    train(method, batch, 60)
    assert method(batch, 1.0).metrics["named"].item() > 0.9


def test_token_numbers_may_have_gaps(tmp_path):
    """As in a tokenizer.json from which entries were removed: the table has a row for the highest number."""
    entries = {"[UNK]": 0, "a": 1, "dog": 7, "cat": 9}
    tokenizer = Tokenizer(WordLevel(entries, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    method = build("vlp", tokenizer=str(tmp_path))
    assert method.text.embed.weight.shape[0] == method.text.config.vocab_size == 10
    texts = ("a dog", "a cat", "a bus", "dog")
    assert method(dataclasses.replace(make_batch(4), texts=texts), 0.0).loss.isfinite()
    assert build("vlp").tokenizer.vocab_size == 3541  # the shipped one has none


def test_padding_is_seen_by_none():
    method = build("vlp").eval()
    short, long = "a dog", "a photo of a dog and a cat on a beach"
    alone, real = method.tokenizer([short])
    together, both = method.tokenizer([short, long])
    assert together.shape[1] > alone.shape[1]
    with torch.no_grad():
        assert torch.allclose(method.text(alone, real)[0, 0], method.text(together, both)[0, 0], atol=1e-6)


def test_wrong_pairs_are_drawn_by_their_likeness():
    logits = torch.tensor([1.0, 3.0, 2.0, 5.0]).expand(20000, -1)
    allowed = torch.tensor([True, True, True, False]).expand(20000, -1)
    drawn, there = _draw(logits, allowed, uniform(torch.arange(20000)))
    often = torch.bincount(drawn, minlength=4) / 20000
    assert often.tolist() == pytest.approx([*torch.tensor([1.0, 3.0, 2.0]).softmax(0).tolist(), 0], abs=0.015)
    assert there.all()
    assert not _draw(logits[:1], torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1))[1].any()


def test_equal_texts_are_no_wrong_pairs():
    method, batch = build("vlp"), make_batch(4)
    output = method(dataclasses.replace(batch, texts=("a dog",) * 4), 0.0)
    output.loss.backward()
    assert method.encoder.cls_token.grad.isfinite().all()
    nothing = method(dataclasses.replace(batch, texts=("",) * 4), 0.0)
    assert nothing.loss.item() == 0.0


def of_one_prompt(count):
    """Images of one prompt with two objects at equal places: any sentence on either is true of every image."""
    batch = make_batch(count)
    masks = torch.zeros(count, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, 2:8, 2:8] = masks[:, 1, 24:30, 24:30] = True
    words, texts = (("dog", "beach"),) * count, ("a dog on a beach",) * count
    return dataclasses.replace(batch, masks=masks, present=masks.flatten(2).any(2), words=words, texts=texts)


def test_equal_captions_with_different_sentences_are_no_negatives():
    method, batch = build("vlp", position_share=1.0), of_one_prompt(8)
    assert sorted(set(method.texts(batch))) == [
        "a dog on a beach. The beach is in block 9.",
        "a dog on a beach. The dog is in block 1.",
    ]
    valid, match = [], method.match
    method.match = lambda fused, pairs: valid.append(pairs) or match(fused, pairs)
    metrics = method(batch, 0.0).metrics
    assert valid[0].tolist() == [True] * 8 + [False] * 16  # no wrong pair of image and text
    texts, scores = method.texts(batch), []
    with torch.no_grad():
        v = unit(method.image_head(method.encoder(batch.images)[:, 1:].mean(1)))
        u = unit(method.text_head(method.text(*method.tokenizer(texts))[:, 0]))
        for ours, theirs in ((v, u), (u, v)):
            for i in range(8):  # of equal texts alone
                chances = torch.stack([ours[i] @ theirs[j] / 0.07 for j in range(8) if texts[j] == texts[i]]).softmax(0)
                scores.append(-float(chances.log().mean()))
    assert metrics["itc"].item() == pytest.approx(sum(scores) / 16, rel=1e-4)
    other = dataclasses.replace(batch, texts=("a cat on a beach", *batch.texts[1:]))
    method(other, 0.0)
    assert valid[1].tolist() == [True] * 24  # another caption is a negative of all


def test_an_image_without_a_caption_gets_no_sentence():
    method, batch = build("vlp", position_share=1.0), of_one_prompt(4)
    batch = dataclasses.replace(batch, texts=("", "  ", "a dog", "a beach"), words=((" dog ", "dog\n"),) * 4)
    *without, first, second = method.texts(batch)
    assert without == ["", ""]
    assert first in {f"a dog. The dog is in block {block}." for block in (1, 9)}
    assert second in {f"a beach. The dog is in block {block}." for block in (1, 9)}
    assert method(batch, 0.0).metrics["with_text"].item() == 0.5


def test_texts_whose_tokens_are_read_alike_are_the_same():
    """Cut behind the same token they are no wrong pairs, whatever follows; cut a token later they would be others."""
    samples = make_samples(4)
    long = "a photo of a disc on a table beside"
    texts = (f"{long} a window", f"{long} two doors", "a square", f"{long} a window")
    batch = make_batch(samples=[dataclasses.replace(s, text=t) for s, t in zip(samples, texts, strict=True)])
    read = len(build("vlp").tokenizer([long])[0][0]) - 1  # without the token that ends a text
    cut, whole = build("vlp", max_tokens=read), build("vlp", max_tokens=read + 4)
    tokens, _ = cut.tokenizer(texts)
    assert torch.equal(tokens[0], tokens[1])
    same = dataclasses.replace(batch, texts=(texts[0], texts[0], *texts[2:]))
    assert cut(batch, 0.5).loss.item() == cut(same, 0.5).loss.item()
    assert whole(batch, 0.5).loss.item() != whole(same, 0.5).loss.item()
    cased = dataclasses.replace(batch, texts=(texts[0].upper(), *texts[1:]))
    assert whole(batch, 0.5).loss.item() == whole(cased, 0.5).loss.item()


@pytest.mark.parametrize("caption", ["{} on its deck beneath dramatic thunderclouds", "{} 船", "{}" + "船" * 40])
def test_a_long_caption_leaves_room_for_where_the_object_is(caption):
    caption = caption.format("a close-up photograph of a weathered wooden fishing boat with a disc standing proudly")
    method = build("vlp", position_share=1.0, max_tokens=24)
    sentence = "The disc is in block 7."
    text = method.extended(caption, sentence)
    begun, _, rest = text.partition(". ")
    assert (rest, caption.startswith(begun)) == (sentence, True)
    tokens, _ = method.tokenizer([text, *(f"{begun}. The disc is in block {block}." for block in range(8))])
    assert [torch.equal(tokens[0], row) for row in tokens[1:]] == [block == 7 for block in range(8)]
    assert 22 <= len(method.tokenizer([text])[0][0]) <= 24  # no more is cut than must be
    assert method.extended("a disc .", sentence) == f"a disc. {sentence}"
    assert build("vlp", max_tokens=10).extended(caption, sentence) == sentence
    assert build("vlp", max_tokens=6).extended(caption, sentence) == caption  # not even that would be read


@pytest.mark.parametrize(("begin", "edge"), [(0.0005, 0.001), (0.6, 0.5)])
def test_a_temperature_out_of_range_comes_back_and_goes_on_learning(begin, edge):
    method, batch = build("vlp"), make_batch(8)
    with torch.no_grad():
        method.temperature.fill_(begin)
    train(method, batch, 1)
    assert method.temperature.item() == pytest.approx(edge)
    train(method, batch, 4)
    assert method.temperature.grad.item() != 0
    assert 0.001 < method.temperature.item() < 0.5
    assert method(batch, 0.5).metrics["temperature"].item() == method.temperature.item()


def test_a_temperature_in_range_is_left_alone():
    method = build("vlp", temperature=0.0123)
    before = method.temperature.item()
    method.after_step(0.5)
    assert method.temperature.item() == before


def test_vlp_asks_for_texts():
    with pytest.raises(ConfigError, match="no text in the 3 samples"):
        build("vlp").check([dataclasses.replace(sample, text="") for sample in make_samples(3)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"position_share": 2.0}, "between 0 and 1"),
        ({"blocks": 0}, "1 or more"),
        ({"max_regions": 0}, "1 or more"),
        ({"region_weight": -1.0}, "negative"),
        ({"max_tokens": 2}, "4 or more"),
        ({"temperature": 0.9}, "0.001 and 0.5"),
    ],
)
def test_bad_options_of_vlp_are_told(options, said):
    with pytest.raises(ConfigError, match=said):
        build("vlp", **options)


# -- umd


def test_umd_loss_is_its_formula():
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


def test_umd_sees_nothing_of_hidden_patches():
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


def test_clean_images_meet_a_plain_encoder():
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


def test_without_hiding_umd_is_a_diffusion_model():
    method, batch = build("umd", noisy_mask_ratio=0.0, clean_share=0.0), make_batch()
    output = method(batch, 0.0)
    assert output.loss.item() == pytest.approx(
        float(output.metrics["noise_error"] + output.metrics["noisy_pixel_error"]) / 2
    )
    assert "clean_pixel_error" not in output.metrics


@pytest.mark.parametrize("num_steps", [1, 2, 7, 125, 300, 600, 1000])
def test_umd_takes_as_many_steps_as_asked(num_steps):
    method, times = build("umd"), []
    method.noise = lambda x, time, numbers=None: times.append(time) or torch.zeros_like(x)
    method.sample(torch.tensor([1]), num_steps)
    assert len(times) == num_steps
    assert (times[0], times[-1]) == (1000, 1 if num_steps > 1 else 1000)  # from pure noise to the least
    gaps = -np.diff(times)
    assert num_steps == 1 or 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1


def test_umd_draws_images():
    method = build("umd")
    images = method.sample(torch.tensor([1, 2, 1]), num_steps=4)
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clean_share": 1.0}, "below 1"),
        ({"clean_mask_ratio": 0.0}, "must hide some"),
        ({"noisy_mask_ratio": 1.0}, "leave some visible"),
        ({"foreground_share": -0.5}, "between 0 and 1"),
    ],
)
def test_bad_options_of_umd_are_told(options, said):
    with pytest.raises(ConfigError, match=said):
        build("umd", **options)


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


# -- products of vectors in bfloat16


def test_products_are_of_full_precision_in_any_training():
    ours, theirs = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).unbind()
    whole = ours @ theirs.mT
    with torch.autocast("cpu", torch.bfloat16):
        assert (ours @ theirs.mT).dtype == torch.bfloat16
        assert torch.equal(products(ours, theirs), whole)
        assert products(ours.bfloat16(), theirs.bfloat16()).dtype == unit(ours.bfloat16()).dtype == torch.float32
        assert torch.allclose(unit(ours.bfloat16()).norm(dim=-1), torch.ones(3, 5), atol=1e-6)


def fine(numbers):
    """Whether numbers have more digits than bfloat16 holds."""
    return numbers.dtype == torch.float32 and bool((numbers != numbers.bfloat16().float()).any())


def test_similarities_are_worked_out_in_full_also_in_bfloat16():
    """Over a temperature of 0.01 the digits that bfloat16 lacks would be tenths of a logit."""
    batch, seen = make_batch(6), []
    vlp = build("vlp", region_weight=1.0, temperature=0.01)
    contrast = vlp.contrast
    vlp.contrast = lambda logits, fits, told: seen.append(logits) or contrast(logits, fits, told)
    with torch.autocast("cpu", torch.bfloat16):
        vlp(batch, 0.0)
    assert [fine(0.01 * logits.where(logits > FAR, 0)) for logits in seen] == [True] * 4
    method = build("contrastive", queue=4)
    method(batch, 0.0)
    method.after_step(0.0)  # which fills the queue
    q, k, within = (unit(torch.randn(6, 1, 256, generator=torch.Generator().manual_seed(n))) for n in range(3))
    given = q, k, within, method.whole(batch), method.queue_words == WHOLE
    whole = method.contrast(*given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.contrast(*given)[0], whole)
