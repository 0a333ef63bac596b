"""The small models of the other tests: they load as the published ones do, draw, and come out the same again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import T5TokenizerFast

from tests import models

PROMPTS = ["a golden dog in the park", "an umbrella, a 🐕 and a café"]
CFG: dict[str, Any] = {"guidance_scale": 5.0}
NO_CFG: dict[str, Any] = {"guidance_scale": 1.0}
TRUE_CFG: dict[str, Any] = {"true_cfg_scale": 4.0, "negative_prompt": ["a cat", "a square"]}
AS_ASKED = {"use_resolution_binning": False}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@dataclass(frozen=True)
class Family:
    """How a folder is made, loaded and used."""

    make: Callable[[Path], Path]
    guided: dict[str, Any]
    free: dict[str, Any]
    loading: dict[str, Any] = field(default_factory=dict)
    height: int = 64
    width: int = 96

    def load(self, folder: Path) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **self.loading)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, pipeline: Any, prompts: dict[int, str], arguments: dict[str, Any]) -> np.ndarray[Any, Any]:
        """One image for each seed and prompt, 2 steps unless told otherwise."""
        images: np.ndarray[Any, Any] = pipeline(
            list(prompts.values()),
            height=self.height,
            width=self.width,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in prompts],
            output_type="np",
            **{"num_inference_steps": 2, **arguments},
        ).images
        return images


make_sdxl, make_sd3, make_flux = models.make_stable_diffusion_xl, models.make_stable_diffusion_3, models.make_flux
FAMILIES = {
    "sd": Family(models.make_stable_diffusion, CFG, NO_CFG, height=16, width=32),  # its autoencoder has factor 2
    "sd2": Family(models.make_stable_diffusion_2, CFG, NO_CFG),
    "sdxl": Family(make_sdxl, CFG, NO_CFG),
    "sdxl-turbo": Family(partial(make_sdxl, turbo=True), CFG, {"guidance_scale": 0.0, "num_inference_steps": 1}),
    "sd3": Family(make_sd3, CFG, NO_CFG),
    "sd3.5": Family(partial(make_sd3, medium=True), {**CFG, "max_sequence_length": 77}, NO_CFG),
    "sd3-no-t5": Family(partial(make_sd3, t5=False), CFG, NO_CFG, WITHOUT_T5),
    "flux-dev": Family(make_flux, TRUE_CFG, {"guidance_scale": 3.5}),
    "flux-schnell": Family(partial(make_flux, dev=False), TRUE_CFG, {"max_sequence_length": 256}),
    "pixart-sigma": Family(models.make_pixart_sigma, {**CFG, **AS_ASKED}, {**NO_CFG, **AS_ASKED}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    family = FAMILIES[request.param]
    return family, family.make(tmp_path_factory.mktemp(request.param))


def test_a_folder_loads_and_draws(made: tuple[Family, Path]) -> None:
    family, folder = made
    pipeline = family.load(folder)
    both = dict(enumerate(PROMPTS))
    guided, free = family.draw(pipeline, both, family.guided), family.draw(pipeline, both, family.free)
    for images in (guided, free):
        assert images.shape == (2, family.height, family.width, 3)
        assert np.isfinite(images).all()
        assert images.std() > 0
    assert not np.array_equal(guided, free)
    alone = family.draw(pipeline, {1: PROMPTS[1]}, family.free)
    np.testing.assert_allclose(alone[0], free[1], atol=1e-4)
    other = family.draw(pipeline, {1: PROMPTS[0]}, family.free)
    assert not np.array_equal(alone, other)  # the prompt counts, not only the seed


def test_a_folder_is_small_and_the_same_each_time(made: tuple[Family, Path], tmp_path: Path) -> None:
    family, folder = made
    family.make(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert sum((folder / path).stat().st_size for path in files) < 4_000_000


def test_a_whole_folder_can_be_loaded_without_its_t5(tmp_path: Path) -> None:
    pipeline = replace(FAMILIES["sd3"], loading=WITHOUT_T5).load(make_sd3(tmp_path))
    text = pipeline.encode_prompt(PROMPTS, None, None)[0]
    assert text.shape == (2, 77 + 256, models.DOUBLE)  # the places of T5 stay, empty
    assert not text[:, 77:].any()


def test_a_folder_without_t5_does_not_load_by_default(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_encoder_3"):
        DiffusionPipeline.from_pretrained(make_sd3(tmp_path, t5=False))


def test_two_tokenizers_split_a_prompt_differently(tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(models.make_stable_diffusion_xl(tmp_path), use_safetensors=True)
    first, second = (one(PROMPTS[0])["input_ids"] for one in (pipeline.tokenizer, pipeline.tokenizer_2))
    assert len(first) == 8
    assert len(second) > len(first)
    assert len(pipeline.tokenizer) != len(pipeline.tokenizer_2)
    assert pipeline.tokenizer_2.pad_token_id == 0


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("t5")
    models.make_t5_tokenizer(folder)
    return T5TokenizerFast.from_pretrained(folder)


def pieces(tokenizer: Any, text: str, **arguments: Any) -> list[tuple[str, str]]:
    encoded = tokenizer(text, return_offsets_mapping=True, **arguments)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return [(token, text[first:last]) for token, (first, last) in zip(tokens, encoded["offset_mapping"], strict=True)]


def test_t5_offsets_exclude_the_space(t5: Any) -> None:
    assert pieces(t5, "a  dog, a cat") == [
        ("▁a", "a"),
        ("▁dog", "dog"),
        (",", ","),
        ("▁a", "a"),
        ("▁cat", "cat"),
        ("</s>", ""),
    ]


def test_a_bare_space_piece_belongs_to_the_letter_after_it(t5: Any) -> None:
    assert pieces(t5, "a café") == [
        ("▁a", "a"),
        ("▁", "c"),
        ("c", "c"),
        ("a", "a"),
        ("f", "f"),
        ("é", "é"),
        ("</s>", ""),
    ]


def test_text_unknown_to_t5_is_one_token(t5: Any) -> None:
    assert pieces(t5, "a 🐕 in 公園") == [
        ("▁a", "a"),
        ("▁", "🐕"),
        ("<unk>", "🐕"),
        ("▁in", "in"),
        ("▁", "公"),
        ("<unk>", "公園"),
        ("</s>", ""),
    ]


@pytest.mark.parametrize("length", [256, 512])
def test_t5_pads_on_the_right_and_ends_a_cut_prompt(t5: Any, length: int) -> None:
    padded = pieces(t5, "a dog", padding="max_length", max_length=length, truncation=True)
    assert len(padded) == length
    assert padded[:3] == [("▁a", "a"), ("▁dog", "dog"), ("</s>", "")]
    assert set(padded[3:]) == {("<pad>", "")}
    cut = pieces(t5, "dog " * 600, padding="max_length", max_length=length, truncation=True)
    assert cut == [("▁dog", "dog")] * (length - 1) + [("</s>", "")]
