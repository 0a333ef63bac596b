"""The networks of the tiny model before training, its scheduler and its tokenizer."""

import json
from collections.abc import Iterable

from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from synthgen.tiny import IMAGE_SIZE

__all__ = ["MAX_LENGTH", "autoencoder", "scheduler", "text_encoder", "train_tokenizer", "unet"]

MAX_LENGTH = 32  # tokens, with those of start and end
WIDTH = 160  # of the text encoder
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def autoencoder() -> AutoencoderTiny:
    """Images (b, 3, 128, 128) in [-1, 1] ↔ latents (b, 4, 16, 16), as much compression as in Stable Diffusion."""
    channels = (48, 48, 48, 48)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(0, 0, 2, 3),
        num_decoder_blocks=(4, 3, 1, 0),
    )


def unet() -> UNet2DConditionModel:
    """A U-Net with self- and cross-attention on 16 × 16 and 8 × 8 (three blocks each) and on 4 × 4 (four blocks)."""
    channels = (48, 96, 160)
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        attention_head_dim=(2, 4, 4),  # in these blocks diffusers reads this as the number of heads
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """The noise schedule of Stable Diffusion, with v-prediction."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="v_prediction",
    )


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """Train a byte-level BPE in the form of CLIP's, where ``</w>`` ends a word.

    The trainer breaks ties between equally frequent pairs at random, so another run gives another vocabulary.
    """
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        min_frequency=1, vocab_size=vocab_size, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BOS, EOS])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH)
