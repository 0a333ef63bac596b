"""The two passes of DifFeed against hooks and passes by hand, and what is learned through them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput

from synthgen.backbones.diffusers import Diffusers
from synthgen.diffusion.features import FeatureReader
from synthgen.diffusion.feedback import FeedbackNetwork, _plus, feedback_pairs
from synthgen.errors import ConfigError, SynthgenError
from synthgen.evaluators import EvalData, Latents
from synthgen.evaluators._attentive import AttentiveHead
from synthgen.evaluators.diffeed import Diffeed, Learner
from tests import models
from tests.evaluation import make_latents

SIDE = 8  # of the latents; the U-Net's grids are 8, 4 and 2
KEYS = ("0000000003", "a name", "0000000001")
QUICK = {"seeds": 1, "steps": 20, "width": 16, "num_heads": 2, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def small(stable_diffusion: Path) -> Diffusers:
    return Diffusers(model=str(stable_diffusion))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Diffusers:
    """Stable Diffusion XL in small, whose finest level has no attention."""
    return Diffusers(model=str(models.make_stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))), height=64, width=64)


def make_network(backbone: Diffusers, **how) -> FeedbackNetwork:
    return FeedbackNetwork(FeatureReader(backbone, **{"timesteps": [50], **how}))


def draw(count=3, seed=0):
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def zeros(network, noised):
    """Feedback that says nothing, at the size of each source."""
    return [torch.zeros_like(source) for source in network.sources(noised)]


# -- pairs


def entries(network):
    """Every block by its number, counted from the module tree: changes of size are entries of the encoder alone."""
    found = ["conv_in"]
    for number, down in enumerate(network.down_blocks):
        kind = "attentions" if getattr(down, "attentions", None) else "resnets"
        found += [f"down_blocks.{number}.{kind}.{inner}" for inner in range(len(down.resnets))]
        found += [f"down_blocks.{number}.downsamplers.0"] if down.downsamplers else []
    encoder = len(found)
    found.append("mid_block")
    for number, up in enumerate(network.up_blocks):
        kind = "attentions" if getattr(up, "attentions", None) else "resnets"
        found += [f"up_blocks.{number}.{kind}.{inner}" for inner in range(len(up.resnets))]
    return dict(enumerate(found, 1)), encoder


def unet(**config):
    """A U-Net whose weights are nowhere; without options that of Stable Diffusion 1."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
}
ADM = {  # its levels and blocks, without attention
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "down_block_types": ("DownBlock2D",) * 6,
    "up_block_types": ("UpBlock2D",) * 6,
    "mid_block_type": "UNetMidBlock2D",
}
TINY = {**SDXL, "layers_per_block": 1, "block_out_channels": (32, 64, 64), "attention_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "sources", "targets"),
    [
        (ADM, [21, 24, 27, 30, 33, 36], [17, 14, 11, 8, 5, 2]),
        ({}, [15, 18, 21, 24], [11, 8, 5, 2]),
        (SDXL, [12, 15, 18], [8, 5, 2]),
        (TINY, [8, 10, 12], [6, 4, 2]),
    ],
    ids=["adm", "sd1", "sdxl", "tiny"],
)
def test_pairs_are_those_of_the_paper(config, sources, targets):
    network = unet(**config)
    (numbered, encoder), pairs = entries(network), feedback_pairs(network)
    number_of = {name: number for number, name in numbered.items()}
    assert [number_of[pair.source] for pair in pairs] == sources
    assert [number_of[pair.target] for pair in pairs] == targets
    assert all(source + target == 2 * encoder + 2 for source, target in zip(sources, targets, strict=True))
    assert all(pair.source_channels == pair.target_channels for pair in pairs)
    assert [pair.target_channels for pair in pairs] == list(reversed(network.config.block_out_channels))


def test_pairs_of_stable_diffusion_by_name():
    assert [(pair.source, pair.target) for pair in feedback_pairs(unet())] == [
        ("up_blocks.0.resnets.1", "down_blocks.3.resnets.0"),
        ("up_blocks.1.attentions.1", "down_blocks.2.attentions.0"),
        ("up_blocks.2.attentions.1", "down_blocks.1.attentions.0"),
        ("up_blocks.3.attentions.1", "down_blocks.0.attentions.0"),
    ]


# -- passes


@pytest.mark.parametrize("name", ["small", "wide"])
def test_feedback_reaches_the_next_block_and_the_skip_connection(name, request):
    network = make_network(request.getfixturevalue(name), blocks=["mid_block"])
    unet, noised = network.model.network, network.noised(draw(), KEYS)
    behind, skipped, plain = {}, {}, {}

    def look_on(into, skips):
        """What the block behind each target takes, and what each level gives for the decoder."""
        handles = []
        for number, down in enumerate(unet.down_blocks):
            following = down.downsamplers[0] if down.downsamplers else unet.mid_block
            handles.append(
                following.register_forward_pre_hook(
                    lambda module, given, number=number: into.__setitem__(number, given[0])
                )
            )
            handles.append(
                down.register_forward_hook(
                    lambda module, given, output, number=number: skips.__setitem__(number, output[1][0])
                )
            )
        return handles

    torch.manual_seed(0)
    feedback = [torch.rand_like(source) for source in network.sources(noised)]
    for given, into, skips in (((), plain, {}), (feedback, behind, skipped)):
        handles = look_on(into, skips)
        with torch.no_grad():
            network.read(noised, given)
        for handle in handles:
            handle.remove()
    for number in range(len(unet.down_blocks)):
        assert torch.equal(behind[number], skipped[number])
    # before the first target both passes are the same, so there the difference is the feedback itself
    torch.testing.assert_close(behind[0] - plain[0], feedback[-1], atol=1e-5, rtol=1e-5)
    assert all(not torch.allclose(behind[number], plain[number]) for number in plain)


@pytest.mark.parametrize("name", ["small", "wide"])
def test_without_feedback_the_map_is_the_readers_own(name, request):
    backbone = request.getfixturevalue(name)
    reader = FeatureReader(backbone, timesteps=[120], seed=5)
    network, side = FeedbackNetwork(reader), reader.image_size
    images = torch.randint(0, 256, (3, side, side, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    noised = network.noised(reader.latents(images), KEYS)
    (expected,) = reader.read(images, KEYS, 4, largest=64).maps
    none, silent = network.read(noised), network.read(noised, zeros(network, noised))
    torch.testing.assert_close(none, expected[:, 0].float(), atol=2e-3, rtol=2e-3)  # which is kept as float16
    torch.testing.assert_close(silent, none, atol=1e-6, rtol=0)
    (whole,) = reader._maps(images, KEYS)
    torch.testing.assert_close(none, whole, atol=1e-5, rtol=1e-5)


def test_noise_depends_on_key_and_seed(small):
    network, latents = make_network(small), draw()
    noised = network.noised(latents, KEYS)
    assert torch.equal(network.noised(latents.flip(0), KEYS[::-1]).flip(0), noised)
    assert not torch.allclose(make_network(small, seed=1).noised(latents, KEYS), noised, atol=1e-2)


def test_sources_are_the_outputs_of_blocks_in_a_plain_pass(small):
    network = make_network(small)
    noised = network.noised(draw(), KEYS)
    for pair, source in zip(network.pairs, network.sources(noised), strict=True):
        alone = make_network(small, blocks=[pair.source])
        torch.testing.assert_close(source, alone.read(noised))
        assert source.shape[1] == pair.source_channels
        assert not source.requires_grad


def test_feedback_of_another_size_is_resized(small):
    network = make_network(small)
    noised = network.noised(draw(), KEYS)
    whole = [torch.randn_like(source[:, :, :1, :1]).expand_as(source) for source in network.sources(noised)]
    torch.testing.assert_close(network.read(noised, [one[:, :, :1, :1] for one in whole]), network.read(noised, whole))


def test_a_map_is_added_inside_its_container():
    values, added = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 2, 2)
    assert torch.equal(_plus(values, added), torch.ones(1, 2, 4, 4))
    first, second = _plus((values, "kept"), added)
    assert torch.equal(first, torch.ones(1, 2, 4, 4))
    assert second == "kept"
    output = _plus(Transformer2DModelOutput(sample=values), added)
    assert type(output) is Transformer2DModelOutput
    assert torch.equal(output.sample, output[0])
    assert torch.equal(output.sample, torch.ones(1, 2, 4, 4))
    assert not values.any()


# -- gradients


def make_learner(network, **how):
    torch.manual_seed(0)
    channels, rows, columns = network.read(network.noised(draw(1), KEYS[:1])).shape[1:]
    return Learner(network, AttentiveHead([(channels, rows, columns)], 1, 3, width=16, num_heads=2), **how)


def test_gradients_reach_the_feedback_layers_and_nothing_of_the_network(small):
    network = make_network(small)
    learner = make_learner(network)
    F.cross_entropy(learner(network.noised(draw(), KEYS)), torch.arange(3)).backward()
    for layer in learner.layers:
        assert layer[0].weight.grad.abs().max() > 0
    assert all(weight.grad is not None for weight in learner.parameters())
    assert all(weight.grad is None for weight in network.model.network.parameters())
    own = {id(weight) for weight in network.model.network.parameters()}
    assert not any(id(weight) in own for weight in learner.parameters())


def test_a_gradient_is_the_slope_of_the_map(small):
    """Against a difference quotient, in a random direction."""
    network = make_network(small)
    noised = network.noised(draw(), KEYS)
    torch.manual_seed(0)
    feedback = [torch.rand_like(source, requires_grad=True) for source in network.sources(noised)]
    step = [torch.randn_like(one) for one in feedback]
    weights = torch.randn_like(network.read(noised))
    (weights * network.read(noised, feedback)).mean().backward()
    slope = sum((one.grad * direction).sum() for one, direction in zip(feedback, step, strict=True))
    ahead, back = (
        (weights * network.read(noised, [one + sign * 1e-2 * way for one, way in zip(feedback, step, strict=True)]))
        .mean()
        .detach()
        for sign in (1, -1)
    )
    assert float(slope) == pytest.approx(float(ahead - back) / 2e-2, rel=0.02)


def test_small_gradients_pass_a_network_of_float16(stable_diffusion):
    """A loss a thousand times smaller has the same slope, as in float32; plain float16 would lose it."""
    slopes = {}
    for dtype in ("float32", "float16"):
        network = make_network(Diffusers(model=str(stable_diffusion), dtype=dtype))
        noised = network.noised(draw(), KEYS)
        torch.manual_seed(0)
        feedback = [torch.rand(source.shape, requires_grad=True) for source in network.sources(noised)]
        weights = torch.randn(network.read(noised).shape)
        (1e-3 * (weights * network.read(noised, feedback)).mean()).backward()
        slopes[dtype] = [one.grad.flatten() for one in feedback]
    for exact, half in zip(*slopes.values(), strict=True):
        assert half.dtype == torch.float32
        assert F.cosine_similarity(exact, half, dim=0) > 0.99


def test_the_network_is_restored(small):
    network = make_network(small)
    unet = network.model.network
    noised = network.noised(draw(), KEYS)
    unet.mid_block.train()
    unet.conv_in.weight.requires_grad_(False)
    before = [module.training for module in unet.modules()], [weight.requires_grad for weight in unet.parameters()]
    assert any(before[0])
    assert any(before[1])
    learner = make_learner(network)
    learner(noised).sum().backward()
    with pytest.raises(RuntimeError, match="size of tensor"):
        network.read(noised, [torch.zeros(3, 1, 1, 1)[:, [0, 0, 0]]] * 3)
    after = [module.training for module in unet.modules()], [weight.requires_grad for weight in unet.parameters()]
    assert after == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    unet.eval().requires_grad_(True)


# -- what is refused


@pytest.mark.parametrize("make", [models.make_stable_diffusion_3, models.make_flux])
def test_a_transformer_is_refused(make, tmp_path):
    with pytest.raises(ConfigError, match=r"DifFeed needs a U-Net, and .*Transformer.* use attentive_probe instead"):
        make_network(Diffusers(model=str(make(tmp_path)), height=64, width=64))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"timesteps": [50, 150]}, r"one timestep, not at \[50, 150\]; give one generator_timesteps"),
        (
            {"blocks": ["mid_block", "up_blocks.1.attentions.0"]},
            "one block of the middle .* give one such generator_blocks",
        ),
        ({"blocks": ["down_blocks.1.attentions.0"]}, "one block of the middle .* give one such generator_blocks"),
        ({"inversion_steps": 10}, "noised images and no inverted ones; leave generator_inversion_steps 0"),
    ],
)
def test_bad_reader_settings_are_refused(small, how, message):
    with pytest.raises(ConfigError, match=message):
        make_network(small, **how)


def test_non_finite_maps_are_refused(small):
    network = make_network(small)
    noised = network.noised(draw(), KEYS)
    with pytest.raises(ConfigError, match="not finite numbers; try another dtype"):
        network.read(noised * torch.inf)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"width": 12}, {"learning_rate": 0.0}, {"batch_size": 0}, {"seeds": 0}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        Diffeed(**options)


# -- sizes of the paper


def count(module):
    return sum(weight.numel() for weight in module.parameters())


def test_the_number_of_parameters_is_that_of_the_paper(small):
    network = make_network(small)
    network.pairs = feedback_pairs(unet(**ADM))
    with torch.device("meta"):
        head = AttentiveHead([(1024, 16, 16)], 1, 1000)
        difformer = AttentiveHead([(1024, 8, 8), (1024, 16, 16), (512, 64, 64)], 3, 1000)
        learner = Learner(network, head)
    assert count(learner.layers) / 1e6 == pytest.approx(2.76, abs=0.005)
    assert count(head) / 1e6 == pytest.approx(27.8, abs=0.05)
    assert count(difformer) / 1e6 == pytest.approx(31.8, abs=0.05)
    assert count(learner) / 1e6 == pytest.approx(30.5, abs=0.06)


# -- the evaluator


@pytest.fixture(scope="module")
def data(small) -> EvalData:
    reader = FeatureReader(small, timesteps=[10])
    latents = (make_latents(count, seed, known=True) for count, seed in ((48, 1), (24, 2)))
    return EvalData(train_latents=next(latents), test_latents=next(latents), reader=reader)


@pytest.mark.parametrize("feedback", [True, False])
def test_classes_are_learned_and_scores_are_reproducible(data, feedback):
    evaluator = Diffeed(feedback=feedback, **QUICK)
    network = data.reader.model.network
    before = [weight.clone() for weight in network.parameters()]
    scores = evaluator.evaluate(data)
    assert scores["accuracy"] == scores["train_accuracy"] == 1.0
    assert list(scores) == ["accuracy", "low", "high", "train_accuracy", "seeds"]
    assert all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))
    assert evaluator.evaluate(data) == scores


def test_batch_norm_uses_batches_in_training_and_running_means_in_evaluation(data):
    network = FeedbackNetwork(data.reader)
    diffeed, given, head = Diffeed(**QUICK), data.train_latents, AttentiveHead([(16, 8, 8)], 1, 3, width=16)

    def scores(learner, latents, numbers):
        return learner(network.noised(latents.values[numbers], [latents.keys[number] for number in numbers]))

    learner = diffeed.train(lambda: Learner(network, head), scores, given, "cpu", 0)
    assert not learner.training
    assert len(learner.layers) == len(network.pairs)
    assert all(int(layer[1].num_batches_tracked) == QUICK["steps"] for layer in learner.layers)
    noised = network.noised(data.test_latents.values, data.test_latents.keys)
    with torch.no_grad():
        together, alone = learner(noised), torch.cat([learner(one) for one in noised.split(1)])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


def test_without_feedback_it_is_the_head_on_the_readers_map(data):
    network = FeedbackNetwork(data.reader)
    learner = make_learner(network, feedback=False).eval()
    assert count(learner) == count(learner.head)
    noised = network.noised(draw(), KEYS)
    with torch.no_grad():
        torch.testing.assert_close(learner(noised), learner.head([network.read(noised)[:, None]]))
    learner(noised).sum().backward()
    assert all(weight.grad is not None for weight in learner.parameters())


def test_a_class_that_training_lacks_counts_as_wrong(data):
    labels = data.test_latents.labels.clone()
    labels[labels == 1] = -1  # a third of them
    test = Latents(data.test_latents.values, labels, data.test_latents.keys)
    scores = Diffeed(**QUICK).evaluate(dataclasses.replace(data, test_latents=test))
    assert scores["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_is_explained(error, data, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(FeedbackNetwork, "sources", full)
    with pytest.raises(SynthgenError, match=r"too little memory .* 16 images; give diffeed a smaller batch_size"):
        Diffeed(**QUICK).evaluate(data)
