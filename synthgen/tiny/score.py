"""Metrics of the model on held-out composites and on generated images; ``benchmarks/tiny.py`` reports all of them.

The intersection over union (IoU) compares a word's mask with the exact one. A level is a threshold on a word's
attention, as a share of its maximum; one level for all words gives the simplest masks there are.
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
from synthgen.tiny.compositor import Composites, article, preprocess

__all__ = [
    "attend",
    "attention_iou",
    "backbone",
    "check_masks",
    "classify",
    "find_words",
    "mask_ious",
    "photo_prompt",
    "psnr",
    "reconstruct",
    "size_mb",
    "vae_psnr",
]

TIMESTEPS = (300, 500, 700)  # of ``attention_iou``
LEVELS = torch.arange(0.1, 0.9, 0.02)
BATCH_SIZE = 16
MASKS = Masks()  # its limits decide which masks are dropped
REFINERS: dict[str, Refiner] = {"threshold": Threshold(), "attentioncut": AttentionCut()}


def backbone(weights: Path = WEIGHTS) -> Backbone:
    """The backbone ``tiny`` with its defaults, with the pipeline in the folder ``weights``, at that model's size."""
    from synthgen.backbones.tiny import Tiny  # here, because training does not need it

    model = Tiny()
    if weights != WEIGHTS:
        model.pipeline = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None)
        model.pipeline.set_progress_bar_config(disable=True)
    side = model.pipeline.unet.config.sample_size * model.pipeline.vae_scale_factor
    model.sampling = replace(model.sampling, height=side, width=side)
    return model


def size_mb(folder: Path) -> float:
    """The size of all files in a folder, in MB of 10⁶ bytes."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 2)


# -- the autoencoder


@torch.no_grad()
def reconstruct(vae: Any, x: Tensor) -> Tensor:
    """Encode and decode images (b, 3, H, W) in [-1, 1]."""
    return torch.cat([vae.decode(vae.encode(part).latents).sample for part in torch.split(x, 64)]).clamp(-1, 1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image, (b,) in dB; images in [-1, 1]."""
    return -10 * ((x - y) / 2).square().mean(dim=(1, 2, 3)).log10()


def vae_psnr(vae: Any, batches: Iterable[Composites]) -> float:
    """The mean PSNR of an autoencoder over images, in dB."""
    images = (preprocess(batch.images) for batch in batches)
    return round(float(torch.cat([psnr(x, reconstruct(vae, x)) for x in images]).mean()), 2)


# -- generated images


def photo_prompt(*names: str) -> Prompt:
    """The prompt "a photo of a X", or "a photo of a X and a Y", with its words marked."""
    text, spans = "a photo of ", list[tuple[int, int]]()
    for name in names:
        text += f"{' and ' if spans else ''}{article(name)}"
        spans.append((len(text) - len(name), len(text)))
    return Prompt(text, names, tuple(spans), names[0] if len(names) == 1 else None)


def classify(classifier: Classifier, images: Sequence[UInt8[np.ndarray, "H W 3"]] | Tensor) -> list[str]:
    """The name of the object in each whole image, uint8 (n, H, W, 3)."""
    stack = images if isinstance(images, Tensor) else torch.from_numpy(np.stack(images))
    return [name for part in torch.split(stack, BATCH_SIZE) for name in classifier.classify(whole(part))]


def find_words(classifier: Classifier, generation: Generation) -> list[bool]:
    """For each recorded word, whether its AttentionCut mask covers its object, by :func:`check_masks`.

    A mask that the stage ``masks`` would drop counts as wrong.
    """
    masks = MASKS.keep(REFINERS["attentioncut"].refine(generation.image, generation.maps), generation.maps)
    return check_masks(classifier, torch.from_numpy(generation.image), masks.words, torch.from_numpy(masks.values))


def check_masks(classifier: Classifier, image: Tensor, words: Sequence[str], masks: Tensor) -> list[bool]:
    """For each word, whether the classifier sees its object in the crop around its mask.

    The image is uint8 (H, W, 3), the masks are bool (words, H, W); an empty mask counts as wrong.
    """
    if not len(masks):
        return []
    names = classifier.classify(crop(image.expand(len(masks), *image.shape), boxes(masks)))
    return [bool(mask.any()) and name == word for mask, name, word in zip(masks, names, words, strict=True)]


# -- masks of held-out composites


def attend(model: Backbone, batches: Iterable[Composites]) -> Iterator[tuple[Generation, WordMasks]]:
    """Record composites as the stage ``attend`` does, at its default timesteps; yields them with their exact masks."""
    row = 0
    for batch in batches:
        prompts = prompts_of(batch)
        for start in range(0, len(prompts), BATCH_SIZE):
            rows = range(start, min(start + BATCH_SIZE, len(prompts)))
            keys = [f"{row + i:09d}" for i in rows]
            requests = [Request(key, prompts[i], sample_seed(0, key)) for key, i in zip(keys, rows, strict=True)]
            images = np.stack([resize(batch.images[i].numpy(), model.size) for i in rows])
            for i, generation in zip(rows, model.attend(images, requests, Attend.timesteps), strict=True):
                yield generation, word_masks(batch.words[i], batch.masks[i, : len(batch.words[i])].numpy())
        row += len(prompts)


def prompts_of(batch: Composites) -> list[Prompt]:
    return [Prompt(*row) for row in zip(batch.captions, batch.words, batch.spans, strict=True)]


def word_masks(words: tuple[str, ...], values: Bool[np.ndarray, "words H W"]) -> WordMasks:
    return WordMasks(words, values, np.zeros(len(words), np.float32), ("",) * len(words))


def mask_ious(samples: Iterable[tuple[Generation, WordMasks]]) -> dict[str, Any]:
    """The mean IoU of masks by each method, over all images and by their number of objects.

    ``level`` is one level for all words: on each half of the images, the best level of the other half; ``level in
    hindsight`` is the best level of all images. No mask is dropped; ``dropped`` is the share of AttentionCut's masks
    that the stage ``masks`` would drop.
    """
    predicted: dict[str, dict[str, WordMasks]] = {name: {} for name in ("level", "level in hindsight", *REFINERS)}
    truth, maps, dropped = dict[str, WordMasks](), dict[str, Tensor](), list[bool]()
    for generation, exact in samples:
        key = generation.request.key
        truth[key], maps[key] = exact, upsample(generation.maps, exact)
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
            predicted[name][key] = word_masks(truth[key].words, (relative(maps[key]) >= level).numpy())
    counts = sorted({len(masks.words) for masks in truth.values()})
    mean_iou: dict[str, dict[str, dict[str, float]]] = {}
    for name, masks in predicted.items():
        mean_iou[name] = {"all": evaluate(masks, truth)}
        for count in counts:
            subset = {key: exact for key, exact in truth.items() if len(exact.words) == count}
            mean_iou[name][str(count)] = evaluate(masks, subset)
    return {
        "images": len(keys),
        "timesteps": list(Attend.timesteps),
        "mean_iou": mean_iou,
        "levels": {"halves": levels[:2], "in hindsight": levels[2]},
        "dropped": round(sum(dropped) / max(len(dropped), 1), 4),
    }


def evaluate(predicted: dict[str, WordMasks], truth: dict[str, WordMasks]) -> dict[str, float]:
    """The scores of the evaluator ``mask_iou``, rounded."""
    return {name: round(value, 4) for name, value in MaskIoU().evaluate(EvalData(None, None, predicted, truth)).items()}


def upsample(maps: Maps, exact: WordMasks) -> Tensor:
    """The cross-attention maps at the size of the exact masks, (words, H, W); 0 for words that were not recorded."""
    large = torch.zeros(exact.values.shape)
    for word, weights in zip(maps.words, torch.from_numpy(maps.weights).float(), strict=True):
        size = exact.values.shape[1:]
        fine = F.interpolate(weights[None, None], size, mode="bilinear", align_corners=False)
        large[exact.words.index(word)] = fine[0, 0]
    return large


def relative(maps: Tensor) -> Tensor:
    """Maps (n, H, W), each relative to its maximum."""
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)


def level_ious(maps: Tensor, masks: Tensor) -> Tensor:
    """The IoU of each mask with its map at each of LEVELS; both (n, H, W) → (levels, n)."""
    shares, ious = relative(maps), []
    for level in LEVELS:
        inside = shares >= level
        union = (inside | masks).sum(dim=(1, 2)).clamp(min=1)
        ious.append((inside & masks).sum(dim=(1, 2)) / union)
    return torch.stack(ious)


def best_level(ious: Sequence[Tensor]) -> float:
    """The one of LEVELS with the best mean over all columns of ``ious``, (levels, n) each."""
    return round(float(LEVELS[torch.cat(list(ious), dim=1).mean(dim=1).argmax()]), 2)


# -- metrics that training logs


def attention_iou(pipeline: StableDiffusionPipeline, batches: Iterable[Composites]) -> dict[str, float]:
    """The mean IoU at the best level of all words, in hindsight, by the number of objects in the image."""
    ious: dict[int, list[Tensor]] = {}
    for batch in batches:
        for i, maps in enumerate(attention_maps(pipeline, batch)):
            ious.setdefault(len(maps), []).append(level_ious(maps, batch.masks[i, : len(maps)]))
    metrics = {}
    for count in sorted(ious):
        mean = torch.cat(ious[count], dim=1).mean(dim=1)
        metrics[f"attention_iou_{count}"] = round(float(mean.max()), 3)
        metrics[f"attention_level_{count}"] = best_level(ious[count])
    return metrics


@torch.no_grad()
def attention_maps(pipeline: StableDiffusionPipeline, batch: Composites) -> list[Tensor]:
    """The cross-attention of each image's words, (words, H, W): mean over heads, finest layers and TIMESTEPS."""
    latents = pipeline.vae.encode(preprocess(batch.images)).latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    tokens = pipeline.tokenizer(list(batch.captions), padding="max_length", truncation=True, return_tensors="pt")
    context = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    positions = [locate_words(pipeline.tokenizer, prompt).positions for prompt in prompts_of(batch)]
    grid = (latents.shape[2], latents.shape[3])
    with record(pipeline.unet, Recorder(grid, positions, uses_cfg=lambda: False, cross_levels=(1,))) as recorder:
        for t in TIMESTEPS:
            alpha = pipeline.scheduler.alphas_cumprod[t]
            pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, context)
    maps = [torch.from_numpy(weights).float()[None] for weights in recorder.weights()]
    return [F.interpolate(one, batch.masks.shape[2:], mode="bilinear", align_corners=False)[0] for one in maps]
