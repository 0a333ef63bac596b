"""A generator that is cut off and learns: what is copied, what computes, what learns how fast, and what stays."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload_with_hook
from torch import nn

from synthgen.backbones.diffusers import Diffusers
from synthgen.diffusion.features import FeatureReader, block_names
from synthgen.diffusion.truncated import TruncatedGenerator, _initialize
from synthgen.errors import ConfigError, SynthgenError
from synthgen.evaluators import EvalData, LabelledImages
from synthgen.evaluators.fine_tune import FineTune, Learner, parameter_groups, rate_share
from tests import models

SIDE = 64
KEYS = ("0000000003", "a name", "0000000001")
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd2": models.make_stable_diffusion_2,
    "sdxl": models.make_stable_diffusion_xl,
    "sd3": models.make_stable_diffusion_3,
    "sd35": partial(models.make_stable_diffusion_3, medium=True),
    "flux": models.make_flux,
}
QUICK = {"seeds": 2, "steps": 6, "batch_size": 12, "generator_learning_rate": 1e-2, "layer_decay": 1.0, "crop": 1.0}


@pytest.fixture(scope="module", params=FAMILIES)
def drawn(request, tmp_path_factory) -> Diffusers:
    folder = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return Diffusers(model=str(folder), height=SIDE, width=SIDE)


@pytest.fixture(scope="module")
def small(stable_diffusion) -> Diffusers:
    return Diffusers(model=str(stable_diffusion))


def make_reader(backbone, **how) -> FeatureReader:
    return FeatureReader(backbone, **{"timesteps": [120], "seed": 5, **how})


def pictures(side, count=3, seed=0):
    """Smooth noise as pixels, and as the network takes it."""
    rough = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    pixels = (F.interpolate(rough, (side, side), mode="bilinear") * 255).byte().permute(0, 2, 3, 1)
    return pixels, (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)


def pictured(count, seed, side):
    """Images of three colours with noise on them."""
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, side, side, 3), generator=torch.Generator().manual_seed(seed))
    colours = torch.eye(3, dtype=torch.long)[labels] * 190
    pixels = (noise + colours[:, None, None]).byte()
    return LabelledImages(pixels, labels, tuple(f"{seed:03d}{image:07d}" for image in range(count)))


@pytest.fixture(scope="module")
def data(small) -> EvalData:
    reader = make_reader(small, timesteps=[10])
    side = reader.image_size

    def latents(pixels):
        """Colours on the latents' grid: an autoencoder of random weights would hardly leave any."""
        return F.pad(F.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, side // 16), (0, 0, 0, 0, 0, 1))

    reader.latents = latents
    return EvalData(train_images=pictured(24, 1, side), test_images=pictured(12, 2, side), reader=reader)


def state(model):
    """All of a backbone that a training might change."""
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        "network": id(model.network),
        "weights": [weight.clone() for part in parts.values() for weight in part.state_dict().values()],
        "dtypes": [weight.dtype for part in parts.values() for weight in part.parameters()],
        "training": [module.training for part in parts.values() for module in part.modules()],
        "learning": [weight.requires_grad for part in parts.values() for weight in part.parameters()],
        "gradients": [weight.grad for part in parts.values() for weight in part.parameters()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for part in parts.values()
            for module in part.modules()
        ],
        "config": dict(model.pipeline.config),
    }


def assert_same(one, other):
    assert {name: value for name, value in one.items() if name != "weights"} == {
        name: value for name, value in other.items() if name != "weights"
    }
    assert all(torch.equal(before, after) for before, after in zip(one["weights"], other["weights"], strict=True))


# -- what is copied, and what it computes


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_features_equal_those_of_the_reader(drawn, place):
    names = block_names(drawn.family.network)
    blocks = {"first": names[:1], "middle": (), "last": names[-1:]}[place]
    reader = make_reader(drawn, blocks=blocks)
    pixels, images = pictures(reader.image_size)
    expected = reader.read(pixels, KEYS, 4).pooled
    before = state(drawn.family)  # text encoders of transformers hang hooks of their own on themselves at first use
    generator = TruncatedGenerator(reader)
    with torch.inference_mode():
        torch.testing.assert_close(generator(images, KEYS), expected, atol=1e-5, rtol=1e-4)
    assert generator.config.dim == expected.shape[1]
    assert generator.config.depth == len(generator.blocks) == names.index(reader.blocks[0]) + 1
    assert_same(state(drawn.family), before)


def test_exactly_the_copied_weights_have_gradients(drawn):
    """By the gradients in the whole network: those of weights behind the block are none."""
    reader = make_reader(drawn)
    generator, network = TruncatedGenerator(reader), copy.deepcopy(drawn.family.network)
    _, images = pictures(reader.image_size)
    generator(images, KEYS).square().sum().backward()
    found = {name.removeprefix("network."): weight.grad is not None for name, weight in generator.named_parameters()}
    whole, (block,) = TruncatedGenerator(reader), reader.blocks
    whole.network = whole._model.pipeline.unet = whole._model.pipeline.transformer = network.float()
    whole(images, KEYS).square().sum().backward()
    expected = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert {name for name, learns in found.items() if learns} == expected
    # of a joint block that is read the side of the text computes and tells nothing of the image
    assert all(name.startswith(f"{block}.") for name, learns in found.items() if not learns)
    behind = block_names(network)[block_names(network).index(block) + 1 :]
    assert behind
    assert not any(name.startswith(tuple(f"{one}." for one in behind)) for name in found)
    assert sum(weight.numel() for weight in generator.parameters()) < sum(one.numel() for one in network.parameters())


def test_nothing_behind_the_block_computes(drawn):
    generator = TruncatedGenerator(make_reader(drawn))
    last, seen = generator.network.get_submodule(generator.block), list[nn.Module]()
    for module in generator.network.modules():
        module.register_forward_hook(lambda module, given, output: seen.append(module))
    with torch.no_grad():
        generator(pictures(SIDE)[1], KEYS)
    assert seen[-1] is last


def test_noise_depends_on_key_and_seed(small):
    reader = make_reader(small)
    generator, (_, images) = TruncatedGenerator(reader), pictures(reader.image_size)
    with torch.no_grad():
        found = generator(images, KEYS)
        torch.testing.assert_close(generator(images.flip(0), KEYS[::-1]).flip(0), found)
        assert not torch.allclose(generator(images, ["x", "y", "z"]), found, atol=1e-3)
        assert not torch.allclose(TruncatedGenerator(make_reader(small, seed=6))(images, KEYS), found, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [models.make_stable_diffusion, models.make_stable_diffusion_xl, models.make_flux])
def test_half_precision_weights_are_trained_in_float32(make, dtype, tmp_path):
    folder = str(make(tmp_path))
    backbone = Diffusers(model=folder, dtype=dtype, height=SIDE, width=SIDE)
    reader, (_, images) = make_reader(backbone), pictures(SIDE)
    reader.shapes  # noqa: B018  # see above
    before = state(backbone.family)
    generator = TruncatedGenerator(reader)
    assert {weight.dtype for weight in generator.parameters()} == {torch.float32}
    assert generator.uses_bfloat16 == (dtype == "bfloat16")
    found = generator(images, KEYS)
    assert found.dtype == torch.float32
    found.square().mean().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in generator.parameters())
    assert_same(state(backbone.family), before)
    exact = TruncatedGenerator(make_reader(Diffusers(model=folder, height=SIDE, width=SIDE)))
    with torch.no_grad():
        assert F.cosine_similarity(found.detach(), exact(images, KEYS)).min() > 0.99


def test_moving_the_network_does_not_move_the_copy(stable_diffusion):
    backbone = Diffusers(model=str(stable_diffusion))
    pipeline, reader = backbone.family.pipeline, make_reader(backbone)
    _, images = pictures(reader.image_size)
    with torch.no_grad():
        expected = TruncatedGenerator(reader)(images, KEYS)
    _, hook = cpu_offload_with_hook(pipeline.text_encoder, "cpu")
    cpu_offload_with_hook(pipeline.unet, "cpu", prev_module_hook=hook)
    generator = TruncatedGenerator(reader)
    assert not any(hasattr(module, "_hf_hook") for module in generator.modules())
    assert hasattr(pipeline.unet, "_hf_hook")
    nn.init.zeros_(pipeline.unet.conv_in.weight)  # the copy does not look there any more
    with torch.no_grad():
        torch.testing.assert_close(generator(images, KEYS), expected)


# -- new weights


def test_new_weights_have_the_initial_distribution(drawn):
    """Constant where those are, and as wide where they are drawn."""
    network = copy.deepcopy(drawn.family.network)
    for weight in network.parameters():
        nn.init.constant_(weight, 7.0)
    _initialize(network, seed=3)
    expected = dict(type(network).from_config(network.config).named_parameters())
    for name, weight in network.named_parameters():
        other = expected[name].detach()
        if other.unique().numel() == 1:
            assert torch.equal(weight, other), name
        else:
            assert float(weight.detach().std()) == pytest.approx(float(other.std()), rel=0.75), name
            assert weight.abs().max() < 1.5 * other.abs().max() + 0.1, name
    again = copy.deepcopy(network)
    _initialize(again, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))


def test_a_layer_without_a_known_initialisation_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 3))

    with pytest.raises(ConfigError, match="a Odd of the generator cannot be initialised at random"):
        _initialize(nn.Sequential(Odd()), 0)


def test_new_weights_depend_on_the_seed_alone(small):
    reader = make_reader(small)
    before, state_of_torch = state(small.family), torch.random.get_rng_state()
    one, again = (TruncatedGenerator(reader, fresh=True) for _ in range(2))
    other = TruncatedGenerator(make_reader(small, seed=6), fresh=True)
    trained = TruncatedGenerator(reader)
    assert torch.equal(torch.random.get_rng_state(), state_of_torch)
    weights = [generator.network.conv_in.weight for generator in (one, again, other, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not any(torch.allclose(weights[0], weight, atol=1e-3) for weight in weights[2:])
    assert_same(state(small.family), before)


# -- how fast which weight learns


def test_rates_fall_from_block_to_block(small):
    """Of the small U-Net, counted by hand; the block that is read is the seventh."""
    generator = TruncatedGenerator(make_reader(small, blocks=["up_blocks.0.attentions.1"]))
    names = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0.attentions.0"]
    assert [name.rpartition(".attentions")[0] or name for name in generator.blocks[:4]] == names[:4]
    assert generator.blocks[4:] == ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
    expected = {
        "conv_in.weight": 0,
        "time_embedding.linear_1.bias": 0,
        "down_blocks.0.resnets.0.conv1.weight": 1,
        "down_blocks.0.attentions.0.proj_in.weight": 1,
        "down_blocks.0.downsamplers.0.conv.weight": 1,
        "down_blocks.2.resnets.0.conv1.weight": 3,
        "mid_block.resnets.1.conv1.weight": 4,
        "up_blocks.0.resnets.0.conv1.weight": 5,
        "up_blocks.0.resnets.1.conv1.weight": 6,
        "up_blocks.0.attentions.1.proj_out.bias": 6,
    }
    learner = Learner(generator, 3)
    weights = dict(generator.network.named_parameters())
    for name, layer in expected.items():
        assert name in weights
        assert generator.layer(f"network.{name}") == layer, name
        assert rate_share(f"encoder.network.{name}", generator, 0.5) == 0.5 ** (7 - layer), name
    assert rate_share("classify.weight", generator, 0.5) == 1.0
    groups = parameter_groups(learner, 0.5, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(list(learner.parameters()))
    assert {group["share"] for group in groups} == {0.5**power for power in range(8)}
    assert all((weight.ndim > 1) == (group["weight_decay"] > 0) for group in groups for weight in group["params"])


def test_every_block_has_weights_of_its_own(drawn):
    generator = TruncatedGenerator(make_reader(drawn))
    found = {name: generator.layer(name) for name, _ in generator.named_parameters()}
    assert set(found.values()) == set(range(generator.config.depth + 1))
    for name, layer in found.items():
        if layer:
            block = generator.blocks[layer - 1]
            level = block.rpartition(".attentions")[0] or block.rpartition(".resnets")[0] or block
            assert name.startswith(f"network.{level}."), name
        else:
            assert not any(part in name for part in ("blocks.", "mid_block.")), name


# -- the evaluator


def test_a_generator_learns_and_scores_repeat(data):
    """Colours, from which the small random network learns; the generator itself stays as it is."""
    evaluator = FineTune(**QUICK | {"seeds": 1, "steps": 40, "generator_learning_rate": 3e-3})
    model = data.reader.model
    model.network.mid_block.train()
    model.network.conv_in.requires_grad_(False)
    try:
        before = state(model)
        found = evaluator.evaluate(data)
        assert_same(state(model), before)
    finally:
        model.network.eval().requires_grad_(True)
    assert list(found) == ["accuracy", "low", "high", "train_accuracy", "seeds"]
    assert found["accuracy"] > 0.9
    with torch.inference_mode():
        torch.manual_seed(7)
        assert evaluator.evaluate(data) == found


def test_all_of_it_moves_and_the_head_alone_with_hardly_any_decay(data):
    start = dict(TruncatedGenerator(data.reader).named_parameters())

    def moved(layer_decay):
        learned = FineTune(**QUICK | {"layer_decay": layer_decay}).train(data, 0)
        assert not learned.training
        return [
            float((weight - start[name]).detach().abs().max())
            for name, weight in learned.encoder.named_parameters()
            if weight.ndim > 1
        ]

    assert min(moved(1.0)) > 1e-3
    assert max(moved(1e-6)) < 1e-6


def test_the_order_of_images_changes_no_figure(data):
    def shuffled(given):
        order = torch.randperm(len(given.keys), generator=torch.Generator().manual_seed(3)).tolist()
        return LabelledImages(given.pixels[order], given.labels[order], tuple(given.keys[row] for row in order))

    images = {"train_images": shuffled(data.train_images), "test_images": shuffled(data.test_images)}
    evaluator = FineTune(**QUICK | {"seeds": 1, "steps": 3})
    assert evaluator.evaluate(dataclasses.replace(data, **images)) == evaluator.evaluate(data)


def test_noise_is_drawn_anew_in_training_and_once_in_evaluation(data, monkeypatch):
    seen = list[tuple[bool, tuple[str, ...]]]()
    forward = TruncatedGenerator.forward

    def look_on(self, images, keys):
        seen.append((torch.is_grad_enabled(), tuple(keys)))
        return forward(self, images, keys)

    monkeypatch.setattr(TruncatedGenerator, "forward", look_on)
    FineTune(**QUICK | {"steps": 4}).evaluate(data)
    drawn = [key for training, keys in seen if training for key in keys]
    judged = [key for training, keys in seen if not training for key in keys]
    assert len(set(drawn)) == len(drawn) == 2 * 4 * 12
    assert sorted(judged) == sorted(2 * (data.train_images.keys + data.test_images.keys))


def test_training_from_scratch_starts_with_new_weights(data):
    evaluator = FineTune(**QUICK | {"seeds": 1, "steps": 1, "generator_learning_rate": 1e-9})
    fresh = dataclasses.replace(data, random_init=True)
    learned = [evaluator.train(given, 0).encoder.network.conv_in.weight for given in (data, fresh)]
    torch.testing.assert_close(learned[0], data.reader.model.network.conv_in.weight)
    assert not torch.allclose(learned[0], learned[1], atol=1e-3)
    torch.testing.assert_close(learned[1], TruncatedGenerator(data.reader, fresh=True).network.conv_in.weight)


def test_one_copy_at_a_time(data, monkeypatch):
    """Without the garbage collector's help: each is freed before the next one is made."""
    made, alive = list[weakref.ref](), list[int]()
    begin = TruncatedGenerator.__init__

    def look_on(self, *given, **named):
        alive.append(sum(one() is not None for one in made))
        begin(self, *given, **named)
        made.append(weakref.ref(self.network.conv_in.weight))

    monkeypatch.setattr(TruncatedGenerator, "__init__", look_on)
    gc.collect()
    gc.disable()
    try:
        FineTune(**QUICK | {"seeds": 3, "steps": 2}).evaluate(data)
        assert alive == [0, 0, 0]
        assert [one() for one in made] == [None, None, None]
    finally:
        gc.enable()


def test_a_step_is_that_of_plain_adamw(data):
    """One step by hand, of every weight."""
    few = dataclasses.replace(data, train_images=pictured(6, 1, data.reader.image_size))
    evaluator = FineTune(steps=1, batch_size=6, warmup_ratio=0.0, layer_decay=0.5, max_norm=0.0)
    learned = evaluator.train(few, 0)
    images, numbers = next(evaluator.batches(few.train_images, learned.encoder.config, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Learner(TruncatedGenerator(data.reader), 3)
    keys = [f"{few.train_images.keys[number]} at step 0 of training 0" for number in numbers.tolist()]
    F.cross_entropy(start(images, keys), few.train_images.labels[numbers]).backward()
    for name, weight in start.named_parameters():
        rate = 1e-4 * rate_share(name, start.encoder, 0.5)
        kept = 1.0 if weight.ndim == 1 else 1 - rate * 0.05
        expected = kept * weight - rate * weight.grad / (weight.grad.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(learned.get_parameter(name), expected, atol=2e-6, rtol=1e-4)


# -- what is refused


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"timesteps": [50, 150]}, r"at one timestep, not at \[50, 150\]; give one generator_timesteps"),
        ({"blocks": ["mid_block", "up_blocks.0.attentions.0"]}, "up to one block, not mid_block, .* generator_blocks"),
        ({"inversion_steps": 10}, "on noised images; leave generator_inversion_steps 0"),
    ],
)
def test_bad_reader_settings_are_refused(small, how, message):
    with pytest.raises(ConfigError, match=message):
        TruncatedGenerator(make_reader(small, **how))


def test_a_generator_with_non_finite_outputs_is_refused(stable_diffusion):
    backbone = Diffusers(model=str(stable_diffusion))
    nn.init.constant_(backbone.family.network.conv_in.weight, math.nan)
    with pytest.raises(ConfigError, match="not finite numbers; try another dtype"):
        TruncatedGenerator(make_reader(backbone))


@pytest.mark.parametrize("rate", [1e20, 1e30])
def test_a_diverged_training_has_no_score(data, rate):
    with pytest.raises(ConfigError, match="of the generator diverged; give the evaluator a lower generator_learning_r"):
        FineTune(**QUICK | {"generator_learning_rate": rate, "steps": 2}).evaluate(data)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_is_explained(error, data, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(TruncatedGenerator, "forward", full)
    with pytest.raises(SynthgenError, match="too little memory to train the generator on 12 images at once; give fine"):
        FineTune(**QUICK).evaluate(data)
