"""Generate with a ``diffusers`` pipeline and record its attention; shared by all families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from synthgen.attention.layers import levels_of
from synthgen.attention.recorder import Recorder, record
from synthgen.attention.words import PromptTokenizer, WordTokens, locate_in_encoders
from synthgen.diffusion.memory import AdaptiveBatches
from synthgen.errors import ConfigError
from synthgen.prompts import sample_seed
from synthgen.records import SAFETY_WARNING, Generation, Maps, Request

__all__ = ["BLACK", "BROKEN_ATTENTION", "RETRIES", "AttentionSelection", "DiffusionBackbone", "Sampling", "one_thread"]

RETRIES = 2  # number of other seeds to try for a failed image
BLACK = "the image came out black or with values that are no numbers; try another dtype"
BROKEN_ATTENTION = "its attention came out with values that are no numbers; try another dtype"

T = TypeVar("T")
Denoiser = Callable[[Tensor, float], Tensor]  # noised latents and timestep → the network's prediction
Step = Callable[[Tensor, int, Tensor], Tensor]  # latents, step number and the network's prediction → the next latents


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Use one thread on a CPU, so that the order of sums does not depend on the number of workers."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of an image.

    Raises:
        ConfigError: there is a negative prompt, and no guidance that would use it.
    """

    num_steps: int
    guidance_scale: float  # 1 or less: no guidance, and no unconditional half is computed
    negative_prompt: str
    height: int  # pixels
    width: int

    def __post_init__(self) -> None:
        if self.negative_prompt and self.guidance_scale <= 1:
            raise ConfigError(
                f"a negative prompt has no effect without guidance (guidance_scale {self.guidance_scale:g}); "
                "leave it empty, or raise guidance_scale above 1"
            )


@dataclass(frozen=True)
class AttentionSelection:
    """Which attention is recorded."""

    cross_levels: tuple[int, ...] = (1,)  # grids of cross-attention, as reduction factors of the finest
    self_level: int = 1  # grid of self-attention
    layers: tuple[str, ...] = ("",)  # prefixes of layer names; "": all
    skip_steps: float = 0.0  # share of the steps, the noisiest ones, to leave unrecorded


class DiffusionBackbone(ABC):
    """The base of all families: generate from requests, and record attention for existing images.

    Args:
        pipeline: a text-to-image pipeline of the family, on its device.
        sampling: steps, guidance and size.
        selection: which attention is recorded.
    """

    text: ClassVar[Literal["first", "last"]] = "first"  # position of the text in a transformer's sequence

    def __init__(self, pipeline: Any, sampling: Sampling, selection: AttentionSelection) -> None:
        self.pipeline, self.sampling, self.selection = pipeline, sampling, selection
        self._batches = AdaptiveBatches()

    # -- what differs between families

    @property
    @abstractmethod
    def network(self) -> Any:
        """The U-Net or the transformer."""

    @abstractmethod
    def encoders(self) -> tuple[PromptTokenizer, ...]:
        """The text encoders whose tokens the network attends to, and the offset of each one's tokens."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the network's finest tokens for an image of this size, in pixels."""

    def arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        """Pipeline arguments other than prompts, steps, guidance, size and noise."""
        negative = self.sampling.negative_prompt
        return {"negative_prompt": [negative] * len(texts)} if negative else {}

    def uses_cfg(self) -> bool:
        """Whether a batch starts with an unconditional half, according to the pipeline's own flag."""
        return bool(self.pipeline.do_classifier_free_guidance)

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """The latents as they would be at a timestep of training (0 to 999)."""

    @abstractmethod
    def denoiser(self, texts: Sequence[str], latents: Tensor) -> Denoiser:
        """A function that runs the network once, without guidance, on noised latents of its own type at a timestep."""

    @abstractmethod
    def inversion(self, num_steps: int, latents: Tensor) -> tuple[list[float], Step]:
        """The timesteps of an inversion of these latents, from image to noise, and a function for one step of it."""

    # -- what they share

    def select_layers(self, layers: tuple[str, ...]) -> None:
        """Record only these layers, on those of the selected grids that they have.

        Raises:
            ConfigError: no such layer exists, or one kind of attention is on none of the selected grids.
        """
        wanted = self.selection.cross_levels
        found = [[level for level in wanted if level in levels] for levels in levels_of(self.network, layers)]
        for kind, levels in zip(("cross-attention", "self-attention"), found, strict=True):
            if not levels:
                grids = " or ".join(f"1/{level}" for level in wanted)
                raise ConfigError(
                    f"the layers {', '.join(layers)} have no {kind} on a grid that is recorded ({grids} of the finest, "
                    "each way); give other layers as well"
                )
        cross, own = found
        self.selection = replace(self.selection, layers=layers, cross_levels=tuple(cross), self_level=min(own))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        return self.sampling.height, self.sampling.width

    @property
    def multiple(self) -> int:
        """Pixels of which image sides must be multiples to fill every recorded grid."""
        selection = self.selection
        return int(self.pipeline.vae_scale_factor) * max(2, selection.self_level, *selection.cross_levels)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One image with its maps for each request.

        The noise of each image is drawn on the CPU from its own seed, independent of its batch and the device. Words
        that every tokenizer truncates are left out of the record, with a warning. A batch that does not fit into the
        device's memory is halved until it does; later batches start at that size, and images change by no more than
        rounding. A black image or one with non-finite values is generated again from another seed, at most RETRIES
        times; its request then has the seed that was used, or its ``failed`` the reason.
        """
        made = self._generate(requests)
        for attempt in range(1, RETRIES + 1):
            bad = [row for row, generation in enumerate(made) if generation.failed]
            again = [replace(requests[row], seed=sample_seed(requests[row].seed, f"attempt {attempt}")) for row in bad]
            for row, generation in zip(bad, self._generate(again) if again else [], strict=True):
                made[row] = generation
        return made

    def _generate(self, requests: Sequence[Request]) -> list[Generation]:
        located, tokens = self._locate(requests)
        texts, seeds = [request.prompt.text for request in requests], [request.seed for request in requests]

        def make(some: slice) -> list[Generation]:
            images, recorder = self.sample(texts[some], seeds[some], tokens[some])
            made = _records(requests[some], located[some], images, recorder)
            return [
                replace(
                    generation,
                    failed="" if generation.image.any() else BLACK,
                    warnings=(*generation.warnings, *([SAFETY_WARNING] if flag else [])),
                )
                for generation, flag in zip(made, self.flagged(images), strict=True)
            ]

        return _joined(self.in_batches(_images(*self.size), len(requests), make))

    def flagged(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[bool]:
        """Whether a safety checker flags each image; without a checker in the family, none is flagged."""
        return [False] * len(images)

    def attend(
        self,
        images: UInt8[np.ndarray, "b H W 3"],
        requests: Sequence[Request],
        timesteps: Sequence[int],
        inversion_steps: int = 0,
    ) -> list[Generation]:
        """Record attention as :meth:`generate` does, for existing images.

        Each image is noised to every timestep, with one draw of noise from its request's seed, and passes through the
        network once at each. With ``inversion_steps``, ``timesteps`` is ignored: the image is inverted to noise in
        that many deterministic steps (DDIM inversion; Euler's method for linear mixtures), and attention is recorded
        on the way, except for the noisiest share ``selection.skip_steps`` of the steps. Both use the image's own
        prompt without guidance (a model with guidance as an input, as FLUX.1 dev, gets the scale of ``sampling``). A
        batch that does not fit into memory is halved, as in :meth:`generate`, separately for each image size; an image
        whose attention is not finite has the reason under ``failed``.
        """
        located, tokens = self._locate(requests)

        def look(some: slice) -> list[Generation]:
            recorder = self._watch(images[some], requests[some], tokens[some], timesteps, inversion_steps)
            return [
                generation if _finite(generation.maps) else replace(generation, failed=BROKEN_ATTENTION)
                for generation in _records(requests[some], located[some], images[some], recorder)
            ]

        kind = f"{_images(*images.shape[1:3])} that exist"
        return _joined(self.in_batches(kind, len(requests), look))

    def in_batches(self, kind: str, count: int, compute: Callable[[slice], T], most: int = 0) -> list[T]:
        """Call ``compute`` on ``count`` images, ``most`` (0: all) at once or as many as memory allows.

        ``kind`` is the kind of work; see :class:`~synthgen.diffusion.memory.AdaptiveBatches`. After any failure the
        model is restored to its previous state.

        Raises:
            SynthgenError: the device has too little memory for one image.
        """
        before = self.pipeline.vae.dtype
        return self._batches.work(kind, count, compute, lambda: self._restore(before), most or count)

    def _restore(self, dtype: torch.dtype) -> None:
        """After a failed call, cast the autoencoder back to ``dtype`` and offload all parts.

        A pipeline does both itself, but only at the end of a successful call.
        """
        if self.pipeline.vae.dtype != dtype:
            self.pipeline.vae.to(dtype)
        self.pipeline.maybe_free_model_hooks()  # does nothing without offloading
        torch.cuda.empty_cache()

    def _watch(
        self,
        images: UInt8[np.ndarray, "b H W 3"],
        requests: Sequence[Request],
        tokens: Sequence[Sequence[Sequence[int]]],
        timesteps: Sequence[int],
        inversion_steps: int,
    ) -> Recorder:
        """Run the network on the images and return the recorder of its attention."""
        device = self.pipeline._execution_device
        recorder = self._recorder(self.grid(*images.shape[1:3]), tokens, uses_cfg=lambda: False)
        with torch.inference_mode():
            latents = self.encode(torch.from_numpy(images).to(device)).float()
            denoise = self.casting_denoiser([request.prompt.text for request in requests], latents)
            with record(self.network, recorder, self.selection.layers):
                if inversion_steps:
                    self.invert(latents, denoise, inversion_steps, recorder)
                else:
                    noise = self.noise([request.seed for request in requests], latents)
                    for timestep in timesteps:
                        denoise(self.noised(latents, noise, timestep), timestep)
        return recorder

    def noise(self, seeds: Sequence[int], latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """One draw of noise per image, on the CPU from its own seed."""
        draws = [torch.randn(latents.shape[1:], generator=_generator(seed)) for seed in seeds]
        return torch.stack(draws).to(latents.device)

    def casting_denoiser(self, texts: Sequence[str], latents: Tensor) -> Denoiser:
        """:meth:`denoiser` for latents of any type; they keep it, so that no precision is lost between steps."""
        denoise, dtype = self.denoiser(texts, latents.to(self.network.dtype)), self.network.dtype
        return lambda noised, timestep: denoise(noised.to(dtype), timestep).to(noised.dtype)

    def invert(
        self, latents: Float[Tensor, "b c h w"], denoise: Denoiser, num_steps: int, recorder: Recorder | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Invert latents to noise, step by step; sampling from there without guidance nearly restores them."""
        timesteps, step = self.inversion(num_steps, latents)
        recorded, number = num_steps - int(self.selection.skip_steps * num_steps), 0
        if recorder is not None:
            recorder.paused = lambda: number >= recorded
        for number, timestep in enumerate(timesteps):
            latents = step(latents, number, denoise(latents, timestep))
        return latents

    def encode(self, images: UInt8[Tensor, "b H W 3"]) -> Tensor:
        """Clean latents as the network's input: the mode of the autoencoder's distribution, shifted and scaled.

        An autoencoder that declares float16 too narrow (Stable Diffusion XL's) computes in float32.
        """
        vae = self.pipeline.vae
        narrow = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
        if narrow:
            vae.to(torch.float32)
        try:
            encoded = vae.encode(images.to(vae.dtype).permute(0, 3, 1, 2) / 127.5 - 1)
        finally:
            if narrow:
                vae.to(torch.float16)
        latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        shift = float(getattr(vae.config, "shift_factor", None) or 0)
        return (latents - shift) * float(vae.config.scaling_factor)

    def _locate(self, requests: Sequence[Request]) -> tuple[list[WordTokens], list[list[tuple[int, ...]]]]:
        encoders = self.encoders()
        located = [locate_in_encoders(encoders, request.prompt) for request in requests]
        return located, [[positions for positions in found.positions if positions] for found in located]

    def _recorder(self, grid: tuple[int, int], tokens: Any, uses_cfg: Callable[[], bool]) -> Recorder:
        selection = self.selection
        return Recorder(grid, tokens, uses_cfg, selection.cross_levels, selection.self_level, self.text)

    def sample(
        self, texts: list[str], seeds: list[int], tokens: Sequence[Sequence[Sequence[int]]], *, recorded: bool = True
    ) -> tuple[UInt8[np.ndarray, "b H W 3"], Recorder]:
        """Images for texts, and the recorder of the attention (unused with ``recorded=False``, for comparison).

        An image with non-finite values comes out black.
        """
        sampling, pipeline = self.sampling, self.pipeline
        recorder = self._recorder(self.grid(*self.size), tokens, self.uses_cfg)
        arguments: dict[str, Any] = {
            "prompt": texts,
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
            "generator": [_generator(seed) for seed in seeds],
            "output_type": "np",
            **self.arguments(texts),
        }
        with torch.inference_mode():
            if recorded:
                done = 0  # network calls: some schedulers, such as Heun's, make two per step

                def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                    nonlocal done
                    done = step + 1
                    return tensors

                recorder.paused = lambda: done < int(self.selection.skip_steps * len(pipeline.scheduler.timesteps))

                with record(self.network, recorder, self.selection.layers):
                    values = pipeline(**arguments, callback_on_step_end=after_step).images
            else:
                values = pipeline(**arguments).images
        values[~np.isfinite(values).all(axis=(1, 2, 3))] = 0
        return (values * 255).round().astype(np.uint8), recorder


def _generator(seed: int) -> torch.Generator:
    """The random generator of an image's noise, on the CPU for every device."""
    return torch.Generator("cpu").manual_seed(seed)


def _images(height: int, width: int) -> str:
    return f"images of {height} x {width} pixels"


def _joined(parts: Sequence[Sequence[Generation]]) -> list[Generation]:
    return [generation for part in parts for generation in part]


def _finite(maps: Maps) -> bool:
    return bool(np.isfinite(maps.weights).all() and np.isfinite(maps.affinity).all())


def _records(
    requests: Sequence[Request], located: Sequence[WordTokens], images: UInt8[np.ndarray, "b H W 3"], recorder: Recorder
) -> list[Generation]:
    """Images and maps, without the words that the tokenizers truncated."""
    generations = []
    everything = zip(requests, located, images, recorder.weights(), recorder.affinity(), strict=True)
    for request, found, image, weights, affinity in everything:
        kept = [number for number, positions in enumerate(found.positions) if positions]
        prompt = replace(
            request.prompt,
            words=tuple(request.prompt.words[number] for number in kept),
            spans=tuple(request.prompt.spans[number] for number in kept),
        )
        maps = Maps(prompt.words, weights, affinity)
        cut_off = [word for word, positions in zip(request.prompt.words, found.positions, strict=True) if not positions]
        request = replace(request, prompt=prompt)
        generations.append(Generation(request, image, maps, found.warnings, words_cut_off=tuple(cut_off)))
    return generations
