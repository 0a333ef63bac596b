"""Any text-to-image model of ``diffusers`` whose family synthgen knows, by short name, folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8

from synthgen.diffusion import FAMILIES, DType, Loading, Sampling, load_pipeline, pipeline_class, refuse_negative
from synthgen.errors import ConfigError
from synthgen.records import Generation, Request

__all__ = ["Diffusers"]


class Diffusers:
    """Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1, and their distilled forms.

    The family follows from the class that the model's ``model_index.json`` names. What is left open (None or empty) is
    what is usual for the family; ``docs/models.md`` has the table. Weights are loaded from safetensors only.
    """

    licence: ClassVar = (
        "The images are the output of a model: the licence of that model, and what it says of its outputs, holds for "
        "them. Read it before you publish or sell what is made from them."
    )

    def __init__(
        self,
        *,
        model: str = "sd15",  # short name, folder or hub id
        num_steps: int | None = None,  # of denoising; None: what is usual for the family
        guidance_scale: float | None = None,  # 1 is none; None: what is usual for the family
        negative_prompt: str = "",  # what the images should not show
        height: int | None = None,  # pixels; None: what the model was trained at
        width: int | None = None,  # as height
        dtype: DType = "float32",  # of the weights and of what is computed
        variant: str = "",  # of the weights' files, such as "fp16"
        scheduler: str = "",  # a class of diffusers instead of the model's own, such as DPMSolverMultistepScheduler
        lora: str = "",  # folder, file or hub id of LoRA weights
        textual_inversion: str = "",  # file or hub id of learned embeddings
        without: tuple[str, ...] = (),  # parts that are not loaded, such as text_encoder_3 and tokenizer_3
        safety_checker: bool = False,  # ask the model's own about each image; its verdict is a warning of the sample
        offload: bool = False,  # keep on the GPU only the part that computes: slower, for large models on small GPUs
        layers: tuple[str, ...] = (),  # beginnings of the names of the attention layers that are recorded
        skip_steps: float | None = None,  # the share of the steps, the noisiest ones, that are not recorded
        device: str = "cpu",
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        if skip_steps is not None and not 0 <= skip_steps < 1:
            raise ValueError(f"skip_steps must be in [0, 1), not {skip_steps}")
        if negative_prompt:
            refuse_negative(pipeline_class(model))
        loading = Loading(
            model, dtype, variant, scheduler, lora, textual_inversion, without, safety_checker, offload, device
        )
        pipeline = load_pipeline(loading, FAMILIES)
        family = FAMILIES[type(pipeline).__name__]
        native, multiple = family.native_size(pipeline), 2 * pipeline.vae_scale_factor
        height, width = height or native, width or native
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple} pixels, not {height} x {width}")
        sampling = Sampling(
            family.num_steps if num_steps is None else num_steps,
            family.guidance_scale if guidance_scale is None else guidance_scale,
            negative_prompt,
            height,
            width,
        )
        if negative_prompt and sampling.guidance_scale <= 1:
            raise ConfigError(
                f"a negative prompt has no effect without guidance (guidance_scale {sampling.guidance_scale:g}); "
                "leave it empty, or raise guidance_scale above 1"
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
        """Sides of images that exist are multiples of so many pixels."""
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
        """The same record for images that exist."""
        return self.family.attend(images, requests, timesteps, inversion_steps)
