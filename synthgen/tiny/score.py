"""Measure the shipped model for its card, on held-out composites: ``python -m synthgen.tiny.score``.

Prints JSON. Intersection over union (IoU) compares a word's cross-attention, divided by its maximum and cut at one
level for all words, with the word's exact mask; the level is the one with the best mean.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from synthgen.attention.recorder import Recorder, record
from synthgen.attention.words import locate_words
from synthgen.records import Prompt
from synthgen.tiny import DEFAULT_GUIDANCE, DEFAULT_STEPS, IMAGE_SIZE, WEIGHTS
from synthgen.tiny.compositor import Composites, article
from synthgen.tiny.truth import held_out

__all__ = ["attention_maps", "best_iou", "score"]

TIMESTEPS = (300, 500, 700)
LEVELS = torch.arange(0.1, 0.9, 0.02)


def score(data: Path, num: int, weights: Path = WEIGHTS) -> dict[str, float | int]:
    """Every figure of the model card that does not come from the training logs."""
    pipeline = StableDiffusionPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    figures: dict[str, float | int] = {
        f"parameters_{name}": sum(p.numel() for p in part.parameters()) for name, part in parts.items()
    }
    errors: list[Tensor] = []
    maps: dict[int, list[Tensor]] = {1: [], 2: []}
    truth: dict[int, list[Tensor]] = {1: [], 2: []}
    for batch in held_out(data, num):
        x = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
        errors.append(reconstruction_error(pipeline, x))
        for i, attention in enumerate(attention_maps(pipeline, batch, x)):
            maps[len(attention)].extend(attention)
            truth[len(attention)].extend(batch.masks[i, : len(attention)])
    figures["vae_psnr_db"] = round(float(-10 * torch.cat(errors).log10().mean()), 2)
    for count, name in ((1, "one"), (2, "two")):
        level, iou = best_iou(torch.stack(maps[count]), torch.stack(truth[count]))
        figures[f"attention_iou_{name}"], figures[f"attention_level_{name}"] = round(iou, 3), round(level, 2)
    figures["composites"] = num
    figures["images_per_second"] = round(speed(pipeline), 2)
    figures["threads"] = torch.get_num_threads()
    return figures


@torch.no_grad()
def reconstruction_error(pipeline: StableDiffusionPipeline, x: Tensor) -> Tensor:
    """Mean squared error of the autoencoder on images (b, 3, H, W) in [-1, 1], a number an image, white being 1."""
    y = pipeline.vae.decode(pipeline.vae.encode(x).latents).sample.clamp(-1, 1)
    error: Tensor = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    return error


@torch.no_grad()
def attention_maps(pipeline: StableDiffusionPipeline, batch: Composites, x: Tensor) -> list[Tensor]:
    """The words' cross-attention, (words, 64, 64) an image: mean over heads, layers on 16 × 16 and TIMESTEPS."""
    latents = pipeline.vae.encode(x).latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    tokens = pipeline.tokenizer(list(batch.captions), padding="max_length", truncation=True, return_tensors="pt")
    context = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    prompts = [marked(caption, words) for caption, words in zip(batch.captions, batch.words, strict=True)]
    places = [locate_words(pipeline.tokenizer, prompt).positions for prompt in prompts]
    side = latents.shape[-1]
    with record(pipeline.unet, Recorder((side, side), places, guided=lambda: False, cross_levels=(1,))) as recorder:
        for t in TIMESTEPS:
            alpha = pipeline.scheduler.alphas_cumprod[t]
            pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, context)
    large = (IMAGE_SIZE, IMAGE_SIZE)
    maps = [torch.from_numpy(weights).float()[None] for weights in recorder.weights()]
    return [F.interpolate(one, large, mode="bilinear", align_corners=False)[0] for one in maps]


def marked(caption: str, words: tuple[str, ...]) -> Prompt:
    """A caption as a prompt whose words are marked; they stand in it in their order, each after its article."""
    spans, end = [], 0
    for word in words:
        start = caption.index(article(word), end) + len(article(word)) - len(word)
        end = start + len(word)
        spans.append((start, end))
    return Prompt(caption, words, tuple(spans))


def best_iou(maps: Tensor, masks: Tensor) -> tuple[float, float]:
    """The level with the best mean IoU between ``maps >= level * max`` and ``masks``, both (n, H, W), and that mean."""
    share = maps / maps.amax(dim=(1, 2), keepdim=True)
    means = []
    for level in LEVELS:
        inside = share >= level
        union = (inside | masks).sum(dim=(1, 2)).clamp(min=1)
        means.append(float(((inside & masks).sum(dim=(1, 2)) / union).mean()))
    best = max(range(len(means)), key=means.__getitem__)
    return float(LEVELS[best]), means[best]


def speed(pipeline: StableDiffusionPipeline, num: int = 16) -> float:
    """Images a second at the default settings, in batches of ``num``, after one batch to warm up."""
    prompts = ["a photo of a dog"] * num
    pipeline(prompts, num_inference_steps=2, guidance_scale=DEFAULT_GUIDANCE, output_type="np")
    start = time.perf_counter()
    pipeline(prompts, num_inference_steps=DEFAULT_STEPS, guidance_scale=DEFAULT_GUIDANCE, output_type="np")
    return num / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--num", type=int, default=512, help="how many held-out composites")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another pipeline to measure")
    args = parser.parse_args()
    print(json.dumps(score(args.data, args.num, args.weights), indent=2))


if __name__ == "__main__":
    main()
