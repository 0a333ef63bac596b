"""The supported families of text-to-image models, one class each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from synthgen.attention.words import PromptTokenizer
from synthgen.diffusion.backbone import AttentionSelection, Denoiser, DiffusionBackbone, Step
from synthgen.errors import ConfigError

__all__ = ["FAMILIES", "Family", "Flux", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL", "refuse_negative"]

_NO_NEGATIVE = {"LatentConsistencyModelPipeline": "a latent consistency model", "FluxPipeline": "FLUX"}


class Family(DiffusionBackbone):
    """A family with its defaults: the number of steps, the guidance scale, and which attention is recorded."""

    num_steps: ClassVar[int] = 30
    guidance_scale: ClassVar[float] = 7.5
    default_selection: ClassVar[AttentionSelection]

    @staticmethod
    @abstractmethod
    def native_size(pipeline: Any) -> int:
        """The side of the images that the model was trained for, in pixels."""


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x and their distilled forms: a U-Net with cross-attention to one CLIP text encoder.

    Attention is read on the grids of half and quarter of the latent (32 x 32 and 16 x 16 at 512 px), self-attention on
    the half: the finest cross-attention is noisy, and its self-attention large. That is our choice.
    """

    default_selection: ClassVar = AttentionSelection(cross_levels=(2, 4), self_level=2)

    @override
    def flagged(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[bool]:
        checker = getattr(self.pipeline, "kept_safety_checker", None)
        if checker is None:
            return super().flagged(images)
        pixels = self.pipeline.feature_extractor(list(images), return_tensors="pt").pixel_values
        with torch.inference_mode():
            blank = np.zeros((len(images), 1, 1, 3))  # the images that the checker would black out
            _, flags = checker(images=blank, clip_input=pixels.to(checker.device, checker.dtype))
        return [bool(flag) for flag in flags]

    @staticmethod
    @override
    def native_size(pipeline: Any) -> int:
        size = pipeline.unet.config.sample_size
        return int((size if isinstance(size, int) else size[0]) * pipeline.vae_scale_factor)

    @property
    @override
    def network(self) -> Any:
        return self.pipeline.unet

    @override
    def encoders(self) -> tuple[PromptTokenizer, ...]:
        tokenizers = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        return tuple(PromptTokenizer(tokenizer, tokenizer.model_max_length) for tokenizer in tokenizers if tokenizer)

    @override
    def grid(self, height: int, width: int) -> tuple[int, int]:
        factor = self.pipeline.vae_scale_factor
        return height // factor, width // factor

    @override
    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise (Ho et al., 2020, section 2)."""
        alpha_bar = float(self.alphas_cumprod[timestep])
        return math.sqrt(alpha_bar) * latents + math.sqrt(1 - alpha_bar) * noise

    @property
    def alphas_cumprod(self) -> Float[Tensor, " timesteps"]:
        """abar_t, the remaining share of the signal's variance at each timestep of training.

        Raises:
            ConfigError: the scheduler does not provide it.
        """
        if not hasattr(self.pipeline.scheduler, "alphas_cumprod"):
            kind = type(self.pipeline.scheduler).__name__
            raise ConfigError(f"{kind} has no alphas_cumprod; give another scheduler, such as DDIMScheduler")
        alphas_cumprod: Tensor = self.pipeline.scheduler.alphas_cumprod
        return alphas_cumprod

    @override
    def denoiser(self, texts: Sequence[str], latents: Tensor) -> Denoiser:
        pipeline = self.pipeline
        context, _ = pipeline.encode_prompt(list(texts), pipeline._execution_device, 1, False)
        unguided = self.unguided(latents)
        return lambda noised, timestep: (
            pipeline.unet(noised, timestep, timestep_cond=unguided, encoder_hidden_states=context).sample
        )

    def unguided(self, latents: Tensor) -> Tensor | None:
        """The input for "no guidance" of a U-Net distilled with guidance as an input (a latent consistency model)."""
        dim = self.network.config.time_cond_proj_dim
        if dim is None:
            return None
        embedding: Tensor = self.pipeline.get_guidance_scale_embedding(torch.zeros(len(latents)), embedding_dim=dim)
        return embedding.to(latents)

    @override
    def inversion(self, num_steps: int, latents: Tensor) -> tuple[list[float], Step]:
        """DDIM inversion (Song et al., 2021, section 4.3), on the "leading" grid for every sampler.

        z_{t'} = sqrt(abar_{t'}) x + sqrt(1 - abar_{t'}) eps, with x and eps as the network predicts them from z_t at
        timestep t'. So a DDIM step from t' with the same prediction leads back to z_t exactly.
        """
        config, alpha_bar = self.pipeline.scheduler.config, self.alphas_cumprod.double()
        stride, last = len(alpha_bar) // num_steps, len(alpha_bar) - 1
        times = [min(number * stride + int(config.get("steps_offset", 0)), last) for number in range(num_steps)]
        clean = 1.0 if config.get("set_alpha_to_one", True) else float(alpha_bar[0])  # abar after DDIM's last step
        levels = [clean, *(float(alpha_bar[timestep]) for timestep in times)]
        kind = config.get("prediction_type", "epsilon")

        def step(latents: Tensor, number: int, output: Tensor) -> Tensor:
            image, noise = separate(kind, latents, output, levels[number], levels[number + 1])
            return math.sqrt(levels[number + 1]) * image + math.sqrt(1 - levels[number + 1]) * noise

        return [float(timestep) for timestep in times], step


def separate(
    kind: str, latents: Tensor, output: Tensor, alpha_bar: float, network_alpha_bar: float
) -> tuple[Tensor, Tensor]:
    """Image x and noise e in z = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) e, from a network's prediction.

    ``network_alpha_bar`` is that of the timestep at which the network was called.

    Raises:
        ConfigError: the kind of prediction is not supported.
    """
    a, b = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if kind == "epsilon":
        return (latents - b * output) / a, output
    if kind == "v_prediction":  # v = c e - d x (Salimans and Ho, 2022, appendix D)
        c, d = math.sqrt(network_alpha_bar), math.sqrt(1 - network_alpha_bar)
        total = a * c + b * d
        return (c * latents - b * output) / total, (d * latents + a * output) / total
    raise ConfigError(f"a model that predicts {kind!r} cannot be inverted; leave inversion_steps 0 for noise instead")


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL and its distilled forms: a U-Net over the features of two CLIP text encoders side by side.

    If the two tokenizers split a word differently, the tokens of both count. At 1024 px the grids are 64 x 64 and
    32 x 32, which is where this U-Net has its attention.
    """

    guidance_scale: ClassVar = 5.0
    default_selection: ClassVar = AttentionSelection(cross_levels=(2, 4), self_level=2)

    @override
    def denoiser(self, texts: Sequence[str], latents: Tensor) -> Denoiser:
        pipeline = self.pipeline
        device = pipeline._execution_device
        context, _, pooled, _ = pipeline.encode_prompt(
            list(texts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        size = tuple(side * pipeline.vae_scale_factor for side in latents.shape[2:])
        width = pipeline.text_encoder_2.config.projection_dim
        ids = pipeline._get_add_time_ids(size, (0, 0), size, context.dtype, text_encoder_projection_dim=width)
        conditions = {"text_embeds": pooled, "time_ids": ids.to(device).repeat(len(texts), 1)}
        unguided = self.unguided(latents)

        def denoise(noised: Tensor, timestep: float) -> Tensor:
            predicted: Tensor = pipeline.unet(
                noised,
                timestep,
                timestep_cond=unguided,
                encoder_hidden_states=context,
                added_cond_kwargs=conditions,
            ).sample
            return predicted

        return denoise


class JointAttention(Family):
    """Diffusion transformers: text and image patches form one sequence; noise is mixed in linearly."""

    @override
    def grid(self, height: int, width: int) -> tuple[int, int]:
        factor = 2 * self.pipeline.vae_scale_factor  # a patch is 2 x 2 latents
        return height // factor, width // factor

    @property
    @override
    def network(self) -> Any:
        return self.pipeline.transformer

    @staticmethod
    @override
    def native_size(pipeline: Any) -> int:
        return int(pipeline.default_sample_size * pipeline.vae_scale_factor)

    @override
    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """z_t = (1 - sigma) z_0 + sigma noise, sigma = t / 1000 (Esser et al., 2024, section 3)."""
        sigma = timestep / 1000
        return (1 - sigma) * latents + sigma * noise

    @override
    def inversion(self, num_steps: int, latents: Tensor) -> tuple[list[float], Step]:
        """Euler's method from sigma 0 to 1, in even steps shifted towards noise as the scheduler shifts its own.

        FLUX's pipeline samples at exactly these sigmas. Stable Diffusion 3's starts its even steps at the scheduler's
        smallest sigma, not at 0, so its sigmas are a little higher.
        """
        shift = self.shift(latents)
        share = [number / num_steps for number in range(num_steps + 1)]
        sigmas = [shift * x / (1 + (shift - 1) * x) for x in share]

        def step(latents: Tensor, number: int, output: Tensor) -> Tensor:
            return latents + (sigmas[number + 1] - sigmas[number]) * output

        return [1000 * sigma for sigma in sigmas[:-1]], step

    def shift(self, latents: Tensor) -> float:
        """The shift of the sigmas towards noise: the scheduler's constant, or its function of the number of patches."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or 1.0)
        least, most = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (most - least)
        mu = config["base_shift"] + slope * (latents.shape[2] * latents.shape[3] // 4 - least)
        return float(mu if config.get("time_shift_type") == "linear" else math.exp(mu))


class StableDiffusion3(JointAttention):
    """Stable Diffusion 3 and 3.5: joint attention over image patches, then CLIP's 77 tokens, then T5's.

    All joint blocks are recorded, and for 3.5 medium also their image-only attention. That is our choice, not yet
    checked on real weights.
    """

    text: ClassVar = "last"
    num_steps: ClassVar = 28
    guidance_scale: ClassVar = 7.0
    default_selection: ClassVar = AttentionSelection()
    max_sequence_length = 256  # T5's tokens, as in the pipeline

    @override
    def encoders(self) -> tuple[PromptTokenizer, ...]:
        pipeline = self.pipeline
        clip = pipeline.tokenizer_max_length
        found = [
            PromptTokenizer(tokenizer, clip)
            for tokenizer, encoder in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
            if encoder is not None
        ]
        if pipeline.text_encoder_3 is not None:
            found.append(PromptTokenizer(pipeline.tokenizer_3, self.max_sequence_length, start=clip))
        return tuple(found)

    @override
    def arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        return {**super().arguments(texts), "max_sequence_length": self.max_sequence_length}

    @override
    def denoiser(self, texts: Sequence[str], latents: Tensor) -> Denoiser:
        pipeline = self.pipeline
        device = pipeline._execution_device
        context, _, pooled, _ = pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )

        def denoise(noised: Tensor, timestep: float) -> Tensor:
            times = torch.full((len(noised),), float(timestep), device=device)
            velocity: Tensor = pipeline.transformer(
                hidden_states=noised, timestep=times, encoder_hidden_states=context, pooled_projections=pooled
            ).sample
            return velocity

        return denoise


class Flux(JointAttention):
    """FLUX.1 dev and schnell: joint attention over T5's tokens, then image patches.

    Only the two-stream blocks are recorded, not the single-stream ones, which is our choice. CLIP's text encoder only
    conditions the image globally, so its tokens are not recorded. Guidance is an input of the model; there is no
    unconditional half, and no negative prompt.
    """

    num_steps: ClassVar = 28
    guidance_scale: ClassVar = 3.5
    default_selection: ClassVar = AttentionSelection(layers=("transformer_blocks.",))

    @property
    def max_sequence_length(self) -> int:
        """T5's tokens; schnell was trained with fewer."""
        return 512 if self.pipeline.transformer.config.guidance_embeds else 256

    @override
    def uses_cfg(self) -> bool:
        return False

    @override
    def encoders(self) -> tuple[PromptTokenizer, ...]:
        return (PromptTokenizer(self.pipeline.tokenizer_2, self.max_sequence_length),)

    @override
    def arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    @override
    def denoiser(self, texts: Sequence[str], latents: Tensor) -> Denoiser:
        pipeline = self.pipeline
        device = pipeline._execution_device
        context, pooled, text_ids = pipeline.encode_prompt(
            list(texts), None, device=device, max_sequence_length=self.max_sequence_length
        )
        b, channels, height, width = latents.shape
        places = pipeline._prepare_latent_image_ids(b, height // 2, width // 2, device, context.dtype)
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((b,), self.sampling.guidance_scale, device=device)

        def denoise(noised: Tensor, timestep: float) -> Tensor:
            packed = pipeline.transformer(
                hidden_states=pipeline._pack_latents(noised, b, channels, height, width),
                timestep=torch.full((b,), timestep / 1000, device=device, dtype=noised.dtype),
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=context,
                txt_ids=text_ids,
                img_ids=places,
            ).sample
            factor = pipeline.vae_scale_factor
            velocity: Tensor = pipeline._unpack_latents(packed, height * factor, width * factor, factor)
            return velocity

        return denoise


FAMILIES: dict[str, type[Family]] = {  # by the class of the pipeline
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}


def refuse_negative(kind: str) -> None:
    """Check that a pipeline of this class takes a negative prompt.

    Raises:
        ConfigError: the pipeline takes no negative prompt.
    """
    if kind in _NO_NEGATIVE:
        raise ConfigError(
            f"{_NO_NEGATIVE[kind]} takes no negative prompt: it was distilled to do without; leave it empty"
        )
