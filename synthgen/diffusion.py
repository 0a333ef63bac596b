"""Generate with a U-Net pipeline of ``diffusers`` and record its attention. The backbones of that kind share it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from synthgen.attention.recorder import Recorder, record
from synthgen.attention.words import WordTokens, locate_words
from synthgen.errors import ConfigError, MissingWeights, SynthgenError
from synthgen.records import Generation, Maps, Request

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which is where its notes begin

__all__ = ["DTYPES", "Looking", "Sampling", "UNetPipeline", "load_pipeline", "one_thread"]

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_pipeline(model: str, *, dtype: DType, device: str) -> Any:
    """A ``StableDiffusionPipeline`` from a folder or a hub id, from safetensors only, without a safety checker.

    Raises:
        MissingWeights: they are not on this machine and cannot be fetched.
        ConfigError: the model is of another family.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for library in (logging, transformers_logging):  # their bars and notes would break into ours
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            model,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        kind = "folder" if Path(model).exists() else "folder or model id"
        reason = " ".join(str(error).split())[:200]
        raise MissingWeights(
            f"the {kind} {model!r} cannot be loaded as a Stable Diffusion pipeline: {reason}; download it first, for "
            f"example with: hf download {model}, and check that it has safetensors weights"
        ) from None
    if not hasattr(pipeline, "unet"):
        raise ConfigError(
            f"{model!r} is a {type(pipeline).__name__}, which has no U-Net; known: StableDiffusionPipeline"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """On a CPU compute with one thread, so that sums come out in one order whatever the number of workers."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Sampling:
    """How one image is drawn."""

    num_steps: int
    guidance_scale: float  # 1 is none: the unconditional half is not computed
    negative_prompt: str
    height: int  # pixels
    width: int


@dataclass(frozen=True)
class Looking:
    """Which attention counts."""

    cross_levels: tuple[int, ...]  # the grids of cross-attention, as factors against the latent
    self_level: int  # and that of self-attention
    layers: tuple[str, ...] = ("",)  # beginnings of the names of the layers; "" is all
    first: float = 0.0  # the share of the steps, the noisiest ones, that are not recorded


class UNetPipeline:
    """What the backbones of this kind share: generate from requests, and attend to images that exist.

    Args:
        pipeline: a ``StableDiffusionPipeline`` on its device.
        sampling: steps, guidance and size.
        looking: which attention is recorded.
    """

    def __init__(self, pipeline: Any, sampling: Sampling, looking: Looking) -> None:
        self.pipeline, self.sampling, self.looking = pipeline, sampling, looking

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        return self.sampling.height, self.sampling.width

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One image with its maps for each request.

        The noise of each image is drawn on the CPU from its own seed, so neither the batch it is in nor the device
        changes it. Words that the tokenizer cuts off are left out of the record, with a warning.

        Raises:
            SynthgenError: an image came out with values that are no numbers.
        """
        located, tokens = self._locate(requests)
        images, recorder = self.sample(
            [request.prompt.text for request in requests], [request.seed for request in requests], tokens
        )
        return _records(requests, located, images, recorder)

    def attend(
        self, images: UInt8[np.ndarray, "b H W 3"], requests: Sequence[Request], timesteps: Sequence[int]
    ) -> list[Generation]:
        """The record that :meth:`generate` makes, for images that exist: each is noised to every timestep, once.

        z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, with one draw of noise an image, from its request's seed; the
        network runs once a timestep, with the image's own prompt and without guidance. The model must have been
        trained on discrete timesteps (those of Stable Diffusion are 0 to 999).
        """
        pipeline, device = self.pipeline, self.pipeline.device
        located, tokens = self._locate(requests)
        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(device, pipeline.vae.dtype).permute(0, 3, 1, 2) / 127.5 - 1
            encoded = pipeline.vae.encode(pixels)
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            latents = latents * pipeline.vae.config.scaling_factor
            draws = [torch.randn(latents.shape[1:], generator=_generator(request.seed)) for request in requests]
            noise = torch.stack(draws).to(device, latents.dtype)
            texts = [request.prompt.text for request in requests]
            context, _ = pipeline.encode_prompt(texts, device, 1, False)
            recorder = self._recorder(latents.shape[-2:], tokens, guided=lambda: False)
            with record(pipeline.unet, recorder, self.looking.layers):
                for timestep in timesteps:
                    kept = float(pipeline.scheduler.alphas_cumprod[timestep])
                    noised = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
                    pipeline.unet(noised, timestep, encoder_hidden_states=context)
        return _records(requests, located, images, recorder)

    def _locate(self, requests: Sequence[Request]) -> tuple[list[WordTokens], list[list[tuple[int, ...]]]]:
        located = [locate_words(self.pipeline.tokenizer, request.prompt) for request in requests]
        return located, [[positions for positions in found.positions if positions] for found in located]

    def _recorder(self, latent_size: Any, tokens: Any, guided: Callable[[], bool]) -> Recorder:
        rows, columns = latent_size
        return Recorder((rows, columns), tokens, guided, self.looking.cross_levels, self.looking.self_level)

    def sample(
        self, texts: list[str], seeds: list[int], tokens: Sequence[Sequence[Sequence[int]]], *, recorded: bool = True
    ) -> tuple[UInt8[np.ndarray, "b H W 3"], Recorder]:
        """Images for texts, and the recorder that looked on (``recorded=False``: it did not, for comparison)."""
        sampling, pipeline = self.sampling, self.pipeline
        factor = pipeline.vae_scale_factor
        size = (sampling.height // factor, sampling.width // factor)
        recorder = self._recorder(size, tokens, guided=lambda: bool(pipeline.do_classifier_free_guidance))
        arguments: dict[str, Any] = {
            "prompt": texts,
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "negative_prompt": [sampling.negative_prompt] * len(texts) if sampling.negative_prompt else None,
            "height": sampling.height,
            "width": sampling.width,
            "generator": [_generator(seed) for seed in seeds],
            "output_type": "np",
        }
        with torch.inference_mode():
            if recorded:
                skipped = int(self.looking.first * sampling.num_steps)
                recorder.paused = skipped > 0

                def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                    recorder.paused = step + 1 < skipped
                    return tensors

                with record(pipeline.unet, recorder, self.looking.layers):
                    values = pipeline(**arguments, callback_on_step_end=after_step).images
            else:
                values = pipeline(**arguments).images
        if not np.isfinite(values).all():
            raise SynthgenError("an image came out with values that are no numbers; try dtype float32 or another seed")
        return (values * 255).round().astype(np.uint8), recorder


def _generator(seed: int) -> torch.Generator:
    """The source of an image's noise: on the CPU, whatever the device."""
    return torch.Generator("cpu").manual_seed(seed)


def _records(
    requests: Sequence[Request], located: Sequence[WordTokens], images: UInt8[np.ndarray, "b H W 3"], recorder: Recorder
) -> list[Generation]:
    """Images and maps, without the words that the tokenizer cut off."""
    generations = []
    everything = zip(requests, located, images, recorder.weights(), recorder.affinity(), strict=True)
    for request, found, image, weights, affinity in everything:
        kept = [number for number, positions in enumerate(found.positions) if positions]
        prompt = replace(
            request.prompt,
            words=tuple(request.prompt.words[number] for number in kept),
            spans=tuple(request.prompt.spans[number] for number in kept),
        )
        maps = Maps(prompt.words, weights, affinity)
        generations.append(Generation(replace(request, prompt=prompt), image, maps, found.warnings))
    return generations
