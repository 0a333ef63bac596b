"""Small pipeline folders with random weights, one function a family, built from the real diffusers classes.

Classes, wiring and what sets the families apart are the real ones; widths, depths and vocabularies are small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers  # both load a class when it is asked for
import torch
import transformers

WORDS = ["a", "an", "photo", "of", "the", "and", "disc", "square", "dog", "cat", "park", "in", "golden"]
FEW_WORDS = ["a", "dog", "the"]  # of a second tokenizer, whose tokens stand elsewhere
LETTERS = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 324)]
START, END = "<|startoftext|>", "<|endoftext|>"
HEADS = 2
HEAD_DIM = 16
WIDTH = HEADS * HEAD_DIM  # of every network that draws, and of the larger CLIP
HALF = WIDTH // 2  # of the smaller CLIP
DOUBLE = WIDTH * 2  # of T5: the two CLIPs side by side fit in

# -- tokenizers


def make_tokenizer(folder: Path, length: int = 16, words: Sequence[str] = WORDS, pad: str = END) -> None:
    """A CLIP tokenizer that knows ``words`` whole and spells everything else in letters ("umbrella" is 8 tokens)."""
    vocab = LETTERS + [letter + "</w>" for letter in LETTERS]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = f"{pieces[0]} {pieces[1]}"
            if pair not in merges:
                merges.append(pair)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in vocab:
                vocab.append(pieces[0])
    vocab += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def make_t5_tokenizer(folder: Path, length: int = 512, words: Sequence[str] = WORDS) -> None:
    """A T5 tokenizer that knows ``words`` whole and spells all else in letters after a space piece ("elf" is 4 tokens).

    As in the published T5 there are no bytes: an emoji, or any number of CJK letters in a row, is one ``<unk>``. The
    scores are written, not trained: the trainer of ``tokenizers`` gives other ones each time.
    """
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    whole = [("▁" + word, -2.0) for word in words]
    parts = [("▁", -4.0), ("ing", -5.0), ("er", -5.0)]
    pieces = special + whole + parts + [(letter, -8.0) for letter in LETTERS]
    transformers.T5Tokenizer(vocab=pieces, model_max_length=length).save_pretrained(folder)


# -- components


def _clip(
    folder: Path,
    *,
    width: int,
    length: int = 77,
    words: Sequence[str] = WORDS,
    pad: str = END,
    layers: int = 2,
    act: str = "quick_gelu",
    projected: bool = False,
) -> tuple[Any, Any]:
    """A CLIP tokenizer and its text tower."""
    make_tokenizer(folder, length, words, pad)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return tokenizer, kind(config)


def _two_clips(folder: Path, length: int, *, projected: bool) -> dict[str, Any]:
    """CLIP-L and the wider OpenCLIP bigG. Those published share one vocabulary but for the pad token; these do not."""
    tokenizer, encoder = _clip(folder / "tokenizer", width=HALF, length=length, projected=projected)
    tokenizer_2, encoder_2 = _clip(
        folder / "tokenizer_2", width=WIDTH, length=length, words=FEW_WORDS, pad="!", act="gelu", projected=True
    )
    return {"tokenizer": tokenizer, "text_encoder": encoder, "tokenizer_2": tokenizer_2, "text_encoder_2": encoder_2}


def _t5(folder: Path) -> tuple[Any, Any]:
    """A T5 tokenizer and its encoder."""
    make_t5_tokenizer(folder)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=DOUBLE,
        d_kv=HEAD_DIM,
        d_ff=DOUBLE,
        num_layers=2,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, transformers.T5EncoderModel(config)


def _vae(channels: int, scale: float, shift: float | None = None) -> Any:
    """The usual autoencoder of factor 8; those with a shift have no convolutions around the latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def _unet(*, widths: Sequence[int], attended: Sequence[bool], **config: Any) -> Any:
    """A U-Net; ``attended`` are the levels, finest first, that have attention."""
    down = tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended)
    up = tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended))
    return diffusers.UNet2DConditionModel(
        block_out_channels=tuple(widths),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        norm_num_groups=8,
        **config,
    )


def _save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


# -- families


def make_stable_diffusion(folder: Path, *, sample_size: int = 16, seed: int = 0) -> Path:
    """Stable Diffusion 1: latent 16 x 16 x 4, attention on 16 x 16, 8 x 8 and 4 x 4, 32 px images, 16 tokens."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = _clip(folder / "tokenizer", width=HALF, length=16, layers=1)
    unet = _unet(
        sample_size=sample_size,
        widths=(HALF, HALF, WIDTH),
        attended=(True, True, True),
        cross_attention_dim=HALF,
        attention_head_dim=HEADS,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def make_stable_diffusion_2(folder: Path, *, sample_size: int = 16, length: int = 77, seed: int = 0) -> Path:
    """Stable Diffusion 2.1: it predicts v; OpenCLIP, whose last layer was left out; the coarsest level unattended."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = _clip(folder / "tokenizer", width=WIDTH, length=length, pad="!", act="gelu")
    unet = _unet(
        sample_size=sample_size,
        widths=(HALF, WIDTH, WIDTH, WIDTH),
        attended=(True, True, True, False),
        cross_attention_dim=WIDTH,
        attention_head_dim=[1, 2, 2, 2],  # it says heads: each of 16 channels
        use_linear_projection=True,
        upcast_attention=True,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=_vae(4, 0.18215),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def make_stable_diffusion_xl(
    folder: Path, *, turbo: bool = False, sample_size: int = 16, length: int = 77, seed: int = 0
) -> Path:
    """SDXL: two text towers, no attention on the finest level; ``turbo`` is for 1 to 4 steps without guidance."""
    torch.manual_seed(seed)
    texts = _two_clips(folder, length, projected=False)
    time_dim = 8
    unet = _unet(
        sample_size=sample_size,
        widths=(HALF, WIDTH, WIDTH),
        attended=(False, True, True),
        cross_attention_dim=HALF + WIDTH,
        attention_head_dim=[1, 2, 2],
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=WIDTH + 6 * time_dim,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if turbo:
        scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **betas)
    else:
        scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **betas)
    pipeline = diffusers.StableDiffusionXLPipeline(vae=_vae(4, 0.13025), unet=unet, scheduler=scheduler, **texts)
    return _save(pipeline, folder)


def make_stable_diffusion_3(
    folder: Path, *, medium: bool = False, t5: bool = True, sample_size: int = 16, length: int = 77, seed: int = 0
) -> Path:
    """SD 3.0, or 3.5 ``medium`` with norms of queries and keys and a second attention; ``t5=False``: without T5."""
    torch.manual_seed(seed)
    texts = _two_clips(folder, length, projected=True)
    tokenizer_3, text_encoder_3 = _t5(folder / "tokenizer_3") if t5 else (None, None)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=16,
        num_layers=3,  # the last one drops the text
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=DOUBLE,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=HALF + WIDTH,
        pos_embed_max_size=sample_size,  # twice what the sample has
        qk_norm="rms_norm" if medium else None,
        dual_attention_layers=(0, 1) if medium else (),
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, 1.5305, 0.0609),
        tokenizer_3=tokenizer_3,
        text_encoder_3=text_encoder_3,
        **texts,
    )
    return _save(pipeline, folder)


def make_flux(folder: Path, *, dev: bool = True, length: int = 77, seed: int = 0) -> Path:
    """FLUX.1: ``dev`` takes the guidance as an input, schnell takes none."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = _clip(folder / "tokenizer", width=HALF, length=length)
    tokenizer_2, text_encoder_2 = _t5(folder / "tokenizer_2")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,  # 2 x 2 latents of 16 channels
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=DOUBLE,
        pooled_projection_dim=HALF,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),  # together a head
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_vae(16, 0.3611, 0.1159),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
    )
    return _save(pipeline, folder)


def make_pixart_sigma(folder: Path, *, seed: int = 0) -> Path:
    """PixArt-Sigma: T5 only, cross-attention; sizes go to the nearest around 256 px unless it is told not to."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = _t5(folder / "tokenizer")
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32,  # the least that its table of sizes knows
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=DOUBLE,
    )
    pipeline = diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=_vae(4, 0.13025),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
    )
    return _save(pipeline, folder)


# -- models of images and texts


def make_clip(folder: Path, *, size: int = 32, seed: int = 0) -> Path:
    """A CLIP with tokenizer and processor, as on the hub."""
    torch.manual_seed(seed)
    make_tokenizer(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": DOUBLE}
    special = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    config = transformers.CLIPConfig(
        text_config={**shape, **special, "vocab_size": len(vocab), "max_position_embeddings": 16},
        vision_config={**shape, "image_size": size, "patch_size": 8},
        projection_dim=WIDTH,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = {"size": {"shortest_edge": size}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
