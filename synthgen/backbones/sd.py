"""Stable Diffusion 1.x and 2.x, by hub id or folder."""

from __future__ import annotations

from typing import ClassVar

from synthgen.diffusion import DType, Looking, Sampling, UNetPipeline, load_pipeline

__all__ = ["StableDiffusion"]


class StableDiffusion(UNetPipeline):
    """Any pipeline that ``StableDiffusionPipeline.from_pretrained`` loads from safetensors.

    Attention is read on the grids of half and quarter of the latent (32 x 32 and 16 x 16 at 512 px), self-attention on
    the half: the finest cross-attention is noisy, and its self-attention large. That is our choice; see
    ``docs/masks.md``.
    """

    licence: ClassVar = (
        "The images are the output of a model: the licence of that model, and what it says of its outputs, holds for "
        "them. Read it before you publish or sell what is made from them."
    )

    def __init__(
        self,
        *,
        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        num_steps: int = 30,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        height: int = 0,  # pixels; 0: what the model was trained at
        width: int = 0,
        dtype: DType = "float32",
        device: str = "cpu",
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        pipeline = load_pipeline(model, dtype=dtype, device=device)
        factor = pipeline.vae_scale_factor
        native = pipeline.unet.config.sample_size * factor
        height, width = height or native, width or native
        if height % (2 * factor) or width % (2 * factor):
            raise ValueError(f"height and width must be multiples of {2 * factor} pixels, not {height} x {width}")
        sampling = Sampling(num_steps, guidance_scale, negative_prompt, height, width)
        super().__init__(pipeline, sampling, Looking(cross_levels=(2, 4), self_level=2))
