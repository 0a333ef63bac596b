"""Draw the 64 prompts of the model card as one unselected contact sheet: ``python -m synthgen.tiny.sheet``."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from synthgen.tiny import DEFAULT_GUIDANCE, DEFAULT_STEPS, WEIGHTS

__all__ = ["PROMPTS", "draw", "write_sheet"]

PROMPTS = tuple(
    f"a photo of {text}"
    for text in (
        *("a dog", "a cat", "a panda", "a penguin", "a car", "an apple", "a pizza", "a guitar"),
        *("a horse", "an elephant", "an owl", "a fish", "a butterfly", "a flower", "a mushroom", "a house"),
        *("a golden retriever", "a tabby cat", "a minivan", "a pirate ship"),
        *("a school bus", "a backpack", "an umbrella", "a teapot"),
        *("a tiger shark", "a goldfish", "a barn spider", "a monarch butterfly"),
        *("an acoustic guitar", "a sports car", "a rocking chair", "a laptop computer"),
        *("a horse in the forest", "a rocket at night", "a bus in the city", "a butterfly in the park"),
        *("a chair in the studio", "a whale at sunset", "a flamingo in venice", "a tractor at sunrise"),
        *("a computer in the lab", "a clock in the warehouse", "a balloon in the sky", "a shoe in the workshop"),
        *("a tent at dawn", "a cactus in the lobby", "a drum in the hall", "a lamp in the apartment"),
        *("a cat and a car", "a dog and a bicycle in the park", "a lion and a castle", "an elephant and a balloon"),
        *("a frog and a banana in the lab", "a rabbit and a drum", "a sailboat and a tree", "a crab and a clock"),
        *("a taxi next to a traffic light", "a panda next to a book", "a bear and a fish at night"),
        *("a cup and a cake", "a crown and a trophy", "a pig and a bucket", "a zebra and a lion in the forest"),
        "a ship and a lighthouse",
    )
)


def draw(pipeline: StableDiffusionPipeline, prompts: tuple[str, ...], steps: int, guidance: float, seed: int) -> Tensor:
    """Images (b, 3, H, W) in [0, 1] of the prompts, in batches of 16."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "pt"}
    return torch.cat([pipeline(list(prompts[i : i + 16]), **options).images for i in range(0, len(prompts), 16)])


def write_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Write images (b, 3, H, W) in [0, 1] as one PNG, row by row."""
    table = images.reshape(-1, columns, *images.shape[1:]).permute(0, 3, 1, 4, 2)  # r H c W 3
    pixels = (table.flatten(0, 1).flatten(1, 2).clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.sheet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another pipeline to draw with")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.weights)
    write_sheet(args.out, draw(pipeline, PROMPTS, args.steps, args.guidance, args.seed), columns=8)


if __name__ == "__main__":
    main()
