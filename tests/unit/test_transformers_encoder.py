"""Vision transformers of transformers as encoders: small ones of random weights, of every kind that differs."""

from __future__ import annotations

import dataclasses
import json

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, MissingWeights
from synthgen.methods.mapet import normalised_for
from synthgen.models.transformers_encoder import encoder_folder, is_tower, load_tower, open_encoder
from synthgen.models.transformers_vit import save_transformers
from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder
from synthgen.stages._integrity import encoder_hash
from synthgen.stores import parse_location
from synthgen.stores.tar import write_bytes

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DINO = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
MAE = {f"decoder_{name}": SHAPE[name] for name in SHAPE if name not in ("image_size", "patch_size")}
KINDS = {  # the model, and tokens before those of the patches
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**SHAPE)), 1),
    "deit": (lambda: transformers.DeiTModel(transformers.DeiTConfig(**SHAPE)), 2),
    "beit": (lambda: transformers.BeitModel(transformers.BeitConfig(**SHAPE)), 1),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)), 1),
    "registers": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINO)),
        5,
    ),
    "dinov3": (lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SHAPE, num_register_tokens=4)), 5),
    "clip": (lambda: transformers.CLIPModel(transformers.CLIPConfig(vision_config=SHAPE, text_config=TEXT)), 1),
    "clip vision": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SHAPE)), 1),
    "siglip": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE)), 0),
    "mae": (lambda: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SHAPE, **MAE)), 1),
}
PROCESSOR = {"size": {"height": 64, "width": 64}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}


def write(folder, kind="vit", processor=PROCESSOR):
    """A model as ``save_pretrained`` leaves it."""
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    for parameter in model.parameters():  # zero biases and tokens would hide a swapped name
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_last_hidden_state_without_registers(kind, tmp_path):
    model, prefix = write(tmp_path, kind), KINDS[kind][1]
    tower = load_tower(tmp_path)
    assert tower.config == EncoderConfig(
        image_size=64, patch_size=16, dim=32, depth=2, num_heads=4, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2)
    )
    if kind == "mae":  # its own encoder hides patches in an order of its own; told to keep all in theirs
        model.config.mask_ratio = 0.0
        whole = model.vit(images(), noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    else:
        whole = getattr(model, "vision_model", model)(pixel_values=images()).last_hidden_state
    tokens = tower(images())
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(tokens[:, 1:], whole[:, prefix:], atol=1e-5, rtol=1e-4)
    first = whole[:, 0] if prefix else whole.mean(1)
    torch.testing.assert_close(tokens[:, 0], first, atol=1e-5, rtol=1e-4)
    assert tower.has_class_token == bool(prefix)
    assert not tower.training


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_patches_and_other_weights(kind, tmp_path):
    write(tmp_path, kind)
    tower = load_tower(tmp_path, patches=6)
    assert tower.config.image_size == 96
    with torch.no_grad():
        tokens = tower(images(96))
        assert tokens.shape == (2, 37, 32)
        torch.manual_seed(1)
        other = tower.untrained()
        assert other.config == tower.config
        assert not torch.allclose(other(images(96)), tokens, atol=1e-2)
    layers = {name: tower.layer(name) for name, _ in tower.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3}
    assert all((layer == 0) == ("embeddings" in name) for name, layer in layers.items())


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, 32),
        ({"size": 48}, 48),
        ({"size": 64, "crop_size": 32, "do_center_crop": False}, 64),
        ({"size": {"height": 32, "width": 64}}, 64),  # no square: the size that the model was made for
        ({"size": {"shortest_edge": 40}}, 32),  # whole patches
        (None, 64),
    ],
)
def test_the_size_is_what_its_images_are_cut_to(tmp_path, processor, size):
    write(tmp_path, "dinov2", processor)
    tower = load_tower(tmp_path)
    assert tower.config.image_size == size
    assert tower.config.mean == EncoderConfig.mean
    assert tower(images(size)).shape[1] == 1 + (size // 16) ** 2


def test_our_own_encoder_comes_back_from_its_export(tmp_path):
    config = EncoderConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=4, mean=(0.5,) * 3)
    encoder = VisionTransformer(config).eval()
    save_transformers(encoder, tmp_path / "transformers")
    save_encoder(encoder, tmp_path)
    assert not is_tower(tmp_path)
    assert is_tower(tmp_path / "transformers")
    tower = open_encoder(tmp_path / "transformers")
    assert tower.config == config
    with torch.no_grad():
        x = images(32)
        torch.testing.assert_close(tower(x), encoder(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(open_encoder(tmp_path)(x), encoder(x))


def test_other_models_are_refused(tmp_path):
    with pytest.raises(MissingArtifact, match=r"there is no encoder in .*none"):
        encoder_folder(str(tmp_path / "none"))
    swin = transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2])
    transformers.SwinModel(swin).save_pretrained(tmp_path / "swin")
    with pytest.raises(ConfigError, match=r"the swin in .* is not a vision transformer with square patches"):
        load_tower(tmp_path / "swin")
    bert = transformers.BertConfig(**{**TEXT, "bos_token_id": None})
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"the bert in .* is not a vision transformer"):
        load_tower(tmp_path / "bert")


def test_broken_towers_are_one_line(tmp_path):
    write(tmp_path)
    weights, about = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, described = load_file(weights), about.read_text()
    first = next(name for name in whole if ".0." in name)
    save_file({name: tensor for name, tensor in whole.items() if name != first}, weights, metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=r"its weights lack .*, and 1 in all") as caught:
        load_tower(tmp_path)
    assert "\n" not in str(caught.value)
    weights.write_bytes(b"\x00" * 64)
    with pytest.raises(CorruptFile, match="cannot be read as a vision model") as caught:
        load_tower(tmp_path)
    assert "\n" not in str(caught.value)
    for text in ("[]", "{", '{"model_type": "none such"}'):
        about.write_text(text)
        with pytest.raises(CorruptFile, match="cannot be read as a vision model"):
            load_tower(tmp_path)
    about.write_text(json.dumps({**json.loads(described), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ConfigError, match="needs custom code"):
        load_tower(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    model = write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert not is_tower(tmp_path)
    with pytest.raises(MissingArtifact, match=r"config\.json and safetensors"):
        encoder_folder(str(tmp_path))


def test_a_model_of_the_hub_is_fetched_without_pickles_and_without_code(tmp_path, monkeypatch):
    asked = {}
    write(tmp_path)

    def fetch(name, allow_patterns, local_files_only=False):
        if local_files_only:
            raise OSError("nothing in the cache")
        asked[name] = allow_patterns
        if name == "somebody/pickled":
            return str(tmp_path / "empty")
        if name == "somebody/absent":
            raise OSError("no network\nhere")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert encoder_folder("somebody/tower") == tmp_path
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["somebody/tower"])
    with pytest.raises(MissingWeights, match="hf download somebody/absent") as caught:
        encoder_folder("somebody/absent")
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingWeights, match=r"somebody/pickled on the hub is not .* with safetensors"):
        encoder_folder("somebody/pickled")


def test_only_models_incomplete_in_the_cache_are_downloaded(tmp_path, monkeypatch):
    """The cache as the hub's library lays it out; a program that asks file by file leaves no listing in it."""
    kept = tmp_path / "models--somebody--tower"
    there, fresh, asked = kept / "snapshots" / ("1" * 40), tmp_path / "fresh", []
    write(there)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1" * 40)
    write(fresh)
    local = huggingface_hub.snapshot_download

    def fetch(name, allow_patterns, local_files_only=False):
        if local_files_only:
            return local(name, allow_patterns=allow_patterns, local_files_only=True)
        asked.append(name)
        return str(fresh)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert (encoder_folder("somebody/tower"), asked) == (there, [])
    about = (there / "preprocessor_config.json").rename(tmp_path / "aside")  # without it other pixels would be seen
    assert (encoder_folder("somebody/tower"), asked.pop()) == (fresh, "somebody/tower")
    about.rename(there / "preprocessor_config.json")
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = {"weight_map": {"cls_token": first, "layernorm.weight": second}}
    (there / "model.safetensors.index.json").write_text(json.dumps(index))
    (there / "model.safetensors").rename(there / first)
    assert (encoder_folder("somebody/tower"), asked.pop()) == (fresh, "somebody/tower")
    (there / second).write_bytes((there / first).read_bytes())
    assert (encoder_folder("somebody/tower"), asked) == (there, [])
    (there / "model.safetensors.index.json").write_text("[]")
    assert (encoder_folder("somebody/tower"), asked.pop()) == (fresh, "somebody/tower")


def test_network_errors_are_one_line(monkeypatch):
    class Refused(Exception):
        """As the proxy's error of the hub's library, which is no OSError."""

    def fetch(name, allow_patterns, local_files_only=False):
        raise LocalEntryNotFoundError("not here") if local_files_only else Refused("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(MissingWeights, match=r"can be downloaded from the hub: 403 Forbidden; download it first"):
        encoder_folder("somebody/tower")


def test_a_training_without_its_encoder_is_not_a_tower(tmp_path):
    config = EncoderConfig(image_size=32, patch_size=8, dim=32, depth=1, num_heads=4)
    save_encoder(VisionTransformer(config), tmp_path)
    (tmp_path / "encoder.safetensors").rename(tmp_path / "text.safetensors")
    with pytest.raises(MissingArtifact, match="there is no encoder in"):
        encoder_folder(str(tmp_path))


def test_a_tower_in_a_store_is_not_read_there():
    folder = parse_location("memory://towers/one")
    write_bytes(folder / "config.json", b'{"model_type": "vit"}')
    write_bytes(folder / "model.safetensors", b"weights")
    assert is_tower(folder)
    with pytest.raises(ConfigError, match="copy it to this machine first"):
        load_tower(folder)


def test_the_hash_of_a_tower_covers_what_changes_its_features_alone(tmp_path):
    write(tmp_path)
    before, network = encoder_hash(tmp_path), encoder_hash(tmp_path, processor=False)
    for name in ("tokenizer.json", "vocab.json", "generation_config.json", "README.md"):
        (tmp_path / name).write_text("{}")
    assert (encoder_hash(tmp_path), encoder_hash(tmp_path, processor=False)) == (before, network)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "image_std": [1, 1, 1]}))
    assert encoder_hash(tmp_path) != before
    assert encoder_hash(tmp_path, processor=False) == network
    for path in (tmp_path / "config.json", tmp_path / "model.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        assert encoder_hash(tmp_path) != before
        assert encoder_hash(tmp_path, processor=False) != network
        path.write_bytes(data)


def test_images_are_resized_and_normalised_for_another():
    ours = EncoderConfig(image_size=32, patch_size=8, dim=32, depth=1, num_heads=1)
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(8, 2)
    pixels = pixels.repeat_interleave(8, 3)
    mean, std = (torch.tensor(values)[:, None, None] for values in (ours.mean, ours.std))
    x = (pixels - mean) / std
    assert normalised_for(ours, ours, x) is x
    theirs = dataclasses.replace(ours, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    other_mean, other_std = (torch.tensor(values)[:, None, None] for values in (theirs.mean, theirs.std))
    torch.testing.assert_close(normalised_for(theirs, ours, x), (pixels - other_mean) / other_std, atol=1e-5, rtol=1e-5)
    larger = dataclasses.replace(theirs, image_size=64, patch_size=16)
    y = normalised_for(larger, ours, x)
    assert y.shape == (2, 3, 64, 64)
    seen = F.avg_pool2d(y * other_std + other_mean, 16)  # each patch shows what it showed
    torch.testing.assert_close(seen, F.avg_pool2d(pixels, 8), atol=0.03, rtol=0)
