"""The shipped model: Stable Diffusion in miniature, trained on rendered objects. No download, no GPU."""

from __future__ import annotations

from typing import ClassVar

from synthgen import tiny
from synthgen.diffusion import AttentionSelection, Loading, Sampling, StableDiffusion, load_pipeline

__all__ = ["Tiny"]


class Tiny(StableDiffusion):
    """128 x 128 images of the objects and scenes that its model card lists (``synthgen/tiny/README.md``).

    Attention is read on 16 x 16, in the last block of the U-Net and in the later steps, where composites of a tuning
    split showed that its words point best.
    """

    licence: ClassVar = "The shipped model is Apache-2.0, and so are its images."

    def __init__(
        self,
        *,
        num_steps: int = tiny.DEFAULT_STEPS,  # denoising steps
        guidance_scale: float = tiny.DEFAULT_GUIDANCE,  # 1: no guidance
        negative_prompt: str = "",  # what the images should not show
        device: str = "cpu",
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        pipeline = load_pipeline(Loading(str(tiny.WEIGHTS), device=device), ["StableDiffusionPipeline"])
        side = self.native_size(pipeline)
        sampling = Sampling(num_steps, guidance_scale, negative_prompt, side, side)
        selection = AttentionSelection(cross_levels=(1,), self_level=1, layers=("up_blocks.2.",), skip_steps=0.6)
        super().__init__(pipeline, sampling, selection)
