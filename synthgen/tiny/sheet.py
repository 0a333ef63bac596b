"""Make the contact sheets of the model card, unselected: ``python -m synthgen.tiny.sheet``.

A sheet shows one image per prompt of PROMPTS or, with ``--run``, the first images of a run beside their masks.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from synthgen import api
from synthgen.run import Run
from synthgen.tiny import DEFAULT_GUIDANCE, DEFAULT_STEPS, WEIGHTS

__all__ = ["PROMPTS", "generate", "overlay", "pairs_of_run", "write_sheet"]

PROMPTS = tuple(
    f"a photo of {text}"
    for text in (
        *("a dog", "a cat", "a panda", "a penguin", "a car", "an apple", "a pizza", "a guitar"),
        *("a horse", "an elephant", "an owl", "a fish", "a butterfly", "a flower", "a mushroom", "a house"),
        *("a golden retriever", "a tabby cat", "a minivan", "a pirate ship"),
        *("a school bus", "a backpack", "an umbrella", "a teapot"),
        *("a tiger shark", "a goldfish", "a barn spider", "a monarch butterfly"),
        *("an acoustic guitar", "a sports car", "a rocking chair", "a laptop computer"),
        *("a red car", "a blue car", "a green hat", "a purple chair"),
        *("a yellow umbrella", "a black boot", "a white backpack", "an orange bus"),
        *("a horse in the forest", "a rocket at night", "a bus in the city", "a butterfly in the park"),
        *("a chair in the studio", "a whale at sunset", "a flamingo in venice", "a tractor at sunrise"),
        *("a cat and a car", "a dog and a bicycle in the park", "a lion and a castle", "an elephant and a balloon"),
        *("a frog and a banana in the lab", "a rabbit and a drum", "a sailboat and a tree", "a crab and a clock"),
        *("a taxi next to a traffic light", "a panda to the left of a book", "an owl above a pumpkin"),
        *("a rocket below a star", "a dog in front of a house", "a bed behind a cat", "a zebra next to a blue car"),
        "an apple, a banana and a pear",
    )
)
COLOURS = ((255, 64, 64), (64, 160, 255), (255, 208, 0), (64, 208, 96), (208, 96, 255))  # of words in order, RGB


def generate(
    pipeline: StableDiffusionPipeline, prompts: tuple[str, ...], steps: int, guidance: float, seed: int
) -> Tensor:
    """Generate one image per prompt, in batches of 16: (b, 3, H, W) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "pt"}
    return torch.cat([pipeline(list(prompts[i : i + 16]), **options).images for i in range(0, len(prompts), 16)])


def pairs_of_run(run: Run, num: int) -> Tensor:
    """The first ``num`` images of a run, each followed by its :func:`overlay`: (2 num, 3, H, W) in [0, 1]."""
    tiles = []
    for generation, masks in itertools.islice(api.samples(run), num):
        values = masks.values if masks is not None else np.zeros((0, *generation.image.shape[:2]), bool)
        tiles += [generation.image, overlay(generation.image, values)]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255


def overlay(image: UInt8[np.ndarray, "H W 3"], masks: Bool[np.ndarray, "words H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """The image with each mask tinted and outlined in the colour of its word, and the rest darkened."""
    out = image * np.where(masks.any(axis=0), 1.0, 0.35)[..., None]
    for mask, colour in zip(masks, itertools.cycle(COLOURS), strict=False):
        out[mask] = 0.55 * out[mask] + 0.45 * np.array(colour)
        out[mask & ~binary_erosion(mask)] = colour
    return np.asarray(out.round(), dtype=np.uint8)


def write_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Write images (b, 3, H, W) in [0, 1] as one PNG, row by row."""
    rows = images.reshape(-1, columns, *images.shape[1:]).permute(0, 3, 1, 4, 2)  # r H c W 3
    pixels = (rows.flatten(0, 1).flatten(1, 2).clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.sheet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--run", type=Path, help="show the first images of this run beside their masks")
    parser.add_argument("--num", type=int, default=32, help="number of these images; a multiple of 4")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a pipeline; default: the shipped one")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.run is not None:
        write_sheet(args.out, pairs_of_run(Run.open(args.run), args.num), columns=8)
        return
    pipeline = StableDiffusionPipeline.from_pretrained(args.weights)
    write_sheet(args.out, generate(pipeline, PROMPTS, args.steps, args.guidance, args.seed), columns=8)


if __name__ == "__main__":
    main()
