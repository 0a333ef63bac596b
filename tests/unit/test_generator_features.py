"""The activations of every family's network, against those that a hook sees in a whole pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from synthgen.backbones.diffusers import Diffusers
from synthgen.backbones.tiny import Tiny
from synthgen.diffusion.features import FeatureReader, block_names, middle_block
from synthgen.diffusion.memory import AdaptiveBatches
from synthgen.errors import ConfigError, SynthgenError, UnknownName
from synthgen.prompts import sample_seed
from tests import models

SIDE = 64
NEAR = {"atol": 1e-5, "rtol": 1e-4}
KEYS = ("0000000003", "a name", "0000000001")
FAMILIES: dict[str, tuple[Callable[[Path], Path], int, str]] = {  # with the number of blocks, and the middle one
    "sd2": (models.make_stable_diffusion_2, 4 + 1 + 8, "up_blocks.1.attentions.1"),
    "sdxl": (models.make_stable_diffusion_xl, 3 + 1 + 6, "up_blocks.1.attentions.0"),
    "sd35": (partial(models.make_stable_diffusion_3, medium=True), 3, "transformer_blocks.1"),
    "flux": (models.make_flux, 2 + 2, "transformer_blocks.1"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Diffusers, int, str]:
    make, count, middle = FAMILIES[request.param]
    return Diffusers(model=str(make(tmp_path_factory.mktemp(request.param))), height=SIDE, width=SIDE), count, middle


@pytest.fixture(scope="module")
def small(stable_diffusion: Path) -> Diffusers:
    return Diffusers(model=str(stable_diffusion))


def pictures(count: int = len(KEYS), side: int = SIDE, seed: int = 0) -> Tensor:
    """Smooth noise, other for each image."""
    rough = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(rough, (side, side), mode="bilinear") * 255).byte().permute(0, 2, 3, 1)


def by_hand(backbone: Any, images: Tensor, timestep: int, seed: int) -> dict[str, Any]:
    """What each block gives in one whole pass over the noised images, in the order in which they come."""
    model, seen = backbone.family, dict[str, Any]()
    names = block_names(model.network)
    handles = [
        model.network.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: seen.__setitem__(name, output)
        )
        for name in names
    ]
    with torch.no_grad():
        latents = model.encode(images)
        noise = torch.stack(
            [
                torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(sample_seed(seed, key)))
                for key in KEYS
            ]
        )
        model.denoiser([""] * len(images), latents)(model.noised(latents, noise, timestep), timestep)
    for handle in handles:
        handle.remove()
    return seen


def as_tokens(output: Any) -> Tensor:
    """A block's output as b n d: a map, or what comes last of several."""
    values = output if isinstance(output, Tensor) else output[-1]
    return values.flatten(2).mT if values.dim() == 4 else values


def test_blocks_are_listed_in_order_and_read_unchanged(drawn):
    backbone, count, middle = drawn
    images, names = pictures(), block_names(backbone.family.network)
    whole = by_hand(backbone, images, timestep=120, seed=5)
    assert list(whole) == list(names)
    assert len(names) == count
    assert middle_block(backbone.family.network) == middle
    tokens = {name: as_tokens(output) for name, output in whole.items()}
    read = FeatureReader(backbone, timesteps=[120], blocks=names, seed=5).read(images, KEYS, 4)
    torch.testing.assert_close(read.pooled, torch.cat([part.mean(1) for part in tokens.values()], 1), **NEAR)
    reader = FeatureReader(backbone, timesteps=[120], seed=5)
    patches = reader.read(images, KEYS, reader.shape[1]).patches
    torch.testing.assert_close(patches.flatten(2).mT.float(), tokens[middle], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("corner", [(0, 1), (1, 0)])
def test_a_map_has_the_orientation_of_its_image(drawn, corner, monkeypatch):
    """Where one corner of the latents changes, the first block's map changes most in that corner."""
    backbone, (row, column) = drawn[0], corner
    before = backbone.family.encode(pictures(1))
    after, half = before.clone(), before.shape[2] // 2
    after[:, :, row * half :, column * half :][:, :, :half, :half] += 3
    reader = FeatureReader(backbone, timesteps=[10], blocks=block_names(backbone.family.network)[:1])
    maps = []
    for latents in (before, after):
        monkeypatch.setattr(backbone.family, "encode", lambda images, latents=latents: latents)
        maps.append(reader.read(pictures(1), KEYS[:1], 2).patches.float())
    change = (maps[1] - maps[0]).square().sum((0, 1))
    assert change.argmax() == 2 * row + column


def test_several_timesteps_and_blocks_are_concatenated(small):
    images, blocks = pictures(side=32), ("up_blocks.0.attentions.1", "up_blocks.2.attentions.0")
    together = FeatureReader(small, timesteps=[50, 300], blocks=blocks[::-1])
    assert together.blocks == blocks  # in the order of the network, however they are listed
    read = together.read(images, KEYS, 8)
    alone = [
        FeatureReader(small, timesteps=[timestep], blocks=[block]).read(images, KEYS, 8)
        for timestep in (50, 300)
        for block in blocks
    ]
    assert together.shape == (2 * (models.WIDTH + models.HALF), 16, 16)
    assert read.patches.shape == (3, together.shape[0], 8, 8)
    torch.testing.assert_close(read.pooled, torch.cat([part.pooled for part in alone], 1))
    torch.testing.assert_close(read.patches, torch.cat([part.patches for part in alone], 1))


def test_features_of_an_image_do_not_depend_on_its_batch(small, monkeypatch):
    """Its noise is of its key and the seed; the batch may be cut, also where memory runs out."""
    images, reader = pictures(side=32), FeatureReader(small, timesteps=[50])
    whole = reader.read(images, KEYS, 4)
    reader.most = 2
    last = reader.read(images.flip(0), KEYS[::-1], 4)
    torch.testing.assert_close(last.pooled.flip(0), whole.pooled, **NEAR)
    assert not torch.allclose(reader.read(images, KEYS[::-1], 4).pooled[0], whole.pooled[0], atol=1e-3)
    other = FeatureReader(small, timesteps=[50], seed=1).read(images, KEYS, 4)
    assert not torch.allclose(other.pooled, whole.pooled, atol=1e-3)

    inner, most = reader._maps, 1

    def narrow(images: Tensor, keys: Any) -> Any:
        if len(images) > most:
            raise torch.OutOfMemoryError
        return inner(images, keys)

    reader.most = 16
    monkeypatch.setattr(small.family, "_batches", AdaptiveBatches())
    monkeypatch.setattr(reader, "_maps", narrow)
    torch.testing.assert_close(reader.read(images, KEYS, 4).pooled, whole.pooled, **NEAR)
    again = FeatureReader(small, timesteps=[50])
    seen = list[int]()
    monkeypatch.setattr(again, "_maps", lambda images, keys: (seen.append(len(images)), inner(images, keys))[1])
    again.read(images, KEYS, 4)
    assert seen == [1, 1, 1]  # another reader of this backbone knows it
    most = 0
    with pytest.raises(SynthgenError, match="too little memory for one image"):
        reader.read(images, KEYS, 4)


def test_the_network_stops_after_the_last_block_that_is_read(small):
    reader, network = FeatureReader(small, timesteps=[50], blocks=["up_blocks.1.attentions.0"]), small.family.network
    called = []
    handles = [
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in ("up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "conv_out")
    ]
    reader.read(pictures(side=32), KEYS, 4)
    for handle in handles:
        handle.remove()
    assert called == ["up_blocks.1.resnets.0"]
    assert not any(module._forward_hooks for module in network.modules())


def test_unreadable_settings_are_refused(small):
    with pytest.raises(
        UnknownName, match=r"'up_blocks.9'; did you mean .*there are: down_blocks.0.attentions.0, .*mid"
    ):
        FeatureReader(small, timesteps=[50], blocks=["up_blocks.9"])
    with pytest.raises(ConfigError, match="activations of object cannot be read"):
        FeatureReader(object(), timesteps=[50])
    reader = FeatureReader(small, timesteps=[50])
    bias = small.family.network.conv_in.bias
    kept = bias.data.clone()
    bias.data[0] = torch.nan
    with pytest.raises(ConfigError, match="not finite numbers; try another dtype"):
        reader.read(pictures(side=32), KEYS, 4)
    bias.data.copy_(kept)


def test_the_shipped_model_is_read_at_its_middle_block_by_default():
    reader = FeatureReader(Tiny(), timesteps=[50])
    assert (reader.blocks, reader.image_size, reader.shape) == (("up_blocks.1.attentions.0",), 128, (96, 8, 8))


def test_the_middle_of_stable_diffusion_is_the_sixth_of_twelve():
    with torch.device("meta"):
        network = UNet2DConditionModel()  # as Stable Diffusion 1 has it
    up = [name for name in block_names(network) if name.startswith("up_blocks.")]
    assert len(up) == 12
    assert up[:4] == [*(f"up_blocks.0.resnets.{number}" for number in range(3)), "up_blocks.1.attentions.0"]
    assert middle_block(network) == up[5] == "up_blocks.1.attentions.2"


def test_blocks_have_maps_of_their_own_size(small):
    """Beside the pooled features; what is larger than asked for is averaged down."""
    images, blocks = pictures(side=32), ("up_blocks.0.attentions.1", "up_blocks.2.attentions.0")
    reader = FeatureReader(small, timesteps=[50, 300], blocks=blocks)
    read = reader.read(images, KEYS, 8, 8)
    coarse, fine = reader.shapes
    assert (coarse[1:], fine[1:]) == ((4, 4), (16, 16))
    assert [one.shape for one in read.maps] == [(3, 2, coarse[0], 4, 4), (3, 2, fine[0], 8, 8)]
    pooled = [one[:, timestep].float().mean((2, 3)) for timestep in (0, 1) for one in read.maps]
    torch.testing.assert_close(torch.cat(pooled, 1), read.pooled, atol=2e-3, rtol=2e-3)
    (own, _) = reader.read(images, KEYS, 8, 16).maps
    torch.testing.assert_close(own, read.maps[0])
    assert reader.read(images, KEYS, 8).maps == ()


def test_an_inverted_image_is_read_on_its_way_to_noise(drawn):
    """At the steps nearest to the timesteps, without noise; the network stops behind the last of them."""
    backbone, images = drawn[0], pictures()
    model, steps = backbone.family, 10
    names = block_names(model.network)[:1]
    seen = list[Any]()
    with torch.no_grad():
        latents = model.encode(images).float()
        times, step = model.inversion(steps, latents)
        denoise = model.casting_denoiser([""] * len(images), latents)
        handle = model.network.get_submodule(names[0]).register_forward_hook(lambda *given: seen.append(given[-1]))
        for number, time in enumerate(times):
            latents = step(latents, number, denoise(latents, time))
        handle.remove()
    asked = [times[4] + 1, times[1] - 1]
    reader = FeatureReader(backbone, timesteps=[round(time) for time in asked], blocks=names, inversion_steps=steps)
    read = reader.read(images, KEYS, 4)
    expected = [as_tokens(seen[number]).float().mean(1) for number in (4, 1)]
    torch.testing.assert_close(read.pooled, torch.cat(expected, 1), **NEAR)
    torch.testing.assert_close(reader.read(images, KEYS[::-1], 4).pooled, read.pooled)  # no chance in it
    assert reader.describe()["inversion_steps"] == steps
    assert reader.describe()["seen_at"] == (round(times[4], 1), round(times[1], 1))
    assert not any(module._forward_hooks for module in model.network.modules())
    close = FeatureReader(backbone, timesteps=[100, 101], blocks=names, inversion_steps=steps)
    with pytest.raises(ConfigError, match=r"several of the timesteps \[100, 101\] in one step; give more"):
        close.read(images, KEYS, 4)


def test_latents_are_encoded_in_halves_where_memory_runs_out(small, monkeypatch):
    reader, encode, most = FeatureReader(small, timesteps=[50]), small.family.encode, 2
    images = pictures(5, side=32)
    whole = reader.latents(images)

    def narrow(images: Tensor) -> Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError
        return encode(images)

    monkeypatch.setattr(small.family, "_batches", AdaptiveBatches())
    monkeypatch.setattr(small.family, "encode", narrow)
    torch.testing.assert_close(reader.latents(images), whole, **NEAR)
    most = 0
    with pytest.raises(SynthgenError, match="too little memory for one image"):
        reader.latents(images)


def test_weights_that_were_moved_while_it_read_can_have_gradients_beyond_them(stable_diffusion):
    """As offloading moves them, in a hook before the first pass."""
    backbone = Diffusers(model=str(stable_diffusion))
    network = backbone.family.network

    def move(module: Any, given: Any) -> None:
        module.to(torch.float64).to(torch.float32)

    handle = network.register_forward_pre_hook(move)
    reader = FeatureReader(backbone, timesteps=[50])
    assert reader.shape
    handle.remove()
    assert not any(weight.is_inference() for weight in network.parameters())
    assert not reader.latents(pictures(1, side=32)).is_inference()
