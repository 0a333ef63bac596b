"""Generate with a U-Net pipeline of ``diffusers`` and record its attention. The backbones of that kind share it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from synthgen.attention.recorder import Recorder, record
from synthgen.attention.words import locate_words
from synthgen.errors import ConfigError, MissingWeights, SynthgenError
from synthgen.records import Generation, Maps, Request

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which is where its notes begin

__all__ = ["DTYPES", "Sampling", "UNetPipeline", "load_pipeline"]

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


@dataclass(frozen=True)
class Sampling:
    """How one image is drawn."""

    num_steps: int
    guidance_scale: float  # 1 is none: the unconditional half is not computed
    negative_prompt: str
    height: int  # pixels
    width: int


class UNetPipeline:
    """Generate from requests with a loaded pipeline.

    Args:
        pipeline: a ``StableDiffusionPipeline`` on its device.
        sampling: steps, guidance and size.
        cross_levels, self_level: which grids are recorded, see :class:`Recorder`.
    """

    def __init__(self, pipeline: Any, sampling: Sampling, *, cross_levels: tuple[int, ...], self_level: int) -> None:
        self.pipeline, self.sampling = pipeline, sampling
        self.cross_levels, self.self_level = cross_levels, self_level

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One image with its maps for each request.

        The noise of each image is drawn on the CPU from its own seed, so neither the batch it is in nor the device
        changes it. Words that the tokenizer cuts off are left out of the record, with a warning.

        Raises:
            SynthgenError: an image came out with values that are no numbers.
        """
        located = [locate_words(self.pipeline.tokenizer, request.prompt) for request in requests]
        tokens = [[positions for positions in found.positions if positions] for found in located]
        images, recorder = self.sample(
            [request.prompt.text for request in requests], [request.seed for request in requests], tokens
        )
        weights, affinity = recorder.weights(), recorder.affinity()
        generations = []
        for index, (request, found) in enumerate(zip(requests, located, strict=True)):
            kept = [number for number, positions in enumerate(found.positions) if positions]
            prompt = replace(
                request.prompt,
                words=tuple(request.prompt.words[number] for number in kept),
                spans=tuple(request.prompt.spans[number] for number in kept),
            )
            maps = Maps(prompt.words, weights[index], affinity[index])
            generations.append(Generation(replace(request, prompt=prompt), images[index], maps, found.warnings))
        return generations

    def sample(
        self, texts: list[str], seeds: list[int], tokens: Sequence[Sequence[Sequence[int]]], *, recorded: bool = True
    ) -> tuple[UInt8[np.ndarray, "b H W 3"], Recorder]:
        """Images for texts, and the recorder that looked on (``recorded=False``: it did not, for comparison)."""
        sampling, pipeline = self.sampling, self.pipeline
        factor = pipeline.vae_scale_factor
        recorder = Recorder(
            latent_size=(sampling.height // factor, sampling.width // factor),
            tokens=tokens,
            guided=lambda: bool(pipeline.do_classifier_free_guidance),
            cross_levels=self.cross_levels,
            self_level=self.self_level,
        )
        arguments: dict[str, Any] = {
            "prompt": texts,
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "negative_prompt": [sampling.negative_prompt] * len(texts) if sampling.negative_prompt else None,
            "height": sampling.height,
            "width": sampling.width,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "output_type": "np",
        }
        with torch.inference_mode():
            if recorded:
                with record(pipeline.unet, recorder):
                    values = pipeline(**arguments).images
            else:
                values = pipeline(**arguments).images
        if not np.isfinite(values).all():
            raise SynthgenError("an image came out with values that are no numbers; try dtype float32 or another seed")
        return (values * 255).round().astype(np.uint8), recorder
