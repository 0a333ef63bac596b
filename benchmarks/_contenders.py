"""Ways to get the cross-attention maps of a prompt's words while an image is generated, for ``capture.py``."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _models import PRESETS, make_pipeline
from torch import Tensor

from synthgen.attention.words import locate_in_encoders
from synthgen.diffusion import FAMILIES, Sampling
from synthgen.diffusion.loading import DTYPES
from synthgen.prompts import parse_line

__all__ = [
    "CONTENDERS",
    "Contender",
    "Maps",
    "Size",
    "Workload",
    "limit_steps",
    "make_workload",
    "patched",
    "word_maps",
]

LINES = (
    "a photo of a [dog] and an [umbrella] on the [grass]",
    "the [cat] under an [umbrella] in the [park]",
    "a [dog] and a [cat] in a photo of the [park]",
)
Size = tuple[int, int]
Maps = list[np.ndarray]  # for each image, words x rows x columns


# -- what is generated


@dataclass
class Workload:
    """A pipeline with prompts, and the layers that the maps come from."""

    family: Any  # of synthgen.diffusion
    prompts: Sequence[Any]
    tokens: list[list[tuple[int, ...]]]  # positions of each prompt's words
    device: str

    @property
    def network(self) -> Any:
        """The U-Net or the transformer."""
        return self.family.network

    @functools.cached_property
    def joint(self) -> bool:
        """Whether text and image are one sequence."""
        return not hasattr(self.network, "up_blocks")

    @functools.cached_property
    def sizes(self) -> dict[int, Size]:
        """The grids that the maps come from, by their number of cells; the finest first."""
        found = {}
        for level in sorted(self.family.selection.cross_levels):
            rows, columns = self.family.grid(*self.family.size)
            for _ in range(level.bit_length() - 1):
                rows, columns = -(-rows // 2), -(-columns // 2)
            found[rows * columns] = (rows, columns)
        return found

    def locate(self, queries: int) -> tuple[Size, slice, slice] | None:
        """The grid, image rows and text columns of a layer with ``queries`` queries; None if it is not used."""
        if not self.joint:
            return (self.sizes[queries], slice(None), slice(None)) if queries in self.sizes else None
        ((pixels, size),) = self.sizes.items()
        if queries <= pixels:
            return None
        if self.family.text == "first":
            return size, slice(queries - pixels, queries), slice(0, queries - pixels)
        return size, slice(0, pixels), slice(pixels, queries)

    @functools.cached_property
    def layers(self) -> list[str]:
        """The names of the attention processors that the maps come from, found by generating with one step."""
        used: dict[str, None] = {}

        def attention_of(name: str) -> Callable[..., Tensor]:
            def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if self.locate(query.shape[2]):
                    used[name] = None
                return F.scaled_dot_product_attention(query, *args, **kwargs)

            return attention

        names = (name for name in self.network.attn_processors if name.startswith(self.family.selection.layers))
        candidates = {name: attention_of(name) for name in names if self.joint or "attn2" in name}
        with limit_steps(self, 1), patched(self.network, candidates):
            self.generate()
        return list(used)

    def conditional(self, values: Tensor) -> Tensor:
        """The conditional half of a batch."""
        return values.chunk(2)[1] if self.family.uses_cfg() else values

    def generate(self, *, recorded: bool = False) -> Any:
        """Generate the images; returns the recorder."""
        texts, seeds = [prompt.text for prompt in self.prompts], list(range(len(self.prompts)))
        return self.family.sample(texts, seeds, self.tokens if recorded else [], recorded=recorded)[1]


def make_workload(family: str, size: str, args: argparse.Namespace) -> Workload:
    """A pipeline of random weights with ``args.batch`` prompts."""
    preset = PRESETS[family, size]
    pipeline = make_pipeline(family, preset, dtype=DTYPES[args.dtype], device=args.device)
    kind = FAMILIES[type(pipeline).__name__]
    side = args.resolution or preset.resolution
    guidance = kind.guidance_scale if args.guidance is None else args.guidance
    sampling = Sampling(args.steps or preset.steps or kind.num_steps, guidance, "", side, side)
    model = kind(pipeline, sampling, kind.default_selection)
    prompts = [parse_line(LINES[row % len(LINES)]) for row in range(args.batch)]
    encoders = model.encoders()
    tokens = [list(locate_in_encoders(encoders, prompt).positions) for prompt in prompts]
    return Workload(model, prompts, tokens, args.device)


@contextmanager
def limit_steps(workload: Workload, num: int) -> Iterator[None]:
    """Generate with at most ``num`` steps within the block."""
    before = workload.family.sampling
    workload.family.sampling = replace(before, num_steps=min(num, before.num_steps))
    try:
        yield
    finally:
        workload.family.sampling = before


class PatchedProcessor:
    """An attention processor that calls another function in place of PyTorch's scaled dot product attention."""

    def __init__(self, inner: Any, attention: Callable[..., Tensor]) -> None:
        self.inner, self.attention = inner, attention

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the inner processor with the other attention."""
        before = F.scaled_dot_product_attention

        def attention(*args: Any, **kwargs: Any) -> Tensor:
            F.scaled_dot_product_attention = before  # the new function may call it
            try:
                return self.attention(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = attention

        F.scaled_dot_product_attention = attention
        try:
            return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        finally:
            F.scaled_dot_product_attention = before


@contextmanager
def patched(network: Any, attentions: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Give the named processors another attention function within the block."""
    before = dict(network.attn_processors)
    changed = {name: PatchedProcessor(before[name], attention) for name, attention in attentions.items()}
    network.set_attn_processor({**before, **changed})
    try:
        yield
    finally:
        network.set_attn_processor(before)


# -- the contenders


def plain(workload: Workload) -> None:
    workload.generate()


def synthgen(workload: Workload) -> Maps:
    recorder = workload.generate(recorded=True)
    recorder.affinity()
    weights: Maps = recorder.weights()
    return weights


def naive(workload: Workload) -> Maps:
    kept: dict[str, list[Tensor]] = {name: [] for name in workload.layers}
    sizes: dict[str, Size] = {}

    def attention_of(name: str) -> Callable[..., Tensor]:
        def attention(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
        ) -> Tensor:
            logits = query @ key.transpose(-1, -2) * (options.get("scale") or query.shape[-1] ** -0.5)
            probabilities = torch.softmax(logits if attn_mask is None else logits + attn_mask, dim=-1)
            location = workload.locate(query.shape[2])
            assert location is not None
            sizes[name], image, text = location
            kept[name].append(workload.conditional(probabilities)[:, :, image, text].mean(1))
            return probabilities @ value

        return attention

    with patched(workload.network, {name: attention_of(name) for name in workload.layers}):
        workload.generate()
    by_size: dict[Size, list[Tensor]] = {}
    for name, maps in kept.items():
        by_size.setdefault(sizes[name], []).append(torch.stack(maps).float().mean(0))
    return word_maps({size: torch.stack(maps).mean(0) for size, maps in by_size.items()}, workload.tokens)


def daam(workload: Workload) -> Maps:
    if workload.joint:
        raise RuntimeError("it knows U-Nets only")
    trace = importlib.import_module("daam").trace
    with torch.inference_mode(), trace(workload.family.pipeline) as traced:
        workload.generate()
        heat = traced.compute_global_heat_map()
        words = [heat.compute_word_heat_map(word).heatmap for word in workload.prompts[0].words]
        return [torch.stack(words).float().cpu().numpy()]


def attention_map_diffusers(workload: Workload) -> Maps:
    """With all steps, as the others, and only the layers and columns that the maps need."""
    capture = importlib.import_module("attention_map_diffusers").AttentionCapture
    part = "transformer" if workload.joint else "unet"
    columns = sorted({position for words in workload.tokens for positions in words for position in positions})
    options: dict[str, Any] = {
        "timesteps": "all",
        "layers": [f"{part}.{name.removesuffix('.processor')}" for name in workload.layers],
        "key_indices": columns,
        "max_capture_bytes": None,
    }
    with torch.inference_mode(), capture(workload.family.pipeline, **options) as captured:
        workload.generate()
        by_size: dict[Size, list[Tensor]] = {}
        for record in captured.compute(compute_device=workload.device):
            size = (record.q_shape.height, record.q_shape.width)
            by_size.setdefault(size, []).append(workload.conditional(record.data).float().mean(1))
        tokens = [[tuple(columns.index(k) for k in positions) for positions in words] for words in workload.tokens]
        return word_maps({size: torch.stack(maps).mean(0) for size, maps in by_size.items()}, tokens)


def word_maps(means: Mapping[Size, Tensor], tokens: Sequence[Sequence[tuple[int, ...]]]) -> Maps:
    """Means (images x pixels x text) by grid to maps of words: the mean over all grids, resized to the finest."""
    finest = max(means)
    resized: list[Tensor] = []
    for size, mean in means.items():
        words = [torch.stack([mean[row][:, list(at)].mean(-1) for at in found]) for row, found in enumerate(tokens)]
        maps = torch.stack(words).reshape(len(words), -1, *size)
        resized.append(F.interpolate(maps, finest, mode="bilinear", align_corners=False))
    return list(torch.stack(resized).mean(0).cpu().numpy())


@dataclass(frozen=True)
class Contender:
    """A way to get the maps of words."""

    run: Callable[[Workload], Maps | None]
    same_latents: bool  # claims to leave the image unchanged
    module: str = ""  # what must be installed


CONTENDERS = {
    "plain": Contender(plain, same_latents=True),
    "synthgen": Contender(synthgen, same_latents=True),
    "daam": Contender(daam, same_latents=False, module="daam"),
    "attention-map-diffusers": Contender(attention_map_diffusers, same_latents=True, module="attention_map_diffusers"),
    "naive": Contender(naive, same_latents=False),
}
