"""The shipped model: Stable Diffusion in miniature, its recipe and its weights (see README.md in this folder)."""

from pathlib import Path

__all__ = ["DEFAULT_GUIDANCE", "DEFAULT_STEPS", "IMAGE_SIZE", "WEIGHTS"]

WEIGHTS: Path = Path(__file__).parent / "weights"  # a folder for diffusers.StableDiffusionPipeline.from_pretrained
DEFAULT_STEPS: int = 12
DEFAULT_GUIDANCE: float = 3.0
IMAGE_SIZE: int = 128  # pixels a side
