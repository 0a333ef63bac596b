"""The backbone for models of diffusers: what it loads, refuses, puts on top, and does when an image goes wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from synthgen.attention.recorder import _Recording
from synthgen.backbones.diffusers import Diffusers
from synthgen.diffusion.backbone import BLACK, FLAGGED, RETRIES
from synthgen.errors import ConfigError, MissingWeights, UnknownName
from synthgen.prompts import parse_line
from synthgen.records import Request
from tests import models

OPTIONS: dict[str, Any] = {"num_steps": 2, "guidance_scale": 3.0}


def requests(*lines: str) -> list[Request]:
    return [Request(f"{row:010d}", parse_line(line), row) for row, line in enumerate(lines)]


ASKED = requests("a photo of a [dog]", "a [cat]", "the [park]")


@pytest.fixture
def family(stable_diffusion: Path) -> Any:
    return Diffusers(model=str(stable_diffusion), **OPTIONS).family


def test_what_is_left_open_is_usual_for_the_family(stable_diffusion: Path) -> None:
    sampling = Diffusers(model=str(stable_diffusion)).family.sampling
    assert (sampling.num_steps, sampling.guidance_scale, sampling.height, sampling.width) == (30, 7.5, 32, 32)


def test_a_scheduler_by_its_name(stable_diffusion: Path) -> None:
    family = Diffusers(model=str(stable_diffusion), **OPTIONS, scheduler="EulerDiscreteScheduler").family
    assert type(family.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert family.generate(ASKED)[0].image.any()
    with pytest.raises(UnknownName, match="did you mean 'EulerDiscreteScheduler'"):
        Diffusers(model=str(stable_diffusion), scheduler="EulerDiscreteSchedular")


def test_a_model_of_a_family_that_is_not_known_says_which_are(tmp_path: Path) -> None:
    folder = models.make_pixart_sigma(tmp_path)
    with pytest.raises(ConfigError, match=r"PixArtSigmaPipeline.*StableDiffusionXLPipeline.*FluxPipeline"):
        Diffusers(model=str(folder))


@pytest.mark.parametrize("model", ["no/such-model", "sdxl"])
def test_weights_that_are_not_here_say_how_to_get_them(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # huggingface_hub warns of options that it dropped
        with pytest.raises(MissingWeights, match="hf download"):
            Diffusers(model=model)


@pytest.mark.parametrize(
    ("name", "says"), [("flux", "did you mean 'flux-dev'?"), ("sd2.1", "there are: flux-dev, flux-schnell, sd-turbo")]
)
def test_a_short_name_that_is_none_says_the_nearest(name: str, says: str) -> None:
    with pytest.raises(UnknownName) as caught:
        Diffusers(model=name)
    assert f"unknown model {name!r}" in str(caught.value)
    assert says in str(caught.value)
    assert "hf download" not in str(caught.value)


def test_a_folder_without_safetensors_is_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(stable_diffusion, folder)
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(MissingWeights, match="safetensors"):
        Diffusers(model=str(folder))


def test_a_negative_prompt_counts_and_flux_takes_none(stable_diffusion: Path, tmp_path: Path) -> None:
    plain, negative = (
        Diffusers(model=str(stable_diffusion), **OPTIONS, negative_prompt=text).generate(ASKED[:1])[0].image
        for text in ("", "cat")
    )
    assert not np.array_equal(plain, negative)
    flux = Diffusers(model=str(models.make_flux(tmp_path)), num_steps=1, height=32, width=32, negative_prompt="cat")
    with pytest.raises(ConfigError, match="no negative prompt"):
        flux.generate(ASKED[:1])


def test_layers_that_are_not_recorded_keep_their_processor(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family.looking = replace(family.looking, layers=("up_blocks",))
    seen: dict[str, bool] = {}
    put = type(family.network).set_attn_processor

    def spy(network: Any, processors: dict[str, Any]) -> None:
        for name, processor in processors.items():
            seen[name] = seen.get(name, False) or isinstance(processor, _Recording)
        put(network, dict(processors))

    monkeypatch.setattr(type(family.network), "set_attn_processor", spy)
    family.generate(ASKED)
    assert any(seen.values())
    assert all(recorded == name.startswith("up_blocks") for name, recorded in seen.items())


def spoil(family: Any, *spoilt: list[int], value: float = float("nan")) -> list[int]:
    """Let the autoencoder give ``value`` for these rows of its first calls; returns a list that counts its calls."""
    calls: list[int] = []
    decode = family.pipeline.vae.decode

    def spoiling(z: Any, *args: Any, **kwargs: Any) -> Any:
        (image,) = decode(z, return_dict=False)
        for row in spoilt[len(calls)] if len(calls) < len(spoilt) else []:
            image[row] = value
        calls.append(len(z))
        return (image,)

    family.pipeline.vae.decode = spoiling
    return calls


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_black_image_is_made_again_from_another_seed(family: Any, value: float) -> None:
    good = family.generate(ASKED)
    calls = spoil(family, [1], value=value)
    made = family.generate(ASKED)
    assert calls == [3, 1]
    assert [generation.failed for generation in made] == ["", "", ""]
    assert made[1].request.seed != ASKED[1].seed
    np.testing.assert_array_equal(made[0].image, good[0].image)
    again = family.generate([made[1].request])[0]  # its seed tells how to make it again
    assert np.abs(again.image.astype(int) - made[1].image.astype(int)).max() <= 1


def test_an_image_that_stays_black_is_recorded_as_failed(family: Any) -> None:
    calls = spoil(family, [1], *([[0]] * RETRIES))
    made = family.generate(ASKED)
    assert calls == [3, *([1] * RETRIES)]
    assert [generation.failed for generation in made] == ["", BLACK, ""]


def test_a_batch_too_large_for_the_device_is_halved(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = family.generate(ASKED)
    sample, sizes = family.sample, []

    def small(texts: list[str], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError
        return sample(texts, *args, **kwargs)

    monkeypatch.setattr(family, "sample", small)
    parts = family.generate(ASKED)
    assert sizes == [3, 1, 2, 1, 1]
    for one, other in zip(whole, parts, strict=True):
        assert one.request == other.request
        assert np.abs(one.image.astype(int) - other.image.astype(int)).max() <= 1


class Checker(torch.nn.Module):
    """Objects to every image but the first, and blacks it out as the real one does."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, clip_input: torch.Tensor, images: Any) -> Any:
        flags = [row > 0 for row in range(len(clip_input))]
        images[flags] = 0
        return images, flags


def test_the_safety_checkers_verdict_is_a_warning_and_never_a_black_image(family: Any) -> None:
    plain = family.generate(ASKED)
    family.pipeline.kept_safety_checker = Checker()
    family.pipeline.feature_extractor = lambda images, return_tensors: type(
        "Features", (), {"pixel_values": torch.zeros(len(images), 3, 8, 8)}
    )
    flagged = family.generate(ASKED)
    assert [generation.warnings for generation in flagged] == [(), (FLAGGED,), (FLAGGED,)]
    for one, other in zip(plain, flagged, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_a_model_without_a_safety_checker_cannot_be_asked_for_one(stable_diffusion: Path) -> None:
    with pytest.raises(ConfigError, match="no safety checker"):
        Diffusers(model=str(stable_diffusion), safety_checker=True)


def test_a_part_can_be_left_out(tmp_path: Path) -> None:
    folder = models.make_stable_diffusion_3(tmp_path)
    small = {**OPTIONS, "height": 32, "width": 32}
    family = Diffusers(model=str(folder), **small, without=("text_encoder_3", "tokenizer_3")).family
    assert family.pipeline.text_encoder_3 is None
    whole = Diffusers(model=str(folder), **small).family
    assert len(whole.encoders()) == len(family.encoders()) + 1 == 3
    assert family.generate(ASKED)[0].maps.weights.any()
    with pytest.raises(ConfigError, match=r"no part 'text_encoder_4'.*text_encoder_3"):
        Diffusers(model=str(folder), without=("text_encoder_4",))


def test_learned_embeddings_are_words_like_others(stable_diffusion: Path, tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<my-dog>": torch.randn(16)}, path)
    family = Diffusers(model=str(stable_diffusion), **OPTIONS, textual_inversion=str(path)).family
    (generation,) = family.generate(requests("a photo of a [<my-dog>]"))
    assert family.pipeline.tokenizer.tokenize("<my-dog>") == ["<my-dog>"]
    assert generation.maps.words == ("<my-dog>",)
    assert generation.maps.weights.any()


def test_lora_weights_change_the_image(stable_diffusion: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = Diffusers(model=str(stable_diffusion), **OPTIONS).family
    state = {}
    for name, module in plain.network.named_modules():
        if name.endswith("attn2.to_q"):
            state[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    adapted = Diffusers(model=str(stable_diffusion), **OPTIONS, lora=str(tmp_path)).family
    one, other = (family.generate(ASKED[:1])[0] for family in (plain, adapted))
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.maps.weights, other.maps.weights)
    plain_image, _ = adapted.sample([ASKED[0].prompt.text], [0], [], recorded=False)
    np.testing.assert_array_equal(plain_image[0], other.image)


def test_a_folder_of_no_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "os.system"}))
    with pytest.raises(ConfigError, match=r"os\.system"):
        Diffusers(model=str(tmp_path))


def test_a_compiled_network_gives_the_same_record(family: Any) -> None:
    plain = family.generate(ASKED)
    family.pipeline.unet.compile(backend="eager")
    for one, other in zip(plain, family.generate(ASKED), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)
