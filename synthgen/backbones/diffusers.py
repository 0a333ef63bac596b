"""Any text-to-image model of ``diffusers`` whose family synthgen knows, by short name, folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8

from synthgen.diffusion import FAMILIES, DType, Loading, Sampling, load_pipeline, pipeline_class, refuse_negative
from synthgen.records import Generation, Request

__all__ = ["Diffusers"]


class Diffusers:
    """Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1, and their distilled forms.

    The family follows from the class that the model's ``model_index.json`` names. Settings left at None or empty take
    the family's defaults; see the table in ``docs/models.md``. Weights are loaded from safetensors only.
    """

    licence: ClassVar = (
        "The images are the output of a model: the licence of that model, and what it says of its outputs, holds for "
        "them. Read it before you publish or sell what is made from them."
    )

    def __init__(
        self,
        *,
        model: str = "sd15",  # short name, folder or hub id
        num_steps: int | None = None,  # denoising steps; None: the family's default
        guidance_scale: float | None = None,  # 1: no guidance; None: the family's default
        negative_prompt: str = "",  # what the images should not show
        height: int | None = None,  # pixels; None: what the model was trained at
        width: int | None = None,  # as height
        dtype: DType = "float32",  # number format of the weights and of the computation
        variant: str = "",  # variant of the weight files, such as "fp16"
        scheduler: str = "",  # a class of diffusers instead of the model's own, such as DPMSolverMultistepScheduler
        lora: str = "",  # folder, file or hub id of LoRA weights
        lora_scale: float = 1.0,  # strength of the LoRA weights; 0: none
        textual_inversion: str = "",  # file or hub id of learned embeddings
        without: tuple[str, ...] = (),  # parts not to load, such as text_encoder_3 and tokenizer_3
        safety_checker: bool = False,  # run the model's own on each image; a flagged sample gets a warning
        offload: bool = False,  # keep on the GPU only the part that computes: slower, for large models on small GPUs
        layers: tuple[str, ...] = (),  # name prefixes of the attention layers to record
        skip_steps: float | None = None,  # share of the steps, the noisiest ones, to leave unrecorded
        device: str = "cpu",
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        if skip_steps is not None and not 0 <= skip_steps < 1:
            raise ValueError(f"skip_steps must be in [0, 1), not {skip_steps}")
        if lora_scale != 1 and not lora:
            raise ValueError("lora_scale is the strength of LoRA weights, and there are none; set lora as well")
        if negative_prompt:
            refuse_negative(pipeline_class(model))
        loading = Loading(
            model=model,
            dtype=dtype,
            variant=variant,
            scheduler=scheduler,
            lora=lora,
            lora_scale=lora_scale,
            textual_inversion=textual_inversion,
            without=without,
            safety_checker=safety_checker,
            offload=offload,
            device=device,
        )
        pipeline = load_pipeline(loading, FAMILIES)
        family = FAMILIES[type(pipeline).__name__]
        native, multiple = family.native_size(pipeline), 2 * pipeline.vae_scale_factor
        height, width = height or native, width or native
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(
                f"height and width must be positive multiples of {multiple} pixels, not {height} x {width}"
            )
        sampling = Sampling(
            family.num_steps if num_steps is None else num_steps,
            family.guidance_scale if guidance_scale is None else guidance_scale,
            negative_prompt,
            height,
            width,
        )
        selection = family.default_selection
        if skip_steps is not None:
            selection = replace(selection, skip_steps=skip_steps)
        self.family = family(pipeline, sampling, selection)
        if layers:
            self.family.select_layers(layers)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        return self.family.size

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of existing images must be multiples."""
        return self.family.multiple

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One image with its maps for each request."""
        return self.family.generate(requests)

    def attend(
        self,
        images: UInt8[np.ndarray, "b H W 3"],
        requests: Sequence[Request],
        timesteps: Sequence[int],
        inversion_steps: int = 0,
    ) -> list[Generation]:
        """Record attention for existing images; see :meth:`~synthgen.diffusion.DiffusionBackbone.attend`."""
        return self.family.attend(images, requests, timesteps, inversion_steps)
