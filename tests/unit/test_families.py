"""Recorded attention of every family, against softmaxes written out by hand over what its layers computed with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import save_file

from synthgen.backbones.diffusers import Diffusers
from synthgen.diffusion import StableDiffusionXL
from synthgen.diffusion.backbone import BROKEN_ATTENTION
from synthgen.errors import SynthgenError
from synthgen.prompts import parse_line
from synthgen.records import AFFINITY_OFFSETS, Request
from tests import models

LINES = ["a photo of a [dog]", "a [golden dog] and a [cat]", "the [park], an [umbrella]"]
HEIGHT, WIDTH = 64, 96


@dataclass(frozen=True)
class Case:
    make: Any
    guidance: float
    image: int | None = None  # of joint attention: the place of its first image patch


CASES = {
    "sd2": Case(models.make_stable_diffusion_2, 5.0),
    "sdxl": Case(models.make_stable_diffusion_xl, 5.0),
    "sd3": Case(models.make_stable_diffusion_3, 5.0, image=0),
    "sd35": Case(partial(models.make_stable_diffusion_3, medium=True), 5.0, image=0),
    "sd3-no-t5": Case(partial(models.make_stable_diffusion_3, t5=False), 5.0, image=0),
    "flux-dev": Case(models.make_flux, 3.5, image=512),
    "flux-schnell": Case(partial(models.make_flux, dev=False), 0.0, image=256),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = CASES[request.param]
    return case, case.make(tmp_path_factory.mktemp(request.param))


def load(case: tuple[Case, Path], **options: Any) -> Any:
    settings = {"num_steps": 2, "guidance_scale": case[0].guidance, "height": HEIGHT, "width": WIDTH, **options}
    return Diffusers(model=str(case[1]), **settings).family


def requests() -> list[Request]:
    return [Request(f"{row:010d}", parse_line(line), row) for row, line in enumerate(LINES)]


class Witness:
    """Keeps the queries and keys of every call of PyTorch's attention, layer by layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, network: Any, layers: tuple[str, ...]) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.inside = False
        inner = F.scaled_dot_product_attention

        def attention(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            if self.inside:
                self.calls.append((query.double(), key.double()))
            return inner(query, key, *args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        for name, module in network.named_modules():
            if f"{name}.processor" in network.attn_processors and f"{name}.processor".startswith(layers):
                module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
                module.register_forward_hook(lambda *_: setattr(self, "inside", False))


def by_hand(case: Case, family: Any, calls: Any, num: int) -> tuple[dict[tuple[int, int], list[Any]], list[Any]]:
    """Image-to-text probabilities by grid and image-to-image ones, a mean over heads each, of the conditional half."""
    guided = case.guidance > 1 and not hasattr(family.network.config, "guidance_embeds")
    levels = [family.selection.cross_levels, (family.selection.self_level,)]
    fine = family.grid(HEIGHT, WIDTH)
    cross_grids, (own_grid,) = ([(fine[0] // level, fine[1] // level) for level in found] for found in levels)
    cross: dict[tuple[int, int], list[Any]] = {grid: [] for grid in cross_grids}
    own = []
    for query, key in calls:
        assert len(query) == num * (1 + guided)
        query, key = query[-num:], key[-num:]
        probability = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1).mean(1)
        pixels, keys = query.shape[2], key.shape[2]
        if case.image is not None:
            size = fine[0] * fine[1]
            image = slice(case.image, case.image + size) if pixels > size else slice(0, size)
            if pixels > size:
                cross[fine].append(
                    probability[:, image, size:] if case.image == 0 else probability[:, image, : image.start]
                )
            own.append(probability[:, image, image])
        elif keys == 77:
            for grid in cross_grids:
                if pixels == grid[0] * grid[1]:
                    cross[grid].append(probability)
        elif pixels == own_grid[0] * own_grid[1]:
            own.append(probability)
    return cross, own


def test_maps_equal_a_softmax_by_hand(case: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    family = load(case)
    asked = requests()
    _, tokens = family._locate(asked)
    texts, seeds = [request.prompt.text for request in asked], [request.seed for request in asked]
    _, recorder = family.sample(texts, seeds, tokens)
    witness = Witness(monkeypatch, family.network, family.selection.layers)
    family.sample(texts, seeds, [], recorded=False)
    cross, own = by_hand(case[0], family, witness.calls, len(asked))
    for grid, found in cross.items():
        assert len(found) == recorder._counts[grid] > 0
        mean = torch.stack(found).mean(0)  # b pixels text
        for row, words in enumerate(tokens):
            for word, positions in enumerate(words):
                expected = mean[row][:, list(positions)].mean(1)
                recorded = recorder._cross[grid][row, word].double() / recorder._counts[grid]
                torch.testing.assert_close(recorded, expected, atol=1e-5, rtol=0)
    rows, columns = recorder.grid(family.selection.self_level)
    assert len(own) == recorder._counts["self"] > 0
    mean = torch.stack(own).mean(0) * rows * columns
    assert recorder._self is not None
    for edge, (down, right) in enumerate(AFFINITY_OFFSETS):
        for y in range(rows):
            for x in range(columns):
                value = recorder._self[:, edge, y, x].double() / recorder._counts["self"]
                if 0 <= y + down < rows and 0 <= x + right < columns:
                    here, there = y * columns + x, (y + down) * columns + x + right
                    expected = (mean[:, here, there] + mean[:, there, here]) / 2
                    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
                else:
                    assert not value.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guided", [True, False])
def test_recording_changes_no_bit(case: tuple[Case, Path], dtype: Any, guided: bool) -> None:
    family = load(case, dtype=dtype, **({} if guided else {"guidance_scale": 1.0}))
    asked = requests()
    texts, seeds = [request.prompt.text for request in asked], [request.seed for request in asked]
    latents: list[torch.Tensor] = []
    decode = family.pipeline.vae.decode

    def witnessed(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(z.clone())
        return decode(z, *args, **kwargs)

    family.pipeline.vae.decode = witnessed
    family.sample(texts, seeds, [], recorded=False)
    generations = family.generate(asked)
    assert torch.equal(*latents)
    for generation, words in zip(generations, [1, 2, 2], strict=True):
        assert generation.image.shape == (HEIGHT, WIDTH, 3)
        assert generation.maps.weights.shape[0] == words
        assert generation.maps.weights.shape[1:] == (4, 6)
        assert (generation.maps.weights.astype(float).sum((1, 2)) > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slicing_changes_no_bit(case: tuple[Case, Path], dtype: Any) -> None:
    """With what ``enable_attention_slicing`` does to the family: U-Nets compute head by head, transformers as ever."""
    family = load(case, dtype=dtype)
    family.pipeline.enable_attention_slicing(1)
    asked = requests()
    texts, seeds = [request.prompt.text for request in asked], [request.seed for request in asked]
    plain, _ = family.sample(texts, seeds, [], recorded=False)
    for image, generation in zip(plain, family.generate(asked), strict=True):
        np.testing.assert_array_equal(image, generation.image)
        assert (generation.maps.weights.astype(float).sum((1, 2)) > 0).all()


def test_recording_with_lora_changes_no_bit(case: tuple[Case, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    plain, state = load(case), {}
    part = next(name for name, part in plain.pipeline.components.items() if part is plain.network)
    for name, layer in plain.network.named_modules():
        if name.endswith((".to_q", ".to_k")):
            state[f"{part}.{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
            state[f"{part}.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
    save_file(state, tmp_path / "lora.safetensors")
    family, asked = load(case, dtype="bfloat16", lora=str(tmp_path / "lora.safetensors")), requests()
    assert {weight.dtype for weight in family.network.parameters()} == {torch.bfloat16}
    texts, seeds = [request.prompt.text for request in asked], [request.seed for request in asked]
    images, _ = family.sample(texts, seeds, [], recorded=False)
    for image, before, generation in zip(images, plain.generate(asked), family.generate(asked), strict=True):
        np.testing.assert_array_equal(image, generation.image)
        assert not np.array_equal(before.maps.weights, generation.maps.weights)


def test_offloading_changes_nothing(case: tuple[Case, Path]) -> None:
    """With Accelerate's hooks, which bring each layer's weights for its call alone; here from memory to memory."""
    first, second, _ = requests()
    asked = [first, second, replace(first, key="0000000009", seed=9)]  # two images of one prompt
    plain = load(case).generate(asked)
    family = load(case)
    cpu_offload(family.network, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in family.network.parameters())
    for one, other in zip(plain, family.generate(asked), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)
        np.testing.assert_array_equal(one.maps.affinity, other.maps.affinity)
    assert not np.array_equal(plain[0].image, plain[2].image)


def test_memory_does_not_grow_with_steps(case: tuple[Case, Path]) -> None:
    family = load(case)
    (asked, *_) = requests()
    sizes = []
    for steps in (1, 4):
        family.sampling = replace(family.sampling, num_steps=steps)
        _, recorder = family.sample([asked.prompt.text], [0], family._locate([asked])[1])
        held = [*recorder._cross.values(), recorder._self, *(recorder._columns or ())]
        sizes.append(sum(tensor.numel() for tensor in held if tensor is not None))
    assert sizes[0] == sizes[1]


def test_attend_records_existing_images(case: tuple[Case, Path]) -> None:
    family = load(case)
    images = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    first = family.attend(images, requests(), (100, 500))
    again = family.attend(images, requests(), (100, 500))
    for one, other, image in zip(first, again, images, strict=True):
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)
        np.testing.assert_array_equal(one.image, image)
        assert np.isfinite(one.maps.affinity.astype(float)).all()
    other = family.attend(images[:, ::-1].copy(), requests(), (100, 500))
    assert not np.array_equal(first[0].maps.weights, other[0].maps.weights)


def back(family: Any, latents: torch.Tensor, denoise: Any, num_steps: int) -> torch.Tensor:
    """Sample without guidance, by a scheduler of diffusers, from where an inversion ended."""
    scheduler = family.pipeline.scheduler
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing="leading")
        scheduler.set_timesteps(num_steps)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        config, patches = scheduler.config, latents.shape[2] * latents.shape[3] // 4
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(patches, *(config[name] for name in names)) if config.use_dynamic_shifting else None
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(denoise(latents, float(timestep)), timestep, latents).prev_sample
    return latents


def test_sampling_from_where_an_inversion_ended_leads_back(case: tuple[Case, Path]) -> None:
    """Within 2 % of the latent's norm in 40 steps, and closer the more steps."""
    family = load(case, height=32, width=48)
    if isinstance(family, StableDiffusionXL):
        family.network.conv_out.weight.data *= 0.1  # so that it does not change its mind within a step, as trained ones
    image = torch.zeros(1, 32, 48, 3, dtype=torch.uint8)
    with torch.inference_mode():
        latents = torch.randn(family.encode(image).shape, generator=torch.Generator().manual_seed(0))
        denoise = family.casting_denoiser(["a dog"], latents)
        errors = []
        for num_steps in (10, 40):
            noise = family.invert(latents, denoise, num_steps)
            assert not torch.allclose(noise, latents, atol=0.1)
            errors.append(float((back(family, noise, denoise, num_steps) - latents).norm() / latents.norm()))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 2


def test_a_step_back_undoes_a_step_of_inversion(case: tuple[Case, Path]) -> None:
    """Where the network says the same in both directions nothing is lost but float32's rounding, however few steps."""
    family = load(case, height=32, width=48)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        shape = family.encode(torch.zeros(1, 32, 48, 3, dtype=torch.uint8)).shape
        latents, *said = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(5))
        told: list[float] = []

        def say(_: torch.Tensor, timestep: float) -> torch.Tensor:
            told.append(timestep)
            return said[len(told) - 1]

        noise = family.invert(latents, say, 4)
        found = back(family, noise, lambda *_: said.pop(), 4)
    assert told == sorted(told)
    torch.testing.assert_close(found, latents, atol=2e-4, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "flux-dev"])
def test_latents_stay_float32_between_steps_in_half_precision(name: str, tmp_path: Path) -> None:
    """What is rounded is what the network reads and says, not the latents that go from step to step."""
    family = load((CASES[name], CASES[name].make(tmp_path)), height=32, width=48, dtype="bfloat16")
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    seen = []
    with torch.inference_mode():
        latents = family.encode(torch.from_numpy(images)).float()
        denoise = family.casting_denoiser(["a dog"], latents)

        def watched(noised: torch.Tensor, timestep: float) -> torch.Tensor:
            seen.append(noised.dtype)
            return denoise(noised, timestep)

        noise = family.invert(latents, watched, 3)
    assert {noise.dtype, *seen} == {torch.float32}
    (generation,) = family.attend(images, requests()[:1], (100,))
    assert generation.maps.weights.any()
    assert not generation.failed


def test_an_autoencoder_with_force_upcast_computes_in_float32(tmp_path: Path) -> None:
    family = load((CASES["sdxl"], models.make_stable_diffusion_xl(tmp_path)), dtype="float16")
    vae, seen = family.pipeline.vae, []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert vae.config.force_upcast
    with torch.inference_mode():
        family.encode(torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8))
    assert seen == [torch.float32]
    assert vae.dtype == torch.float16


def test_a_consistency_model_gets_the_embedding_of_no_guidance(stable_diffusion: Path) -> None:
    family = Diffusers(model=str(stable_diffusion)).family
    config = {**family.network.config, "time_cond_proj_dim": 8}
    torch.manual_seed(0)
    family.pipeline.unet = type(family.network).from_config(config).eval()
    told = []
    family.network.register_forward_pre_hook(
        lambda _, args, given: told.append(given["timestep_cond"]), with_kwargs=True
    )
    images = np.zeros((2, 32, 32, 3), np.uint8)
    family.attend(images, requests()[:2], (100,))
    with torch.inference_mode():
        expected = family.pipeline.get_guidance_scale_embedding(torch.zeros(2), embedding_dim=8)
    torch.testing.assert_close(told[0], expected)


def test_maps_of_other_image_sizes_fill_the_grid(case: tuple[Case, Path]) -> None:
    family = load(case)
    height, width = 3 * family.multiple, family.multiple
    images = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    (generation,) = family.attend(images, requests()[:1], (100,))
    _, rows, columns = generation.maps.weights.shape
    assert rows == 3 * columns
    assert generation.maps.affinity.shape[1:] == (rows, columns)


def test_attend_halves_a_batch_too_large_and_reports_non_finite_attention(
    case: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(case)
    images = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    alone = [family.attend(images[row : row + 1], requests()[row : row + 1], (100,))[0] for row in range(3)]
    encode, sizes = family.encode, []

    def narrow(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError
        return encode(pixels)

    monkeypatch.setattr(family, "encode", narrow)
    for one, other in zip(family.attend(images, requests(), (100,)), alone, strict=True):
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)
    assert sizes == [3, 1, 1, 1]
    family = load(case)
    encode = family.encode
    monkeypatch.setattr(
        family, "encode", lambda pixels: encode(pixels) * torch.tensor([1, torch.nan, 1])[:, None, None, None]
    )
    assert [one.failed for one in family.attend(images, requests(), (100,))] == ["", BROKEN_ATTENTION, ""]
    monkeypatch.setattr(family, "encode", lambda pixels: narrow(torch.cat([pixels, pixels])))
    with pytest.raises(SynthgenError, match="too little memory for one image"):
        family.attend(images[:1], requests()[:1], (100,))


def test_an_inversion_records_its_steps(case: tuple[Case, Path]) -> None:
    family = load(case)
    images = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    whole = family.attend(images, requests(), (), inversion_steps=4)
    other_seeds = [replace(request, seed=request.seed + 1) for request in requests()]
    for one, other in zip(whole, family.attend(images, other_seeds, (), inversion_steps=4), strict=True):
        np.testing.assert_array_equal(one.maps.weights, other.maps.weights)  # no chance in it
    family.selection = replace(family.selection, skip_steps=0.5)
    early = family.attend(images, requests(), (), inversion_steps=4)
    assert not np.array_equal(whole[0].maps.weights, early[0].maps.weights)


@pytest.mark.parametrize(
    ("make", "inverted", "sampled"),
    [
        (models.make_stable_diffusion_xl, [1, 201, 401, 601, 801], [1, 201, 401, 601, 801]),
        (partial(models.make_stable_diffusion_xl, turbo=True), [1, 201, 401, 601, 801], [199, 399, 599, 799, 999]),
        (partial(models.make_flux, dev=False), [0, 200, 400, 600, 800], [200, 400, 600, 800, 1000]),
        (models.make_stable_diffusion_3, [0, 429, 667, 818, 923], [9, 503, 751, 900, 1000]),
    ],
)
def test_timesteps_of_an_inversion_and_of_the_sampler(
    make: Any, inverted: list[int], sampled: list[int], tmp_path: Path
) -> None:
    """As docs/attend.md has it. A U-Net is told the same noise both ways, a transformer the two ends of each step."""
    family = load((Case(make, 0.0), make(tmp_path)), num_steps=5, height=32, width=32)
    family.generate(requests()[:1])
    grid = family.grid(32, 32)
    times, _ = family.inversion(5, torch.zeros(1, 4, 2 * grid[0], 2 * grid[1]))
    assert [round(time) for time in times] == inverted
    assert [round(float(time)) for time in reversed(family.pipeline.scheduler.timesteps)] == sampled
