"""Each filter against another source of the same figure."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter

from synthgen.errors import ConfigError, CorruptFile, MissingWeights
from synthgen.filters import Candidate
from synthgen.filters.blank import Blank
from synthgen.filters.clip import Clip
from synthgen.filters.duplicate import Duplicate, earlier_kept, perceptual_hash
from synthgen.filters.unmasked import Unmasked
from synthgen.records import Request
from synthgen.stores import parse_location
from synthgen.stores.tar import write_bytes
from tests.factories import make_generation, make_prompt
from tests.models import make_clip


def scene(seed, size=96):
    """Smooth coloured noise, which has a photo's share of low frequencies."""
    rng = np.random.default_rng(seed)
    noise = np.stack([gaussian_filter(rng.normal(size=(size, size)), 6) for _ in range(3)], axis=2)
    return ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)


def compressed(image, scale=0.7, quality=60):
    small = Image.fromarray(image).resize((round(image.shape[1] * scale), round(image.shape[0] * scale)))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def distance(one, other):
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_the_hash_survives_scaling_and_compression_and_separates_images():
    images = [scene(seed) for seed in range(20)]
    limit = Duplicate().max_distance
    assert max(distance(image, compressed(image)) for image in images) <= limit
    assert min(distance(one, other) for i, one in enumerate(images) for other in images[:i]) > 2 * limit


def test_half_of_the_bits_of_a_hash_are_set():
    assert perceptual_hash(scene(0)).bit_count() == 32


@pytest.mark.parametrize("max_distance", range(8))
def test_duplicates_are_those_of_a_comparison_of_every_pair(max_distance):
    rng = np.random.default_rng(max_distance)
    for _ in range(40):
        centres = rng.integers(0, 2**63, 4, np.uint64)
        hashes = centres[rng.integers(0, 4, rng.integers(0, 40))]
        for row in range(len(hashes)):
            for bit in rng.integers(0, 64, rng.integers(0, 6), np.uint64):
                hashes[row] ^= np.uint64(1) << bit
        kept, expected = [], {}
        for row, found in enumerate(hashes.tolist()):
            near = [other for other in kept if (found ^ hashes[other].item()).bit_count() <= max_distance]
            if near:
                expected[row] = near[0]
            else:
                kept.append(row)
        assert earlier_kept(hashes, max_distance) == expected


def test_many_similar_images_take_little_memory():
    rng = np.random.default_rng(0)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (4000, 2), np.uint64), axis=1)
    hashes = np.uint64(0x5555AAAA5555AAAA) ^ flips  # any two differ in 4 bits at most
    tracemalloc.start()
    assert earlier_kept(hashes, 4) == dict.fromkeys(range(1, 4000), 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6  # all pairs would be 8 million


def test_images_that_are_added_change_no_decision():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 5, np.uint64)[rng.integers(0, 5, 40)] ^ rng.integers(0, 8, 40, np.uint64)
    figures = {f"{row:010d}": f"{value:016x}" for row, value in enumerate(hashes.tolist())}
    few = Duplicate().reject(list(figures.items())[:25])
    many = Duplicate().reject(figures.items())
    assert few
    assert {key: reason for key, reason in many.items() if int(key) < 25} == few


def test_the_reason_names_the_image_that_is_kept():
    image = scene(0)
    figures = zip("abc", [f"{perceptual_hash(one):016x}" for one in (image, scene(1), image)], strict=True)
    assert Duplicate().reject(figures) == {"c": "it looks like a: 0 of 64 bits of their hashes differ"}


def test_one_colour_is_blank_and_a_dark_photo_is_not():
    black, dark = np.zeros((64, 64, 3), np.uint8), scene(0) // 6
    blue = black + np.array([0, 0, 200], np.uint8)
    requests = [Request(f"{row:010d}", make_prompt(), row) for row in range(3)]
    measured = Blank().open("cpu")([Candidate(*one) for one in zip(requests, (black, blue, dark), strict=True)])
    assert measured[:2] == [0, 0]
    assert measured[2] == pytest.approx(dark.reshape(-1, 3).std(axis=0).max(), abs=1e-3)
    assert list(Blank().reject(zip("abc", measured, strict=True))) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "rejected"),
    [
        ({}, "nothing, no words"),
        ({"min_masks": 0}, ""),
        ({"min_masks": 2}, "nothing, no words, one of one, one of two"),
        ({"every_word": True}, "nothing, one of two"),
        ({"every_word": True, "min_masks": 2}, "nothing, one of two"),
    ],
)
def test_masks_that_an_image_needs(settings, rejected):
    figures = {"nothing": [0, 1], "no words": [0, 0], "one of one": [1, 1], "one of two": [1, 2], "two of two": [2, 2]}
    assert ", ".join(Unmasked(**settings).reject(figures.items())) == rejected


# -- clip


def drawn(count=3, size=64):
    generations = [make_generation(f"{row:010d}", words=("disc",), size=size, seed=row)[0] for row in range(count)]
    return [Candidate(one.request, one.image) for one in generations]


def test_similarity_is_that_of_transformers(tmp_path):
    folder, seen = make_clip(tmp_path), drawn()
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=32, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]
    )
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)([one.request.prompt.text for one in seen], padding=True)
    with torch.no_grad():
        images = model.get_image_features(
            torch.as_tensor(np.array(processor([Image.fromarray(one.image) for one in seen])["pixel_values"]))
        )
        texts = model.get_text_features(**{name: torch.tensor(value) for name, value in tokens.items()})
    expected = F.cosine_similarity(images.pooler_output, texts.pooler_output)
    found = Clip(model=str(folder)).open("cpu")(seen)
    assert found == pytest.approx(expected.tolist(), abs=2e-3)


def test_images_that_are_not_square_lose_their_sides(tmp_path):
    measure, (one, *_) = Clip(model=str(make_clip(tmp_path))).open("cpu"), drawn()
    wide = np.concatenate([np.zeros_like(one.image[:, :10]), one.image, np.zeros_like(one.image[:, :10])], axis=1)
    assert measure([Candidate(one.request, wide)]) == pytest.approx(measure([one]), abs=1e-3)


def test_images_below_the_similarity_are_rejected_and_those_without_one_too(tmp_path):
    part = Clip(model="any", min_similarity=0.25)
    assert list(part.reject([("a", 0.3), ("b", 0.25), ("c", 0.2), ("d", None)])) == ["c", "d"]
    folder = make_clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * np.nan for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert Clip(model=str(folder)).open("cpu")(drawn(1)) == [None]


def test_the_figures_depend_on_the_weights_in_a_folder(tmp_path):
    before = Clip(model=str(make_clip(tmp_path))).inputs()
    assert list(before) == [f"model.safetensors of {tmp_path}"]
    assert Clip(model=str(make_clip(tmp_path))).inputs() == before
    assert Clip(model=str(make_clip(tmp_path, seed=1))).inputs() != before


def test_the_figures_depend_on_the_weights_of_the_hub(tmp_path, monkeypatch):
    """In the cache as the hub's library lays it out, where ``hf download`` replaces a model by a newer one."""
    cache = tmp_path / "models--somebody--clip"
    (cache / "refs").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = []
    for seed, commit in enumerate(("1" * 40, "2" * 40)):
        make_clip(cache / "snapshots" / commit, seed=seed)
        (cache / "refs" / "main").write_text(commit)
        found.append(Clip(model="somebody/clip").inputs())
    assert list(found[0]) == list(found[1]) == ["model.safetensors of somebody/clip"]
    assert found[0] != found[1]


def test_what_evaluate_has_left_in_the_cache_is_completed(tmp_path, monkeypatch):
    """It downloads the vision tower of a CLIP without a tokenizer."""
    asked, (part, whole) = [], (make_clip(tmp_path / name) for name in ("part", "whole"))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (part / name).unlink()

    def fetch(name, allow_patterns, local_files_only=False):
        if not local_files_only:
            asked.append(allow_patterns)
        return str(part if local_files_only else whole)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    measure = Clip(model="somebody/clip").open("cpu")
    assert all(isinstance(figure, float) for figure in measure(drawn()))
    assert {"*.json", "*.txt", "*.safetensors"} <= set(asked[0])
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0])


def test_weights_without_a_text_encoder_are_refused(tmp_path):
    path = make_clip(tmp_path) / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if not name.startswith("text_model.")}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CorruptFile, match=r"its weights lack text_model\..*, and \d+ in all"):
        Clip(model=str(tmp_path)).open("cpu")


def test_a_model_in_a_store_is_refused():
    write_bytes(parse_location("memory://clips/one") / "config.json", b'{"model_type": "clip"}')
    with pytest.raises(ConfigError, match="is in a store, and transformers reads folders"):
        Clip(model="memory://clips/one").open("cpu")


def test_models_without_one_image_size_are_refused(tmp_path):
    make_clip(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Siglip2Config(
        text_config={**shape, "vocab_size": 600}, vision_config={**shape, "patch_size": 8, "num_patches": 16}
    )
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not compare images of one size with texts"):
        Clip(model=str(tmp_path)).open("cpu")


def test_models_that_cannot_judge_are_refused(tmp_path):
    with pytest.raises(MissingWeights, match=r"config\.json is missing"):
        Clip(model=str(tmp_path)).inputs()
    with pytest.raises(MissingWeights, match="hf download no/such"):
        Clip(model="no/such").inputs()
    folder = make_clip(tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptFile, match="cannot be read by transformers"):
        Clip(model=str(folder)).open("cpu")
    other = tmp_path / "vit"
    make_clip(other)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(
        other
    )
    with pytest.raises((ConfigError, CorruptFile), match=str(other)):
        Clip(model=str(other)).open("cpu")
