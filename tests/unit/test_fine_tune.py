"""Fine-tuning: which weights learn how fast, on which images, and that the encoder itself stays as it is."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BeitConfig, BeitModel

from synthgen.errors import ConfigError, SynthgenError
from synthgen.evaluators import EvalData, LabelledImages
from synthgen.evaluators.fine_tune import FineTune, Learner, parameter_groups, rate_share
from synthgen.models.transformers_encoder import load_tower
from tests.evaluation import make_encoder, make_pictured

QUICK = {"seeds": 2, "steps": 30, "batch_size": 16, "learning_rate": 0.02, "layer_decay": 1.0}


def make(*, train: int = 48, test: int = 24, known: bool = True, **more) -> EvalData:
    images = make_pictured(train, 1, known=known), make_pictured(test, 2, known=known)
    return EvalData(train_images=images[0], test_images=images[1], encoder=make_encoder(), **more)


# -- what is learned


def test_every_layer_of_the_encoder_learns():
    """With a layer_decay of nearly nothing the blocks stay where they are."""
    found = FineTune(**QUICK).evaluate(make())
    assert found["accuracy"] == found["train_accuracy"] == 1.0
    assert found["seeds"] == 2
    frozen = FineTune(**QUICK | {"layer_decay": 1e-6}).train(make(), 0)
    start = make_encoder()
    assert all(
        torch.allclose(weight, frozen.encoder.get_parameter(name), atol=1e-3)
        for name, weight in start.blocks.named_parameters(prefix="blocks")
    )
    learned = FineTune(**QUICK).train(make(), 0)
    moved = [
        float((weight - learned.encoder.get_parameter(name)).detach().abs().max())
        for name, weight in start.named_parameters()
        if weight.ndim > 1
    ]
    assert min(moved) > 1e-2


def test_the_encoder_is_not_changed():
    data = make()
    data.encoder.blocks[0].requires_grad_(False)
    before = {name: value.clone() for name, value in data.encoder.state_dict().items()}
    assert FineTune(**QUICK).evaluate(data) == FineTune(**QUICK).evaluate(data)
    after = data.encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not data.encoder.training
    assert all(weight.grad is None for weight in data.encoder.parameters())
    assert not data.encoder.blocks[0].attn.qkv.weight.requires_grad


def test_the_order_of_images_changes_no_figure():
    """Not even the interval, and not where they were drawn at random."""
    data = make(known=False)
    other = dataclasses.replace(data, train_images=shuffled(data.train_images), test_images=shuffled(data.test_images))
    assert other.train_images.keys != data.train_images.keys
    assert FineTune(**QUICK).evaluate(other) == FineTune(**QUICK).evaluate(data)


def test_no_dropout_in_training(tmp_path):
    """Drop path of BEiT would make each look another one."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    beit = BeitModel(BeitConfig(**shape, image_size=16, patch_size=4, drop_path_rate=0.9, layer_scale_init_value=1.0))
    beit.save_pretrained(tmp_path)
    learner = Learner(load_tower(tmp_path), 3)
    torch.nn.init.normal_(learner.classify.weight)  # or it would be as good as silent
    images = torch.randn(4, 3, 16, 16)
    assert learner(images).std() > 0.1
    assert torch.equal(learner(images), learner(images))
    learner(images).square().sum().backward()
    assert all(weight.requires_grad for weight in learner.parameters())
    learned = {name for name, weight in learner.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert any("layer.0." in name or "layers.0." in name for name in learned)


def shuffled(given: LabelledImages) -> LabelledImages:
    order = torch.randperm(len(given.keys), generator=torch.Generator().manual_seed(3)).tolist()
    return LabelledImages(given.pixels[order], given.labels[order], tuple(given.keys[row] for row in order))


def test_the_global_generator_does_not_matter():
    torch.manual_seed(1)
    first = FineTune(**QUICK).evaluate(make(known=False))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        assert FineTune(**QUICK).evaluate(make(known=False)) == first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_seeds_are_other_trainings():
    evaluator, data = FineTune(**QUICK), make()
    one, again, other = (evaluator.train(data, seed).classify.weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_class_that_training_lacks_counts_as_wrong():
    data = make()
    labels = data.test_images.labels.clone()
    labels[labels == 2] = -1
    test = dataclasses.replace(data.test_images, labels=labels)
    assert FineTune(**QUICK).evaluate(dataclasses.replace(data, test_images=test))["accuracy"] == 16 / 24


def test_fewer_images_than_a_batch_are_a_batch():
    evaluator, train = FineTune(steps=5, batch_size=64), make_pictured(6, 1, known=True)
    drawn = list(evaluator.batches(train, make_encoder().config, 0))
    assert [sorted(numbers.tolist()) for _, numbers in drawn] == [list(range(6))] * 5


def test_progress_is_described():
    told = []
    FineTune(**QUICK).evaluate(make(describe=told.append))
    assert len(told) == 6
    assert told[0] == f"training 1 of 2, step 0 of 30, loss {math.log(3):.3f}"
    assert told[5].startswith("training 2 of 2, step 20 of 30, loss ")


# -- views


def normal(pixels, config):
    """Pixels behind one another as the encoder gets them."""
    return (pixels.float() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)


def test_views_match_their_indices():
    """Of an image of one colour every crop and mirror image is of that colour."""
    colours = torch.arange(20, dtype=torch.uint8)[:, None] * torch.tensor([12, 3, 7], dtype=torch.uint8)
    pixels = colours[:, None, None].expand(-1, 16, 16, -1).contiguous()
    train = shuffled(dataclasses.replace(make_pictured(20, 1, known=False), pixels=pixels))
    config, seen = make_encoder().config, set()
    for images, numbers in FineTune(steps=5, batch_size=8).batches(train, config, 0):
        expected = normal(train.pixels[numbers], config).permute(0, 3, 1, 2)
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
        seen |= set(numbers.tolist())
    assert len(seen) > 16  # two epochs of two batches, each without the four images that fill none, and one batch


def test_views_of_an_image_differ():
    train = make_pictured(1, 1, known=True)
    views = [images for images, _ in FineTune(steps=8).batches(train, make_encoder().config, 0)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(views, 2))


def test_test_images_are_not_cropped():
    given, encoder = make_pictured(8, 1, known=True), make_encoder()
    learner = Learner(encoder, 3)
    torch.nn.init.normal_(learner.classify.weight)
    whole = normal(given.pixels, encoder.config).permute(0, 3, 1, 2)
    torch.testing.assert_close(learner.scores(given.pixels), learner(whole))


# -- how fast which weight learns


def test_rates_fall_from_layer_to_layer():
    """As in MAE's code, counted by hand for two blocks."""
    learner = Learner(make_encoder(), 3)
    expected = {"cls_token": 0.125, "patch_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "norm": 1.0}
    groups = parameter_groups(learner, 0.5, 0.05)
    rates = {id(weight): (group["share"], group["weight_decay"]) for group in groups for weight in group["params"]}
    assert len(rates) == len(list(learner.parameters()))
    for name, weight in learner.named_parameters():
        (own,) = {rate for start, rate in expected.items() if name.startswith(f"encoder.{start}")} or {1.0}
        assert rate_share(name, learner.encoder, 0.5) == own, name
        assert rates[id(weight)] == (own, 0.0 if name.endswith(("bias", "_token")) or "norm" in name else 0.05), name
    assert {part for part, _ in rates.values()} == {0.125, 0.25, 0.5, 1.0}
    assert {group["share"] for group in parameter_groups(learner, 1.0, 0.05)} == {1.0}


def test_the_learning_rate_schedule():
    evaluator = FineTune(steps=100, learning_rate=0.5, warmup_ratio=0.1)
    rates = [evaluator.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.5 * (step + 1) / 11 for step in range(10)])
    assert rates[10] == max(rates) == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert 0 < rates[99] < 1e-3


def test_a_step_is_that_of_plain_adamw():
    """One step by hand, of every weight."""
    data = make(train=6)
    evaluator = FineTune(steps=1, batch_size=6, warmup_ratio=0.0, layer_decay=0.5, max_norm=0.0, label_smoothing=0.1)
    learned = evaluator.train(data, 0)
    images, numbers = next(evaluator.batches(data.train_images, data.encoder.config, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Learner(copy.deepcopy(data.encoder), 3)
    targets = F.one_hot(data.train_images.labels[numbers], 3) * 0.9 + 0.1 / 3
    (-(start(images).log_softmax(1) * targets).sum(1).mean()).backward()
    for name, weight in start.named_parameters():
        rate = 1e-3 * rate_share(name, start.encoder, 0.5)
        kept = 1.0 if weight.ndim == 1 or name.endswith("_token") else 1 - rate * 0.05
        expected = kept * weight - rate * weight.grad / (weight.grad.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(learned.get_parameter(name), expected, atol=2e-6, rtol=1e-4)


def test_the_class_token_can_be_the_feature():
    encoder = make_encoder()
    images = torch.randn(2, 3, 16, 16)
    learner = Learner(encoder, 3, "cls").eval()
    torch.nn.init.normal_(learner.classify.weight)
    token = F.layer_norm(encoder(images)[:, 0], (16,), eps=1e-6)
    torch.testing.assert_close(learner(images), token @ learner.classify.weight.T)
    assert not torch.allclose(learner(images), Learner(encoder, 3)(images), atol=1e-3)


# -- what is refused


@pytest.mark.parametrize("rate", [1.0, 10.0, 1e20])
def test_a_diverged_training_has_no_score(rate):
    """Also one that ends in finite numbers, no better than a guess."""
    with pytest.raises(ConfigError, match=r"diverged; give .* a lower learning_rate \(its loss rose to "):
        FineTune(**QUICK | {"learning_rate": rate, "steps": 40}).evaluate(make())


def test_a_diverged_last_step_has_no_score():
    with pytest.raises(ConfigError, match=r"diverged; give .* a lower learning_rate$"):
        FineTune(seeds=1, steps=1, learning_rate=1e30).evaluate(make())


def test_uninformative_images_are_no_divergence():
    data = make(known=False)
    same = dataclasses.replace(data.train_images, pixels=torch.full_like(data.train_images.pixels, 100))
    found = FineTune(**QUICK).evaluate(dataclasses.replace(data, train_images=same))
    assert found["train_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_is_explained(error, monkeypatch):
    def full(self, images, keys):
        raise error

    monkeypatch.setattr(Learner, "forward", full)
    with pytest.raises(SynthgenError, match="too little memory to train the encoder on 16 images at once"):
        FineTune(**QUICK).evaluate(make())


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 0}, {"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan},
        {"generator_learning_rate": 0.0}, {"generator_learning_rate": math.nan},
        {"weight_decay": -0.1}, {"max_norm": -1.0}, {"layer_decay": 0.0}, {"layer_decay": 1.1}, {"crop": 0.0},
        {"crop": 1.5}, {"warmup_ratio": -0.1}, {"warmup_ratio": 1.1}, {"flip": 2.0}, {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}.* must be|must be .*{name}"):
        FineTune(**options)


def test_an_encoder_is_needed():
    with pytest.raises(ConfigError, match="neither an encoder nor a generator"):
        FineTune().evaluate(dataclasses.replace(make(), encoder=None))
