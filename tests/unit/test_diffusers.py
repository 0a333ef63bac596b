"""The backbone for models of diffusers: what it loads, refuses, puts on top, and does when an image goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from synthgen.attention.recorder import Recorder, _Recording
from synthgen.attention.words import locate_in_encoders
from synthgen.backbones.diffusers import Diffusers
from synthgen.backbones.tiny import Tiny
from synthgen.diffusion.backbone import BLACK, RETRIES
from synthgen.diffusion.loading import _set_scheduler, pipeline_class
from synthgen.errors import ConfigError, MissingWeights, UnknownName
from synthgen.prompts import parse_line
from synthgen.records import SAFETY_WARNING, Request
from tests import models

OPTIONS: dict[str, Any] = {"num_steps": 2, "guidance_scale": 3.0}


def requests(*lines: str) -> list[Request]:
    return [Request(f"{row:010d}", parse_line(line), row) for row, line in enumerate(lines)]


ASKED = requests("a photo of a [dog]", "a [cat]", "the [park]")


@pytest.fixture
def family(stable_diffusion: Path) -> Any:
    return Diffusers(model=str(stable_diffusion), **OPTIONS).family


def test_defaults_are_those_of_the_family(stable_diffusion: Path) -> None:
    sampling = Diffusers(model=str(stable_diffusion)).family.sampling
    assert (sampling.num_steps, sampling.guidance_scale, sampling.height, sampling.width) == (30, 7.5, 32, 32)


def test_importing_changes_no_variable_and_loading_is_silent(stable_diffusion: Path) -> None:
    """Left alone, the libraries say what is not installed and what they make of it.

    A command that ends in an error line, or leaves the work to others, does not wait for the compiler to be imported.
    """
    script = (
        "import os, sys, torch\nbefore = dict(os.environ)\n"
        "from synthgen.stages.generate import Generate\nGenerate(prompts='p.txt').complete()\n"
        "assert 'synthgen.attention.recorder' in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "from synthgen.diffusion import FAMILIES, Loading, load_pipeline\n"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())\n"
        "load_pipeline(Loading(sys.argv[1]), FAMILIES)\nassert dict(os.environ) == before\n"
        "from diffusers.utils import logging as one\nfrom transformers.utils import logging as other\n"
        "one.get_logger('diffusers.x').warning('a note')\nother.get_logger('transformers.x').warning('a note')\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    command = [sys.executable, "-c", script, str(stable_diffusion)]
    told = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (told.returncode, told.stderr, told.stdout) == (0, "", "")


def test_a_scheduler_by_its_name(stable_diffusion: Path) -> None:
    family = Diffusers(model=str(stable_diffusion), **OPTIONS, scheduler="EulerDiscreteScheduler").family
    assert type(family.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert family.generate(ASKED)[0].image.any()
    with pytest.raises(UnknownName, match="did you mean 'EulerDiscreteScheduler'"):
        Diffusers(model=str(stable_diffusion), scheduler="EulerDiscreteSchedular")


def test_with_every_scheduler_an_image_follows_from_its_seed(family: Any) -> None:
    """Whatever random numbers were drawn before."""
    with pytest.raises(UnknownName) as caught:
        _set_scheduler(family.pipeline, "none")
    names = str(caught.value).split("there are: ")[1].split(", ")
    assert len(names) == 13
    for name in names:
        steps = 4 if name == "PNDMScheduler" else 2  # its beginning needs four
        family.sampling = replace(family.sampling, num_steps=steps, guidance_scale=1.0, height=16, width=16)
        _set_scheduler(family.pipeline, name)
        assert type(family.pipeline.scheduler).__name__ == name
        first, _ = family.sample(["a dog"], [7], [], recorded=False)
        torch.rand(3)
        again, _ = family.sample(["a dog"], [7], [], recorded=False)
        assert first.any(), name
        np.testing.assert_array_equal(first, again, err_msg=name)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "DPMSolverSDEScheduler"])
def test_an_incompatible_scheduler_that_diffusers_lists_is_not_offered(name: str) -> None:
    pipeline = SimpleNamespace(scheduler=diffusers.EulerDiscreteScheduler())
    assert name in [part.__name__ for part in pipeline.scheduler.compatibles]
    with pytest.raises(UnknownName) as caught:
        _set_scheduler(pipeline, name)
    assert str(caught.value).count(name) == 1


@pytest.mark.parametrize("kind", [ImportError, TypeError, ValueError])
def test_a_scheduler_that_cannot_be_built_is_an_error(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> None:
        raise kind("\nit needs\nthis and that")

    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "from_config", fail)
    pipeline = SimpleNamespace(scheduler=diffusers.EulerDiscreteScheduler())
    with pytest.raises(ConfigError, match="with the scheduler LMSDiscreteScheduler: it needs this and that"):
        _set_scheduler(pipeline, "LMSDiscreteScheduler")


def test_a_model_whose_own_scheduler_ignores_seeds_is_refused() -> None:
    kind = type("DPMSolverSDEScheduler", (diffusers.DDIMScheduler,), {})
    pipeline = SimpleNamespace(scheduler=kind())
    with pytest.raises(ConfigError, match="noise of its own; set scheduler: EulerAncestralDiscreteScheduler"):
        _set_scheduler(pipeline, "")
    with pytest.raises(UnknownName):
        _set_scheduler(pipeline, "DPMSolverSDEScheduler")
    _set_scheduler(pipeline, "EulerAncestralDiscreteScheduler")
    assert type(pipeline.scheduler) is diffusers.EulerAncestralDiscreteScheduler


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchLCMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
)
@pytest.mark.parametrize("name", ["", "FlowMatchEulerDiscreteScheduler"])
def test_stochastic_schedulers_for_flow_matching_are_refused(scheduler: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=r"does not depend on the images' seeds; save the model with"):
        _set_scheduler(SimpleNamespace(scheduler=scheduler), name)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    folder = models.make_pixart_sigma(tmp_path)
    with pytest.raises(ConfigError, match=r"PixArtSigmaPipeline.*StableDiffusionXLPipeline.*FluxPipeline"):
        Diffusers(model=str(folder))


@pytest.mark.parametrize("model", ["no/such-model", "sdxl"])
def test_missing_weights_name_the_download_command(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # huggingface_hub warns of options that it dropped
        with pytest.raises(MissingWeights, match="hf download"):
            Diffusers(model=model)


def test_a_model_in_the_cache_is_found_without_the_hub(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(model: str, name: str, *, local_files_only: bool = False) -> str:
        assert local_files_only, "the hub was asked"
        return str(stable_diffusion / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert pipeline_class("some/model") == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("name", "says"), [("flux", "did you mean 'flux-dev'?"), ("sd2.1", "there are: flux-dev, flux-schnell, sd-turbo")]
)
def test_an_unknown_short_name_suggests_the_nearest(name: str, says: str) -> None:
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


def test_a_negative_prompt_changes_images_and_flux_refuses_one(stable_diffusion: Path, tmp_path: Path) -> None:
    plain, negative = (
        Diffusers(model=str(stable_diffusion), **OPTIONS, negative_prompt=text).generate(ASKED[:1])[0].image
        for text in ("", "cat")
    )
    assert not np.array_equal(plain, negative)
    flux = models.make_flux(tmp_path)
    with pytest.raises(ConfigError, match="FLUX takes no negative prompt"):
        Diffusers(model=str(flux), negative_prompt="cat")


def test_layers_that_are_not_recorded_keep_their_processor(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family.selection = replace(family.selection, layers=("up_blocks",))
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
    assert [generation.warnings for generation in flagged] == [(), (SAFETY_WARNING,), (SAFETY_WARNING,)]
    for one, other in zip(plain, flagged, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_a_model_without_a_safety_checker_refuses_the_setting(stable_diffusion: Path) -> None:
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


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (models.make_stable_diffusion, ("text_encoder", "tokenizer")),
        (models.make_stable_diffusion, ("vae",)),
        (models.make_stable_diffusion_3, ("text_encoder", "tokenizer")),
        (models.make_stable_diffusion_3, ("tokenizer_3",)),
        (models.make_flux, ("text_encoder_2", "tokenizer_2")),
        (models.make_flux, ("text_encoder",)),
    ],
)
def test_a_part_that_the_family_needs_is_not_left_out(make: Any, without: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"needs its part '{without[0]}'|leave out both"):
        Diffusers(model=str(make(tmp_path)), without=without)


def test_words_behind_a_learned_embedding_of_several_vectors_keep_their_maps(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<toy>": torch.randn(4, 16)}, path)
    family = Diffusers(model=str(stable_diffusion), **OPTIONS, textual_inversion=str(path)).family
    (request,) = requests("a [cat] on a [<toy>] and a [dog]")
    tokenizer, text = family.pipeline.tokenizer, request.prompt.text
    read = tokenizer.tokenize(family.pipeline.maybe_convert_prompt(text, tokenizer))
    assert read.count("<toy>_3") == 1
    found = locate_in_encoders(family.encoders(), request.prompt)
    spelled = [[read[position - 1] for position in positions] for positions in found.positions]  # the first is a mark
    assert ["".join(word).replace("</w>", "") for word in spelled] == ["cat", "<toy><toy>_1<toy>_2<toy>_3", "dog"]
    long = parse_line("<toy> and <toy> and <toy> and a [dog]")  # 15 vectors and marks before the dog; 16 are read
    assert 'the word "dog" is cut off and has no mask' in locate_in_encoders(family.encoders(), long).warnings


def test_a_negative_prompt_without_guidance_is_refused(stable_diffusion: Path) -> None:
    with pytest.raises(ConfigError, match=r"no effect without guidance \(guidance_scale 1\)"):
        Diffusers(model=str(stable_diffusion), **{**OPTIONS, "guidance_scale": 1.0}, negative_prompt="rain")
    with pytest.raises(ConfigError, match=r"no effect without guidance \(guidance_scale 0\.5\)"):
        Tiny(guidance_scale=0.5, negative_prompt="rain")


def test_a_single_file_checkpoint_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MissingWeights, match=r"is one file, and a folder .*from_single_file"):
        Diffusers(model=str(tmp_path / "model.safetensors"))


def test_a_folder_without_model_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"has no model_index\.json; give the folder of a diffusers pipeline"):
        Diffusers(model=str(tmp_path))


def test_weights_for_another_model_are_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.safetensors"
    save_file({"<toy>": torch.randn(1, 24)}, wide)
    with pytest.raises(ConfigError, match=r"cannot use the weights .*wide\.safetensors"):
        Diffusers(model=str(stable_diffusion), **OPTIONS, textual_inversion=str(wide))
    folder = models.make_stable_diffusion_3(tmp_path)  # whose pipeline takes no embeddings
    with pytest.raises(ConfigError, match=r"cannot use the weights .*wide\.safetensors"):
        Diffusers(model=str(folder), textual_inversion=str(wide))


@pytest.mark.parametrize("prefix", ["transformer.transformer_blocks.0.attn.to_q", "unet"])
def test_a_lora_of_another_model_is_refused(stable_diffusion: Path, tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("peft")
    network = Diffusers(model=str(stable_diffusion), **OPTIONS).family.network
    if prefix == "unet":  # the same layers at another width
        prefix += "." + next(name for name, _ in network.named_modules() if name.endswith("attn2.to_q"))
    state = {f"{prefix}.lora_A.weight": torch.randn(2, 24), f"{prefix}.lora_B.weight": torch.randn(24, 2)}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ConfigError, match=r"has no LoRA weights for|cannot use the weights"):
        Diffusers(model=str(stable_diffusion), **OPTIONS, lora=str(tmp_path))


def test_learned_embeddings_get_maps(stable_diffusion: Path, tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<my-dog>": torch.randn(16)}, path)
    family = Diffusers(model=str(stable_diffusion), **OPTIONS, textual_inversion=str(path)).family
    (generation,) = family.generate(requests("a photo of a [<my-dog>]"))
    assert family.pipeline.tokenizer.tokenize("<my-dog>") == ["<my-dog>"]
    assert generation.maps.words == ("<my-dog>",)
    assert generation.maps.weights.any()


def test_learned_embeddings_of_two_text_encoders_are_named_after_their_file(sdxl: Path, tmp_path: Path) -> None:
    path = tmp_path / "my-toy.safetensors"
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 32)}, path)
    family = Diffusers(model=str(sdxl), **OPTIONS, textual_inversion=str(path)).family
    (generation,) = family.generate(requests("a photo of a [my-toy] and a [dog]"))
    for encoder in family.encoders():
        assert encoder.tokenizer.tokenize("my-toy my-toy_1") == ["my-toy", "my-toy_1"]
    assert generation.maps.weights.any(axis=(1, 2)).tolist() == [True, True]
    found = locate_in_encoders(family.encoders()[:1], generation.request.prompt).positions
    assert [len(positions) for positions in found] == [2, 1]


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

    def image(scale: float) -> Any:
        options = OPTIONS | {"lora": str(tmp_path), "lora_scale": scale}
        return Diffusers(model=str(stable_diffusion), **options).family.generate(ASKED[:1])[0].image

    np.testing.assert_array_equal(image(0.0), one.image)
    np.testing.assert_array_equal(image(1.0), other.image)
    assert not any(np.array_equal(image(0.5), end) for end in (one.image, other.image))


def test_a_strength_without_lora_weights_is_refused(stable_diffusion: Path) -> None:
    with pytest.raises(ValueError, match="lora_scale is the strength of LoRA weights, and there are none; set lora"):
        Diffusers(model=str(stable_diffusion), **OPTIONS, lora_scale=0.5)


@pytest.mark.parametrize("height", [-64, 31])
def test_sizes_that_the_network_cannot_compute_are_refused(stable_diffusion: Path, height: int) -> None:
    with pytest.raises(ValueError, match=rf"height and width must be .*, not {height} x 64"):
        Diffusers(model=str(stable_diffusion), **OPTIONS, height=height, width=64)


def test_a_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "os.system"}))
    with pytest.raises(ConfigError, match=r"os\.system"):
        Diffusers(model=str(tmp_path))


def test_a_compiled_network_gives_the_same_record(family: Any) -> None:
    plain = family.generate(ASKED)
    family.pipeline.unet.compile(backend="eager")
    for one, other in zip(plain, family.generate(ASKED), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)


# -- which attention is recorded


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize(
    ("layers", "cross", "own", "grid"),
    [
        (("up_blocks",), (2, 4), 2, (8, 8)),
        (("up_blocks.1",), (2,), 2, (8, 8)),
        (("up_blocks.0",), (4,), 4, (4, 4)),
        (("mid_block", "down_blocks.2"), (4,), 4, (4, 4)),
        (("down_blocks.1.attentions.0.transformer_blocks.0.attn2", "mid_block"), (2, 4), 4, (4, 4)),
    ],
)
def test_layers_are_recorded_on_their_own_grids(
    sdxl: Path, layers: tuple[str, ...], cross: tuple[int, ...], own: int, grid: tuple[int, int]
) -> None:
    family = Diffusers(model=str(sdxl), num_steps=1, layers=layers).family
    assert (family.selection.cross_levels, family.selection.self_level) == (cross, own)
    (made,) = family.generate(ASKED[:1])
    assert made.maps.weights.shape[1:] == made.maps.affinity.shape[1:] == grid
    assert made.maps.weights.any()
    family.selection = replace(family.selection, cross_levels=(2, 4), self_level=2)
    if grid == (8, 8) and len(cross) == 2:  # what was recorded before is what it was
        np.testing.assert_array_equal(family.generate(ASKED[:1])[0].maps.weights, made.maps.weights)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (("upblocks",), r"begins with 'upblocks'; did you mean 'up_blocks'\? they begin with: down_blocks, up_bl"),
        (("up_blocks", "down_blocks.0"), r"begins with 'down_blocks.0'; did you mean"),
        (("down_blocks.1.attentions.0.transformer_blocks.0.attn1",), "have no cross-attention on a grid"),
        (("mid_block.attentions.0.transformer_blocks.0.attn2",), r"no self-attention on a grid.*1/2 or 1/4 of"),
    ],
)
def test_layers_without_recorded_grids_are_refused(sdxl: Path, layers: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Diffusers(model=str(sdxl), layers=layers)


@pytest.mark.parametrize(
    ("scheduler", "calls", "recorded"),
    [("EulerDiscreteScheduler", 10, 5), ("HeunDiscreteScheduler", 19, 10), ("KDPM2DiscreteScheduler", 19, 10)],
)
def test_skip_steps_is_a_share_of_the_network_calls(
    sdxl: Path, scheduler: str, calls: int, recorded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Diffusers(model=str(sdxl), num_steps=10, skip_steps=0.5, scheduler=scheduler, height=32, width=32).family
    seen: list[bool] = []
    family.network.register_forward_pre_hook(lambda *_: seen.append(False))
    add = Recorder._add_words

    def watched(recorder: Recorder, *args: Any, **kwargs: Any) -> None:
        seen[-1] = True
        add(recorder, *args, **kwargs)

    monkeypatch.setattr(Recorder, "_add_words", watched)
    family.generate(ASKED[:1])
    assert seen == [False] * (calls - recorded) + [True] * recorded


def test_a_consistency_model_takes_no_negative_prompt(stable_diffusion: Path, tmp_path: Path) -> None:
    parts = dict(Diffusers(model=str(stable_diffusion)).family.pipeline.components)
    torch.manual_seed(0)
    unet = type(parts["unet"]).from_config({**parts["unet"].config, "time_cond_proj_dim": 8})
    parts |= {"unet": unet, "scheduler": diffusers.LCMScheduler()}
    diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    options: dict[str, Any] = {"model": str(tmp_path), "num_steps": 1}
    assert Diffusers(**options).generate(ASKED[:1])[0].maps.weights.any()
    for weights in tmp_path.rglob("*.safetensors"):  # none of which need be loaded to say so
        weights.unlink()
    with pytest.raises(ConfigError, match="a latent consistency model takes no negative prompt"):
        Diffusers(**options, negative_prompt="cat")


# -- what is loaded and where


def test_no_image_gets_the_invisible_watermark(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline would, on such machines alone, without being asked."""
    module = diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl
    monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(module, "StableDiffusionXLWatermarker", object, raising=False)
    assert module.StableDiffusionXLPipeline.from_pretrained(sdxl).watermark is not None
    assert Diffusers(model=str(sdxl)).family.pipeline.watermark is None
