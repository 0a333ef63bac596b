"""Devices that hold too little: what is halved and remembered, what is put back, and what is told."""

from __future__ import annotations

import logging
import sys
import weakref
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from synthgen.backbones.diffusers import Diffusers
from synthgen.diffusion.loading import Loading, load_pipeline
from synthgen.diffusion.memory import AdaptiveBatches, is_out_of_memory
from synthgen.errors import SynthgenError
from synthgen.prompts import parse_line
from synthgen.records import Request
from tests import models

LINES = ("a photo of a [dog]", "a [cat]", "the [park]", "a [dog]", "a [cat] in a [park]")
ASKED = [Request(f"{row:010d}", parse_line(line), row) for row, line in enumerate(LINES)]
FULL = [  # as PyTorch, cuDNN, cuBLAS and the driver say it
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
]
BROKEN = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def family(stable_diffusion: Path) -> Any:
    return Diffusers(model=str(stable_diffusion), num_steps=1, guidance_scale=3.0).family


# -- portions


@pytest.mark.parametrize("error", FULL)
def test_out_of_memory_is_recognised_by_its_message(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(BROKEN)
    assert not is_out_of_memory(ValueError(str(error)))


class Device:
    """Has room for so many images; ``tried`` are the portions, and "-" that the model was put back."""

    def __init__(self, room: int) -> None:
        self.room, self.tried, self.portions = room, list[Any](), AdaptiveBatches()

    def see(self, count: int, *, what: str = "images", most: int = 16) -> list[int]:
        def compute(some: slice) -> list[int]:
            numbers = list(range(count))[some]
            self.tried.append(len(numbers))
            if len(numbers) > self.room:
                raise torch.OutOfMemoryError
            return numbers

        self.tried.clear()
        parts = self.portions.work(what, count, compute, lambda: self.tried.append("-"), most)
        return [number for part in parts for number in part]


def test_a_batch_size_that_did_not_fit_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(room=5)
    with caplog.at_level(logging.WARNING, logger="synthgen"):
        assert device.see(18) == list(range(18))
        assert device.tried == [16, "-", 8, "-", 4, 4, 4, 4, 2]
        assert device.see(6) == list(range(6))
        assert device.tried == [4, 2]
        assert device.see(3) == list(range(3))
        assert device.tried == [3]
        assert device.see(6, what="smaller images") == list(range(6))  # they may fit better
        assert device.tried == [6, "-", 3, 3]
        device.room = 1
        assert device.see(3) == list(range(3))
        assert device.tried == [3, "-", 1, 1, 1]
    (told,) = caplog.records
    assert told.getMessage() == "too little memory for 16 images at once; from now on 4 at a time"
    device.room = 0
    with pytest.raises(SynthgenError, match="too little memory for one image"):
        device.see(2)
    assert device.tried == [1, "-"]
    assert device.see(0) == []


@pytest.mark.parametrize("broken", [False, True])
def test_another_error_is_raised_after_the_model_was_restored(broken: bool) -> None:
    """As it is, also where the device is so broken that putting back fails as well."""
    happened = []

    def compute(some: slice) -> None:
        raise BROKEN

    def restore() -> None:
        happened.append("put back")
        if broken:
            raise RuntimeError("CUDA error: another one")

    with pytest.raises(RuntimeError) as caught:
        AdaptiveBatches().work("images", 4, compute, restore, 4)
    assert caught.value is BROKEN
    assert happened == ["put back"]


# -- backbones


@pytest.mark.parametrize("attends", [False, True])
def test_a_batch_too_large_for_the_device_is_halved_once(
    family: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, attends: bool
) -> None:
    """Later ones begin at what fitted. Images and maps change by no more than rounding."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    part, sizes = ("_watch" if attends else "sample"), list[int]()
    inner = getattr(family, part)

    def ask(count: int, pixels: Any = images) -> Any:
        sizes.clear()
        return family.attend(pixels[:count], ASKED[:count], (100,)) if attends else family.generate(ASKED[:count])

    def small(given: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(given))
        if len(given) > 2:
            raise torch.OutOfMemoryError
        return inner(given, *args, **kwargs)

    whole = ask(5)
    monkeypatch.setattr(family, part, small)
    parts = ask(5)
    assert sizes == [5, 2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        assert one.request == other.request
        assert np.abs(one.image.astype(int) - other.image.astype(int)).max() <= 1
        np.testing.assert_allclose(one.maps.weights.astype(float), other.maps.weights.astype(float), atol=2e-4)
    assert len(ask(4)) == 4
    assert sizes == [2, 2]
    if attends:  # another size is begun as a whole
        assert len(ask(3, np.zeros((3, 32, 64, 3), np.uint8))) == 3
        assert sizes == [3, 1, 1, 1]
    (told,) = caplog.messages
    what = "images of 32 x 32 pixels that exist" if attends else "images of 32 x 32 pixels"
    assert told == f"too little memory for 5 {what} at once; from now on 2 at a time"


def narrow(family: Any, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception = FULL[0]) -> list[str]:
    """Let the autoencoder decode ``most`` images at once at most; returns what happens, in its order.

    "free" counts where no exception is at hand and nothing holds the latents of a failed call any more.
    """
    vae, happened = family.pipeline.vae, []
    decode, free = vae.decode, family.pipeline.maybe_free_model_hooks
    failed: list[Any] = []

    def small(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        happened.append(f"decode {len(z)}")
        if len(z) > most:
            failed.append(weakref.ref(z))
            raise type(error)(*error.args)
        return decode(z, *args, **kwargs)

    def freed() -> None:
        if sys.exc_info()[0] is None and all(ref() is None for ref in failed):
            happened.append("free")
        free()

    monkeypatch.setattr(vae, "decode", small)
    monkeypatch.setattr(family.pipeline, "maybe_free_model_hooks", freed)
    return happened


def test_an_autoencoder_that_failed_is_restored_to_its_dtype(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline casts Stable Diffusion XL's to float32 before it decodes, and back only where that went well."""
    family = Diffusers(model=str(sdxl), num_steps=1, dtype="float16", height=32, width=32).family
    alone = family.generate(ASKED[:1])[0]
    with monkeypatch.context() as patch:
        happened = narrow(family, patch, 1, FULL[1])
        made = family.generate(ASKED[:2])
        assert [one.failed for one in made] == ["", ""]
        np.testing.assert_array_equal(made[0].image, alone.image)
        np.testing.assert_array_equal(made[0].maps.weights, alone.maps.weights)
        assert happened == ["decode 2", "free", "decode 1", "free", "decode 1", "free"]  # each call frees at its end
    for error, raised, told in ((FULL[0], SynthgenError, "too little memory for one"), (BROKEN, RuntimeError, "illeg")):
        with monkeypatch.context() as patch:
            narrow(family, patch, 0, error)
            with pytest.raises(raised, match=told):
                family.generate(ASKED[:1])
        assert family.pipeline.vae.dtype == torch.float16
        np.testing.assert_array_equal(family.generate(ASKED[:1])[0].image, alone.image)


@pytest.mark.parametrize("attends", [False, True])
def test_no_part_stays_on_the_device_after_it_ran_out_of_memory(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch, attends: bool
) -> None:
    family = Diffusers(model=str(sdxl), num_steps=1, guidance_scale=1.0, height=32, width=32).family
    happened: list[str] = []
    monkeypatch.setattr(family.pipeline, "maybe_free_model_hooks", lambda: happened.append("free"))

    def see(_: Any, given: Any) -> None:
        happened.append(f"see {len(given[0])}")
        if len(given[0]) > 1:
            raise torch.OutOfMemoryError

    family.network.register_forward_pre_hook(see)
    if attends:
        images = np.zeros((2, 32, 32, 3), np.uint8)
        assert len(family.attend(images, ASKED[:2], (100,))) == 2
        assert happened == ["see 2", "free", "see 1", "see 1"]
    else:
        assert len(family.generate(ASKED[:2])) == 2
        assert happened == ["see 2", "free", "see 1", "free", "see 1", "free"]


# -- loading


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "in float32; {}; or try dtype float16 or bfloat16, offload: true"),
        ({"dtype": "bfloat16"}, "in bfloat16; {}; or try offload: true"),
        ({"dtype": "float16", "offload": True}, "in float16; {}"),
    ],
)
def test_a_model_too_large_for_the_device_names_settings_that_help(
    stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], advice: str
) -> None:
    errors = [*FULL, BROKEN]
    advice = advice.format("see what else is on it, or take a smaller model")

    def full(*args: Any, **kwargs: Any) -> None:
        raise errors[0]

    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", full)
    while len(errors) > 1:
        with pytest.raises(SynthgenError) as caught:
            Diffusers(model=str(stable_diffusion), **options)
        assert str(caught.value) == f"cpu has too little memory to load {str(stable_diffusion)!r} {advice}"
        errors.pop(0)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Diffusers(model=str(stable_diffusion), **options)


def test_a_safety_checker_that_does_not_fit_can_be_left_out(
    stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Checker(torch.nn.Module):
        def to(self, device: str) -> Any:
            raise torch.OutOfMemoryError

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, requires_safety_checker=False)
    pipeline.register_modules(safety_checker=None)
    object.__setattr__(pipeline, "safety_checker", Checker())
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)
    monkeypatch.setattr(
        "synthgen.diffusion.loading._index",
        lambda model: {"_class_name": "StableDiffusionPipeline", "safety_checker": ["stable_diffusion", "Checker"]},
    )
    with pytest.raises(SynthgenError, match=r"offload: true, safety_checker: false$"):
        load_pipeline(Loading(str(stable_diffusion), safety_checker=True), ["StableDiffusionPipeline"])
