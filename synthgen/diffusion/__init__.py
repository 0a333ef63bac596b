"""Diffusion pipelines of ``diffusers``: loading them, generating with them, and recording their attention."""

from synthgen.diffusion.backbone import AttentionSelection, DiffusionBackbone, Sampling, one_thread
from synthgen.diffusion.families import (
    FAMILIES,
    Flux,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    refuse_negative,
)
from synthgen.diffusion.loading import SHORT_NAMES, DType, Loading, load_pipeline, pipeline_class

__all__ = [
    "FAMILIES",
    "SHORT_NAMES",
    "AttentionSelection",
    "DType",
    "DiffusionBackbone",
    "Flux",
    "Loading",
    "Sampling",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "load_pipeline",
    "one_thread",
    "pipeline_class",
    "refuse_negative",
]
