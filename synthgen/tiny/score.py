"""Figures of the model on held-out composites and on what it draws. ``benchmarks/tiny.py`` writes all of them down.

Intersection over union (IoU) compares a word's mask with the exact one. A level is a share of a word's largest
attention; one level for all words is the plainest mask there is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.nn import functional as F

from synthgen.attention.recorder import Recorder, record
from synthgen.attention.words import locate_words
from synthgen.backbones import Backbone
from synthgen.evaluators import EvalData
from synthgen.evaluators.mask_iou import MaskIoU
from synthgen.image import resize
from synthgen.prompts import sample_seed
from synthgen.records import Generation, Maps, Prompt, Request, WordMasks
from synthgen.refiners import Refiner
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.refiners.threshold import Threshold
from synthgen.stages.attend import Attend
from synthgen.stages.masks import Masks
from synthgen.tiny import WEIGHTS
from synthgen.tiny.classifier import Classifier, boxes, crop, whole
from synthgen.tiny.compositor import Composites, article

__all__ = [
    "attend",
    "attention_iou",
    "backbone",
    "classified",
    "found",
    "mask_ious",
    "photo",
    "pixels",
    "size_mb",
    "vae_psnr",
]

TIMESTEPS = (300, 500, 700)  # of the figure that training logs
LEVELS = torch.arange(0.1, 0.9, 0.02)
BATCH = 16
MASKS = Masks()  # the bounds of the stage
REFINERS: dict[str, Refiner] = {"threshold": Threshold(), "attentioncut": AttentionCut()}


def backbone(weights: Path = WEIGHTS) -> Backbone:
    """The backbone ``tiny`` as users get it, or with other weights in place of the shipped ones; at their own size."""
    from synthgen.backbones.tiny import Tiny  # here, for training wants nothing of it

    model = Tiny()
    if weights != WEIGHTS:
        model.pipeline = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None)
        model.pipeline.set_progress_bar_config(disable=True)
    side = model.pipeline.unet.config.sample_size * model.pipeline.vae_scale_factor
    model.sampling = replace(model.sampling, height=side, width=side)
    return model


def size_mb(folder: Path) -> float:
    """All files of a folder, in MB of 10⁶ bytes."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 2)


def pixels(images: Tensor) -> Tensor:
    """uint8 (b, H, W, 3) → float (b, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def vae_psnr(vae: Any, batches: Iterable[Composites]) -> float:
    """Mean over images of the autoencoder's peak signal-to-noise ratio, in dB."""
    errors = []
    for batch in batches:
        x = pixels(batch.images)
        y = vae.decode(vae.encode(x).latents).sample.clamp(-1, 1)
        errors.append(((x - y) / 2).square().mean(dim=(1, 2, 3)))
    return round(float(-10 * torch.cat(errors).log10().mean()), 2)


# -- what it draws


def photo(*names: str) -> Prompt:
    """Ask for a photo of one thing, or of several: "a photo of a X and a Y", its words marked."""
    text, spans = "a photo of ", list[tuple[int, int]]()
    for name in names:
        text += f"{' and ' if spans else ''}{article(name)}"
        spans.append((len(text) - len(name), len(text)))
    return Prompt(text, names, tuple(spans), names[0] if len(names) == 1 else None)


def classified(classifier: Classifier, images: Sequence[UInt8[np.ndarray, "H W 3"]] | Tensor) -> list[str]:
    """The name of what each whole image shows, uint8 (n, H, W, 3)."""
    stack = images if isinstance(images, Tensor) else torch.from_numpy(np.stack(images))
    return [name for part in torch.split(stack, BATCH) for name in classifier.classify(whole(part))]


def found(classifier: Classifier, generation: Generation) -> list[bool]:
    """For each word of the prompt, whether the classifier sees its object in the mask that AttentionCut gives it.

    A word whose mask the stage ``masks`` would drop is not found, nor is one that the tokenizer cut off.
    """
    masks = MASKS.keep(REFINERS["attentioncut"].refine(generation.image, generation.maps), generation.maps)
    return seen(classifier, torch.from_numpy(generation.image), masks.words, torch.from_numpy(masks.values))


def seen(classifier: Classifier, image: Tensor, words: Sequence[str], masks: Tensor) -> list[bool]:
    """For each word whether the square around its mask shows its object; image uint8 (H, W, 3), masks (words, H, W)."""
    if not len(masks):
        return []
    names = classifier.classify(crop(image.expand(len(masks), *image.shape), boxes(masks)))
    return [bool(mask.any()) and name == word for mask, name, word in zip(masks, names, words, strict=True)]


# -- where its words point


def attend(model: Backbone, batches: Iterable[Composites]) -> Iterator[tuple[Generation, WordMasks]]:
    """What the stage ``attend`` records of composites, at its default timesteps, and the exact masks."""
    row = 0
    for batch in batches:
        prompts = [Prompt(*row) for row in zip(batch.captions, batch.words, batch.spans, strict=True)]
        for start in range(0, len(prompts), BATCH):
            few = range(start, min(start + BATCH, len(prompts)))
            keys = [f"{row + i:09d}" for i in few]
            requests = [Request(key, prompts[i], sample_seed(0, key)) for key, i in zip(keys, few, strict=True)]
            images = np.stack([resize(batch.images[i].numpy(), model.size) for i in few])
            for i, generation in zip(few, model.attend(images, requests, Attend.timesteps), strict=True):
                yield generation, word_masks(batch.words[i], batch.masks[i, : len(batch.words[i])].numpy())
        row += len(prompts)


def word_masks(words: tuple[str, ...], values: Bool[np.ndarray, "words H W"]) -> WordMasks:
    return WordMasks(words, values, np.zeros(len(words), np.float32), ("",) * len(words))


def mask_ious(samples: Iterable[tuple[Generation, WordMasks]]) -> dict[str, Any]:
    """Mean IoU of masks by each method with the exact ones, of all images and of those of one, two, ... objects.

    ``level`` is one level for all words: each half of the images is judged at the one that is best on the other half;
    ``level in hindsight`` is the best on all of them. No mask is dropped; ``dropped`` is the share of AttentionCut's
    that the stage ``masks`` would drop.
    """
    predicted: dict[str, dict[str, WordMasks]] = {name: {} for name in ("level", "level in hindsight", *REFINERS)}
    truth, maps, dropped = dict[str, WordMasks](), dict[str, Tensor](), list[bool]()
    for generation, exact in samples:
        key = generation.request.key
        truth[key], maps[key] = exact, enlarged(generation.maps, exact)
        for name, refiner in REFINERS.items():
            predicted[name][key] = word_masks(generation.maps.words, refiner.refine(generation.image, generation.maps))
        kept = MASKS.keep(predicted["attentioncut"][key].values, generation.maps)
        dropped += [bool(reason) for reason in kept.dropped]
    keys = sorted(truth)
    ious = {key: level_ious(maps[key], torch.from_numpy(truth[key].values)) for key in keys}
    halves = keys[::2], keys[1::2]
    levels = [best_level([ious[key] for key in half]) for half in (*reversed(halves), keys)]
    for name, part, level in zip(("level", "level", "level in hindsight"), (*halves, keys), levels, strict=True):
        for key in part:
            inside = shares(maps[key]) >= level
            predicted[name][key] = word_masks(truth[key].words, inside.numpy())
    counts = sorted({len(masks.words) for masks in truth.values()})
    figures: dict[str, Any] = {"images": len(keys), "timesteps": list(Attend.timesteps), "mean_iou": {}}
    for name, masks in predicted.items():
        rows = {"all": evaluated(masks, truth)}
        for count in counts:
            some = {key: exact for key, exact in truth.items() if len(exact.words) == count}
            rows[str(count)] = evaluated(masks, some)
        figures["mean_iou"][name] = rows
    figures["levels"] = {"halves": levels[:2], "in hindsight": levels[2]}
    figures["dropped"] = round(sum(dropped) / max(len(dropped), 1), 4)
    return figures


def evaluated(predicted: dict[str, WordMasks], truth: dict[str, WordMasks]) -> dict[str, float]:
    """What the evaluator ``mask_iou`` says, rounded."""
    return {name: round(value, 4) for name, value in MaskIoU().evaluate(EvalData(None, None, predicted, truth)).items()}


def enlarged(maps: Maps, exact: WordMasks) -> Tensor:
    """The words' cross-attention at the size of the exact masks, (words, H, W); 0 for words that were cut off."""
    large = torch.zeros(exact.values.shape)
    for word, weights in zip(maps.words, torch.from_numpy(maps.weights).float(), strict=True):
        size = exact.values.shape[1:]
        fine = F.interpolate(weights[None, None], size, mode="bilinear", align_corners=False)
        large[exact.words.index(word)] = fine[0, 0]
    return large


def shares(maps: Tensor) -> Tensor:
    """Maps (n, H, W) in shares of each one's maximum."""
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)


def level_ious(maps: Tensor, masks: Tensor) -> Tensor:
    """The IoU of each mask with its map at each of LEVELS; both (n, H, W) → (levels, n)."""
    share, ious = shares(maps), []
    for level in LEVELS:
        inside = share >= level
        union = (inside | masks).sum(dim=(1, 2)).clamp(min=1)
        ious.append((inside & masks).sum(dim=(1, 2)) / union)
    return torch.stack(ious)


def best_level(ious: Sequence[Tensor]) -> float:
    """Of LEVELS the one with the best mean of all columns of ``ious``, (levels, n) each."""
    return round(float(LEVELS[torch.cat(list(ious), dim=1).mean(dim=1).argmax()]), 2)


# -- what training logs


def attention_iou(pipeline: StableDiffusionPipeline, batches: Iterable[Composites]) -> dict[str, float]:
    """Mean IoU at the best level of all words, in hindsight, apart for images of one, two and three objects."""
    ious: dict[int, list[Tensor]] = {}
    for batch in batches:
        for i, maps in enumerate(attention_maps(pipeline, batch)):
            ious.setdefault(len(maps), []).append(level_ious(maps, batch.masks[i, : len(maps)]))
    figures = {}
    for count in sorted(ious):
        mean = torch.cat(ious[count], dim=1).mean(dim=1)
        figures[f"attention_iou_{count}"] = round(float(mean.max()), 3)
        figures[f"attention_level_{count}"] = best_level(ious[count])
    return figures


@torch.no_grad()
def attention_maps(pipeline: StableDiffusionPipeline, batch: Composites) -> list[Tensor]:
    """The words' cross-attention, (words, H, W) an image: mean over heads, layers on the latent grid and TIMESTEPS."""
    latents = pipeline.vae.encode(pixels(batch.images)).latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    tokens = pipeline.tokenizer(list(batch.captions), padding="max_length", truncation=True, return_tensors="pt")
    context = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    prompts = [Prompt(*row) for row in zip(batch.captions, batch.words, batch.spans, strict=True)]
    places = [locate_words(pipeline.tokenizer, prompt).positions for prompt in prompts]
    grid = (latents.shape[2], latents.shape[3])
    with record(pipeline.unet, Recorder(grid, places, uses_cfg=lambda: False, cross_levels=(1,))) as recorder:
        for t in TIMESTEPS:
            alpha = pipeline.scheduler.alphas_cumprod[t]
            pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, context)
    maps = [torch.from_numpy(weights).float()[None] for weights in recorder.weights()]
    return [F.interpolate(one, batch.masks.shape[2:], mode="bilinear", align_corners=False)[0] for one in maps]
