"""The encoder: patches and places, shapes from settings, files, and the transformers twin."""

from __future__ import annotations

import json
import math

import pytest
import torch

from synthgen.config import Choice
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, UnknownName
from synthgen.models.decoder import NoiseDecoder, PixelDecoder
from synthgen.models.layers import Block, CrossBlock, attend, patchify, restore, sincos_positions, take, unpatchify
from synthgen.models.masked_denoiser import MaskedDenoiser
from synthgen.models.narrow_decoder import NarrowDecoder
from synthgen.models.transformers_vit import save_transformers, to_transformers
from synthgen.models.vit import SIZES, EncoderConfig, VisionTransformer, encoder_config, load_encoder, save_encoder

CONFIG = EncoderConfig(image_size=32, patch_size=8, dim=64, depth=2, num_heads=4)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = VisionTransformer(CONFIG).eval()
    for parameter in encoder.parameters():  # zero biases and unit norms would hide a swapped name
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return encoder


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_patches_are_rows_columns_channels_and_go_back():
    x = images()
    patches = patchify(x, 8)
    assert torch.equal(patches[1, 6].view(8, 8, 3), x[1, :, 8:16, 16:24].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 8), x)


def test_splitting_and_joining_patches_is_exact():
    tokens, order = torch.randn(4, 16, 5), torch.rand(4, 16).argsort(1)
    visible, hidden = order[:, :4], order[:, 4:]
    assert torch.equal(restore(take(tokens, visible), take(tokens, hidden), visible, hidden), tokens)


def test_positions_are_those_of_the_formula():
    places = sincos_positions(8, 3)[0]
    assert places[0].abs().max() == 0  # the class token has none
    row, column = 2, 1
    wanted = [f(p * 10000 ** -(k / 2)) for p in (column, row) for f in (math.sin, math.cos) for k in range(2)]
    assert torch.allclose(places[1 + row * 3 + column], torch.tensor(wanted))
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(6, 3)


def test_patch_embedding_is_the_convolution(encoder):
    conv = encoder.patch_embed.proj(images()).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder.patch_embed(patchify(images(), 8)), conv, atol=1e-5)


def test_order_of_patches_does_not_matter(encoder):
    order = torch.rand(3, 16).argsort(1)
    whole = encoder(images())
    shuffled = encoder.encode(take(patchify(images(), 8), order), order)
    assert torch.allclose(shuffled[:, 1:], take(whole[:, 1:], order), atol=1e-5)
    assert torch.allclose(shuffled[:, 0], whole[:, 0], atol=1e-5)


def test_hidden_patches_are_not_seen(encoder):
    places = torch.tensor([[0, 3, 7, 12]]).expand(3, -1)
    x, y = images(), images()
    y[:, :, 24:, 24:] += 9.0  # patch 15
    seen = [encoder.encode(take(patchify(z, 8), places), places) for z in (x, y)]
    assert torch.equal(*seen)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_decoder_gives_the_same_as_unshuffling(encoder, depth):
    """The paper puts mask tokens between the visible ones; we put them behind and leave out what comes to nothing."""
    decoder = PixelDecoder(encoder, dim=32, depth=depth).eval()
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    order = torch.rand(3, 16).argsort(1)
    visible, hidden = order[:, :4], order[:, 4:]
    features = encoder.encode(take(patchify(images(), 8), visible), visible)
    x = decoder.embed(features)
    masked = decoder.mask_token.expand(3, 12, -1)
    x = torch.cat([x[:, :1], restore(x[:, 1:], masked, visible, hidden)], 1) + decoder.positions
    for block in decoder.blocks:
        x = block(x)
    wanted = take(decoder.predict(decoder.norm(x))[:, 1:], hidden)
    found = decoder(features, visible, hidden)
    assert torch.allclose(found, wanted, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), [*decoder.parameters()]) for y in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "depth", "says"), [(48, 1, "decoder_dim must be a multiple of 32"), (32, -1, "decoder_depth")]
)
def test_a_decoder_of_no_depth_or_of_half_a_head_is_refused(encoder, dim, depth, says):
    with pytest.raises(ValueError, match=says):
        PixelDecoder(encoder, dim=dim, depth=depth)
    with pytest.raises(ValueError, match=says):
        NarrowDecoder(encoder, dim=dim, depth=depth)
    with pytest.raises(ValueError, match=says):
        MaskedDenoiser(encoder, kind="cross", dim=dim, depth=depth, u_links=True)
    if depth < 1:
        with pytest.raises(ValueError, match=says):
            NoiseDecoder(encoder, depth=depth)


def test_a_block_computes_only_the_queries_asked_for():
    torch.manual_seed(0)
    x, context, modulation = torch.randn(2, 9, 16), torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    key_mask = torch.arange(9)[None] < torch.tensor([[9], [6]])
    for queries in (slice(1), slice(4, None)):
        block, cross = Block(16, 4), CrossBlock(16, 4)
        for given in ((None, None), (modulation, None), (None, key_mask)):
            assert torch.allclose(block(x, *given, queries=queries), block(x, *given)[:, queries], atol=1e-6)
        some, all_of_them = cross(x, context, key_mask, queries), cross(x, context, key_mask)
        assert torch.allclose(some, all_of_them[:, queries], atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_the_fused_one(monkeypatch, masked):
    """In bfloat16 on a CPU, training does without the fused kernel and gives what it gives in double precision."""
    fused, asked = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *x: asked.append(x) or fused(*x))
    q, k, v = torch.randn(3, 2, 4, 9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = (torch.arange(9) < torch.tensor([[9], [6]]))[:, None, None] if masked else None
    half, exact = ([x.to(kind).requires_grad_() for x in (q[:, :, 2:], k, v)] for kind in (q.dtype, torch.double))
    found, wanted = attend(*half, seen), attend(*exact, seen)
    assert len(asked) == 1  # in double precision
    ours, theirs = (torch.autograd.grad(y.sin().sum(), x) for y, x in ((found, half), (wanted, exact)))
    for one, other in zip((found, *ours), (wanted, *theirs), strict=True):
        assert torch.allclose(one.double(), other, atol=0.03)
    attend(*(x.detach() for x in half), seen)
    assert len(asked) == 2  # where nothing is learned


def test_names_are_timms(encoder):
    names = set(encoder.state_dict())
    wanted = "cls_token pos_embed patch_embed.proj.weight norm.bias blocks.1.norm1.weight blocks.1.attn.qkv.weight"
    assert names >= {*wanted.split(), "blocks.1.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias"}
    assert len(names) == 6 + 2 * 12


def test_features_are_pooled(encoder):
    tokens = encoder(images())
    assert torch.allclose(encoder.features(images()), tokens[:, 1:].mean(1))
    assert torch.equal(encoder.features(images(), pool="cls"), tokens[:, 0])


@pytest.mark.parametrize(
    ("choice", "data", "image_size", "patch_size"),
    [
        ("micro", 64, 64, 8), ("micro", 32, 32, 4), ("base", 512, 224, 16), ("small", 128, 128, 16),
        (Choice("tiny", {"image_size": 96}), 64, 96, 8), (Choice("tiny", {"patch_size": 16}), 70, 64, 16),
    ],
)  # fmt: skip
def test_sizes_suit_the_data(choice, data, image_size, patch_size):
    config = encoder_config(choice, data)
    assert (config.image_size, config.patch_size) == (image_size, patch_size)
    assert (config.dim, config.depth, config.num_heads) == SIZES[Choice.of(choice).name]


def test_bad_shapes_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'small'"):
        encoder_config("smal", 64)
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        encoder_config(Choice("micro", {"dept": 3}), 64)
    with pytest.raises(ConfigError, match="not a multiple of patch_size"):
        encoder_config(Choice("micro", {"image_size": 60, "patch_size": 8}), 64)
    with pytest.raises(ConfigError, match="patch_size"):
        encoder_config(Choice("micro", {"patch_size": 0}), 64)
    with pytest.raises(ConfigError, match="patch_size"):
        encoder_config(Choice("micro", {"patch_size": "8"}), 64)


def test_an_encoder_is_saved_and_loaded(encoder, tmp_path):
    save_encoder(encoder, tmp_path, method={"name": "mae"})
    loaded = load_encoder(tmp_path)
    assert loaded.config == encoder.config
    assert torch.equal(loaded(images()), encoder(images()))
    assert json.loads((tmp_path / "config.json").read_text())["method"] == {"name": "mae"}


def test_broken_files_are_one_clear_error(encoder, tmp_path):
    with pytest.raises(MissingArtifact, match="synthgen pretrain"):
        load_encoder(tmp_path)
    save_encoder(encoder, tmp_path)
    weights = tmp_path / "encoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="pretrain again"):
        load_encoder(tmp_path)
    weights.write_bytes(whole)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"dim": 32}))
    with pytest.raises(CorruptFile, match="pretrain again"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptFile, match="pretrain again"):
        load_encoder(tmp_path)


def test_transformers_has_the_same_features(encoder, tmp_path):
    from transformers import ViTModel

    save_transformers(encoder, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    for twin in (to_transformers(encoder), ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()):
        with torch.no_grad():
            features = twin(images()).last_hidden_state
        assert (features - encoder(images())).abs().max() < 1e-5
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["image_mean"] == list(CONFIG.mean)
    assert config["size"] == {"height": 32, "width": 32}
