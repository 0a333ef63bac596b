"""Pipelines with random weights: the networks of the published models, at full or reduced size.

The network is the real class with the published configuration. Everything else is reduced, so that its cost does not
hide that of the network: text encoders with the right output width and two layers, and an autoencoder with few
channels. The tokenizers have one token for each word of the prompts, as the published ones do, and give as many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers

__all__ = ["FULL", "PRESETS", "WORDS", "Preset", "make_network", "make_pipeline"]

WORDS = ["a", "an", "and", "cat", "dog", "grass", "in", "of", "on", "park", "photo", "the", "under", "umbrella"]
START, END = "<|startoftext|>", "<|endoftext|>"
QUERY_GAIN = 6.0  # on random query weights, whose attention would otherwise be almost uniform


@dataclass(frozen=True)
class Preset:
    """A network of a family, with the widths of its text encoders.

    Args:
        network: a class of ``diffusers``.
        config: its arguments.
        clips: the widths of the CLIP text encoders.
        t5: the width of T5; 0 if there is none.
        resolution: default side of the images in pixels.
        steps: default number of steps; None: that of the family.
    """

    network: str
    config: dict[str, Any]
    clips: tuple[int, ...]
    t5: int
    resolution: int
    steps: int | None = None


def unet(widths: tuple[int, ...], attended: tuple[bool, ...], **config: Any) -> dict[str, Any]:
    """The configuration of a U-Net; ``attended`` says which levels, finest first, have attention."""
    down = tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended)
    up = tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended))
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, **config}


def sdxl(
    widths: tuple[int, int, int], depths: tuple[int, int, int], heads: tuple[int, ...], clips: tuple[int, int]
) -> dict[str, Any]:
    """The configuration of Stable Diffusion XL's U-Net: no attention on the finest level."""
    return unet(
        widths,
        (False, True, True),
        sample_size=128,
        attention_head_dim=heads,  # diffusers reads it as the number of heads
        transformer_layers_per_block=depths,
        cross_attention_dim=sum(clips),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=clips[1] + 6 * 256,
    )


def sd3(layers: int, heads: int, clips: tuple[int, int], t5: int) -> dict[str, Any]:
    """The configuration of Stable Diffusion 3's transformer."""
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": t5,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": sum(clips),
        "pos_embed_max_size": 192,
    }


def flux(layers: tuple[int, int], heads: int, clip: int, t5: int) -> dict[str, Any]:
    """The configuration of FLUX.1 dev's transformer; ``layers`` counts its double-stream and single-stream blocks."""
    return {
        "in_channels": 64,
        "num_layers": layers[0],
        "num_single_layers": layers[1],
        "attention_head_dim": 128,
        "num_attention_heads": heads,
        "joint_attention_dim": t5,
        "pooled_projection_dim": clip,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }


UNET, SD3, FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
SD_LEVELS = (True, True, True, False)
FULL = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux"}  # full sizes, as published, and their families
# "small" at 256 px keeps the proportions of Stable Diffusion 1.5 at 512 px: a quarter of the channels and heads, with
# as many channels per head (40, 80, 160), on grids with a quarter of the cells. The share of self-attention in the work
# goes with cells over channels, so it is the same; that of the 77 text keys is four times as large.
PRESETS: dict[tuple[str, str], Preset] = {
    ("sd", "tiny"): Preset(
        UNET,
        unet(
            (32, 32, 64),
            (True, True, True),
            sample_size=64,
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        clips=(32,),
        t5=0,
        resolution=64,
        steps=2,
    ),
    ("sd", "small"): Preset(
        UNET,
        unet(
            (80, 160, 320, 320),
            SD_LEVELS,
            sample_size=64,
            attention_head_dim=2,
            cross_attention_dim=192,
            norm_num_groups=16,
        ),
        clips=(192,),
        t5=0,
        resolution=256,
        steps=6,
    ),
    ("sd", "sd15"): Preset(
        UNET,
        unet((320, 640, 1280, 1280), SD_LEVELS, sample_size=64, attention_head_dim=8, cross_attention_dim=768),
        clips=(768,),
        t5=0,
        resolution=512,
    ),
    ("sdxl", "tiny"): Preset(
        UNET,
        {**sdxl((32, 32, 64), (1, 1, 2), (1, 1, 2), (16, 32)), "layers_per_block": 1, "norm_num_groups": 8},
        clips=(16, 32),
        t5=0,
        resolution=64,
        steps=2,
    ),
    ("sdxl", "small"): Preset(
        UNET,
        {**sdxl((80, 160, 320), (1, 2, 10), (1, 2, 5), (192, 320)), "norm_num_groups": 16},
        clips=(192, 320),
        t5=0,
        resolution=256,
        steps=6,
    ),
    ("sdxl", "sdxl"): Preset(
        UNET,
        sdxl((320, 640, 1280), (1, 2, 10), (5, 10, 20), (768, 1280)),
        clips=(768, 1280),
        t5=0,
        resolution=1024,
    ),
    ("sd3", "tiny"): Preset(SD3, sd3(2, 1, (16, 32), 64), clips=(16, 32), t5=64, resolution=64, steps=2),
    ("sd3", "small"): Preset(SD3, sd3(8, 6, (192, 320), 512), clips=(192, 320), t5=512, resolution=256, steps=3),
    ("sd3", "sd3"): Preset(SD3, sd3(24, 24, (768, 1280), 4096), clips=(768, 1280), t5=4096, resolution=1024),
    ("flux", "tiny"): Preset(FLUX, flux((1, 1), 1, 32, 64), clips=(32,), t5=64, resolution=64, steps=2),
    ("flux", "small"): Preset(FLUX, flux((4, 8), 3, 192, 512), clips=(192,), t5=512, resolution=256, steps=3),
    ("flux", "flux"): Preset(FLUX, flux((19, 38), 24, 768, 4096), clips=(768,), t5=4096, resolution=1024),
}


def make_network(preset: Preset) -> Any:
    """The network of a preset, on torch's default device and in its default dtype."""
    return getattr(diffusers, preset.network)(**preset.config)


def make_pipeline(family: str, preset: Preset, *, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A pipeline of the family with the network of a preset and random weights, created on ``device``."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that 12 billion parameters are never in memory twice
    try:
        with torch.device(device):
            network = make_network(preset)
            parts = {**PARTS[family](preset), "vae": autoencoder(family)}
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("to_q.weight"):
                weight.mul_(QUERY_GAIN)
    parts["unet" if preset.network == UNET else "transformer"] = network
    kind, scheduler = KINDS[family], make_scheduler(family)  # on the CPU, in its own dtype
    pipeline = getattr(diffusers, kind)(scheduler=scheduler, **parts).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


# -- the other parts


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of 77 tokens that has a token for each of WORDS."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = ""
        for piece in (*word[:-1], word[-1] + "</w>"):
            if left and (left, piece) not in merges:
                merges.append((left, piece))
                vocab.append(left + piece)
            left += piece
    ids = {token: number for number, token in enumerate([*dict.fromkeys(vocab), START, END])}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    return transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77, **special)


def t5_tokenizer() -> Any:
    """A T5 tokenizer that has a token for each of WORDS."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces = [*special, *(("▁" + word, -2.0) for word in WORDS), ("▁", -4.0)]
    return transformers.T5Tokenizer(vocab=pieces, model_max_length=512)


def clip(width: int, *, projected: bool = False) -> tuple[Any, Any]:
    """A CLIP tokenizer and its text encoder."""
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return tokenizer, kind(config)


def t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer and its encoder."""
    tokenizer = t5_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=1
    )
    return tokenizer, transformers.T5EncoderModel(config)


def autoencoder(family: str) -> Any:
    """An autoencoder of factor 8 with few channels; for transformers, with 16 latent channels and a shift."""
    unets = family in ("sd", "sdxl")
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4 if unets else 16,
        scaling_factor={"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305, "flux": 0.3611}[family],
        shift_factor={"sd3": 0.0609, "flux": 0.1159}.get(family),
        use_quant_conv=unets,
        use_post_quant_conv=unets,
        mid_block_add_attention=False,
    )


def make_scheduler(family: str) -> Any:
    """The scheduler that the family is published with."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if family == "sd":
        return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **betas)
    if family == "sdxl":
        return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **betas)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family == "flux")


def sd_parts(preset: Preset) -> dict[str, Any]:
    tokenizer, text_encoder = clip(preset.clips[0])
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def two_clips(preset: Preset, *, projected: bool) -> dict[str, Any]:
    tokenizer, text_encoder = clip(preset.clips[0], projected=projected)
    tokenizer_2, text_encoder_2 = clip(preset.clips[1], projected=True)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
    }


def sdxl_parts(preset: Preset) -> dict[str, Any]:
    return two_clips(preset, projected=False)


def sd3_parts(preset: Preset) -> dict[str, Any]:
    tokenizer_3, text_encoder_3 = t5(preset.t5)
    return {**two_clips(preset, projected=True), "tokenizer_3": tokenizer_3, "text_encoder_3": text_encoder_3}


def flux_parts(preset: Preset) -> dict[str, Any]:
    tokenizer, text_encoder = clip(preset.clips[0])
    tokenizer_2, text_encoder_2 = t5(preset.t5)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
    }


PARTS = {"sd": sd_parts, "sdxl": sdxl_parts, "sd3": sd3_parts, "flux": flux_parts}
KINDS = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
