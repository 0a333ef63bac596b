"""What it costs to record attention while images are made, beside other ways to get the maps of words.

``python benchmarks/capture.py --family sd sd3 flux`` writes ``results/capture-cpu.json``; with ``--device cuda --dtype
float16 --size sd15 sdxl sd3 flux`` networks of full size are measured, and the file is named after the device. Weights
are random: the images mean nothing, time, memory and the agreement of maps do. Contenders take turns, and each makes
the maps of the marked words:

* ``plain``: the pipeline alone, without maps; all else is measured against it.
* ``synthgen``: what ``synthgen generate`` runs, which also keeps the self-attention between neighbours.
* ``daam`` and ``attention-map-diffusers``: the packages of those names, where they are installed.
* ``naive``: a hook script. The layers that count write out softmax(QK^T) with all its columns; the mean over heads is
  kept for each layer and step, and averaged at the end.

Memory on a CPU is what the resident set grows by, each contender in a process of its own (Linux only).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import ctypes
import functools
import gc
import importlib
import importlib.util
import multiprocessing as mp
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import rounds, write_result
from _models import FULL, PRESETS, make_pipeline
from torch import Tensor

from synthgen.attention.words import locate_in_encoders
from synthgen.diffusion import FAMILIES, Sampling
from synthgen.diffusion.loading import DTYPES
from synthgen.prompts import parse_line

LINES = (
    "a photo of a [dog] and an [umbrella] on the [grass]",
    "the [cat] under an [umbrella] in the [park]",
    "a [dog] and a [cat] in a photo of the [park]",
)
TOLERANCE = 1e-5  # of word maps, against a softmax in float64
RANDOM = (
    "all weights are random; those of the queries are six times as large, so that maps have a shape",
    "text encoders have the right output widths and two layers; tokenizers know each word of the prompts whole, and "
    "the positions of words are what they say",
    "the autoencoder has eight channels, so that its time and memory hide nothing of the network's",
)
MIB = 2**20
Size = tuple[int, int]
Maps = list[np.ndarray]  # for each image, words x rows x columns


# -- what is drawn


@dataclass
class Scene:
    """A pipeline with prompts, and where the attention that makes the words' maps is."""

    family: Any  # of synthgen.diffusion
    prompts: Sequence[Any]
    tokens: list[list[tuple[int, ...]]]
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
        """The grids whose attention to the text counts, by their number of tokens; the finest first."""
        found = {}
        for level in sorted(self.family.selection.cross_levels):
            rows, columns = self.family.grid(*self.family.size)
            for _ in range(level.bit_length() - 1):
                rows, columns = -(-rows // 2), -(-columns // 2)
            found[rows * columns] = (rows, columns)
        return found

    def place(self, queries: int) -> tuple[Size, slice, slice] | None:
        """The grid of a layer with so many queries, its image's rows and its text's columns; None if it is not used."""
        if not self.joint:
            return (self.sizes[queries], slice(None), slice(None)) if queries in self.sizes else None
        ((pixels, size),) = self.sizes.items()
        if queries <= pixels:
            return None
        if self.family.text == "first":
            return size, slice(queries - pixels, queries), slice(0, queries - pixels)
        return size, slice(0, pixels), slice(pixels, queries)

    @functools.cached_property
    def candidates(self) -> list[str]:
        """The names of processors that may attend to the text."""
        names = (name for name in self.network.attn_processors if name.startswith(self.family.selection.layers))
        return [name for name in names if self.joint or "attn2" in name]

    @functools.cached_property
    def layers(self) -> list[str]:
        """Those of them that count, found by looking on for one step."""
        found = []

        def attention_of(name: str) -> Callable[..., Tensor]:
            def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if self.place(query.shape[2]):
                    found.append(name)
                return F.scaled_dot_product_attention(query, *args, **kwargs)

            return attention

        with steps(self, 1), swapped(self.network, {name: attention_of(name) for name in self.candidates}):
            self.draw()
        return list(dict.fromkeys(found))

    def conditional(self, values: Tensor) -> Tensor:
        """The conditional half of a batch."""
        return values.chunk(2)[1] if self.family.uses_cfg() else values

    def draw(self, *, recorded: bool = False) -> Any:
        """Draw the images; returns the recorder."""
        texts, seeds = [prompt.text for prompt in self.prompts], list(range(len(self.prompts)))
        return self.family.sample(texts, seeds, self.tokens if recorded else [], recorded=recorded)[1]


def make_scene(family: str, size: str, options: argparse.Namespace) -> Scene:
    preset = PRESETS[family, size]
    pipeline = make_pipeline(family, preset, dtype=DTYPES[options.dtype], device=options.device)
    kind = FAMILIES[type(pipeline).__name__]
    side = options.resolution or preset.resolution
    guidance = kind.guidance_scale if options.guidance is None else options.guidance
    sampling = Sampling(options.steps or preset.steps or kind.num_steps, guidance, "", side, side)
    drawn = kind(pipeline, sampling, kind.default_selection)
    prompts = [parse_line(LINES[row % len(LINES)]) for row in range(options.batch)]
    encoders = drawn.encoders()
    tokens = [list(locate_in_encoders(encoders, prompt).positions) for prompt in prompts]
    return Scene(drawn, prompts, tokens, options.device)


@contextmanager
def steps(scene: Scene, num: int) -> Iterator[None]:
    """Draw with at most ``num`` steps."""
    before = scene.family.sampling
    scene.family.sampling = replace(before, num_steps=min(num, before.num_steps))
    try:
        yield
    finally:
        scene.family.sampling = before


class Swapped:
    """An attention processor that runs with another function in place of PyTorch's attention."""

    def __init__(self, inner: Any, attention: Callable[..., Tensor]) -> None:
        self.inner, self.attention = inner, attention

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """What the inner processor does, as long as it lasts with the other attention."""
        before = F.scaled_dot_product_attention

        def attention(*args: Any, **kwargs: Any) -> Tensor:
            F.scaled_dot_product_attention = before  # which the new function may itself call
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
def swapped(network: Any, attentions: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Layers by the names of their processors with another attention; afterwards the network is as it was."""
    before = dict(network.attn_processors)
    network.set_attn_processor({**before, **{name: Swapped(before[name], attentions[name]) for name in attentions}})
    try:
        yield
    finally:
        network.set_attn_processor(before)


# -- the contenders


def plain(scene: Scene) -> None:
    scene.draw()


def synthgen(scene: Scene) -> Maps:
    recorder = scene.draw(recorded=True)
    recorder.affinity()
    weights: Maps = recorder.weights()
    return weights


def naive(scene: Scene) -> Maps:
    kept: dict[str, list[Tensor]] = {name: [] for name in scene.layers}
    sizes: dict[str, Size] = {}

    def attention_of(name: str) -> Callable[..., Tensor]:
        def attention(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
        ) -> Tensor:
            logits = query @ key.transpose(-1, -2) * (options.get("scale") or query.shape[-1] ** -0.5)
            probabilities = torch.softmax(logits if attn_mask is None else logits + attn_mask, dim=-1)
            place = scene.place(query.shape[2])
            assert place is not None
            sizes[name], image, text = place
            kept[name].append(scene.conditional(probabilities)[:, :, image, text].mean(1))
            return probabilities @ value

        return attention

    with swapped(scene.network, {name: attention_of(name) for name in scene.layers}):
        scene.draw()
    by_size: dict[Size, list[Tensor]] = {}
    for name, maps in kept.items():
        by_size.setdefault(sizes[name], []).append(torch.stack(maps).float().mean(0))
    return word_maps({size: torch.stack(maps).mean(0) for size, maps in by_size.items()}, scene.tokens)


def daam(scene: Scene) -> Maps:
    if scene.joint:
        raise RuntimeError("it knows U-Nets only")
    trace = importlib.import_module("daam").trace
    with torch.inference_mode(), trace(scene.family.pipeline) as traced:
        scene.draw()
        heat = traced.compute_global_heat_map()
        words = [heat.compute_word_heat_map(word).heatmap for word in scene.prompts[0].words]
        return [torch.stack(words).float().cpu().numpy()]


def attention_map_diffusers(scene: Scene) -> Maps:
    """All steps, as the others; no other layers and columns than what the maps need."""
    capture = importlib.import_module("attention_map_diffusers").AttentionCapture
    part = "transformer" if scene.joint else "unet"
    columns = sorted({place for words in scene.tokens for places in words for place in places})
    options: dict[str, Any] = {
        "timesteps": "all",
        "layers": [f"{part}.{name.removesuffix('.processor')}" for name in scene.layers],
        "key_indices": columns,
        "max_capture_bytes": None,
    }
    with torch.inference_mode(), capture(scene.family.pipeline, **options) as captured:
        scene.draw()
        by_size: dict[Size, list[Tensor]] = {}
        for record in captured.compute(compute_device=scene.device):
            size = (record.q_shape.height, record.q_shape.width)
            by_size.setdefault(size, []).append(scene.conditional(record.data).float().mean(1))
        tokens = [[tuple(columns.index(place) for place in places) for places in words] for words in scene.tokens]
        return word_maps({size: torch.stack(maps).mean(0) for size, maps in by_size.items()}, tokens)


def word_maps(means: Mapping[Size, Tensor], tokens: Sequence[Sequence[tuple[int, ...]]]) -> Maps:
    """Means (images x pixels x text) by grid to maps of words: every grid on the finest, all alike."""
    finest = max(means)
    merged: list[Tensor] = []
    for size, mean in means.items():
        words = [torch.stack([mean[row][:, list(at)].mean(-1) for at in found]) for row, found in enumerate(tokens)]
        maps = torch.stack(words).reshape(len(words), -1, *size)
        merged.append(F.interpolate(maps, finest, mode="bilinear", align_corners=False))
    return list(torch.stack(merged).mean(0).cpu().numpy())


@dataclass(frozen=True)
class Contender:
    """A way to get the maps of words."""

    run: Callable[[Scene], Maps | None]
    same_latents: bool  # claims to leave the image unchanged
    module: str = ""  # what must be installed


CONTENDERS = {
    "plain": Contender(plain, same_latents=True),
    "synthgen": Contender(synthgen, same_latents=True),
    "daam": Contender(daam, same_latents=False, module="daam"),
    "attention-map-diffusers": Contender(attention_map_diffusers, same_latents=True, module="attention_map_diffusers"),
    "naive": Contender(naive, same_latents=False),
}


# -- what is measured


def reason_not_to_run(scene: Scene, contender: Contender, num_steps: int) -> str:
    """Empty where a contender runs through with so few steps, else why it is left out."""
    if contender.module and importlib.util.find_spec(contender.module) is None:
        return "not installed"
    before = dict(scene.network.attn_processors)
    try:
        with steps(scene, num_steps):
            contender.run(scene)
    except Exception as error:  # whatever a package of others raises
        scene.network.set_attn_processor(before)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


@contextmanager
def final_latents(pipeline: Any) -> Iterator[list[Tensor]]:
    """A list that holds the latents after the sampler's last step."""
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step
    seen: list[Tensor] = []

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen[:] = [result[0]]
        return result

    scheduler.step = watched
    try:
        yield seen
    finally:
        del scheduler.step


def memory_on_cpu(scene: Scene, contender: Contender, repeats: int) -> list[float]:
    """MiB by which a contender's own memory grows at most, in a process of its own that begins as a copy of this one.

    It runs on one thread, after a first step that is not counted. This process looks on: pages that come from files
    are not counted, since the system takes and brings them back as it pleases.
    """
    here, there = mp.Pipe()

    def run() -> None:
        torch.set_num_threads(1)
        give_back_at_once()
        with steps(scene, 1):
            contender.run(scene)
        for _ in range(repeats):
            give_back_at_once()
            there.send("begins")
            there.recv()
            contender.run(scene)
            there.send("ended")
            there.recv()

    child = mp.get_context("fork").Process(target=run, daemon=True)
    child.start()
    there.close()
    assert child.pid is not None
    peaks = []
    try:
        for _ in range(repeats):
            here.recv()
            before = peak = anonymous(child.pid)
            here.send("go on")
            while not here.poll(0.0005):
                peak = max(peak, anonymous(child.pid))
            here.recv()
            here.send("go on")
            peaks.append(peak - before)
    except EOFError:
        child.join()
        raise RuntimeError(f"the process that memory was measured in ended with {child.exitcode}") from None
    child.join()
    return peaks


def give_back_at_once() -> None:
    """Let freed blocks of a quarter of a MiB and more go back to the system, so that what is resident is in use."""
    gc.collect()
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # another C library than glibc
        libc.mallopt(-3, MIB // 4)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, MIB // 4)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def anonymous(pid: int) -> float:
    """Resident memory of a process that is no file's, in MiB (Linux)."""
    _, _, rest = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").partition("RssAnon:")
    return int(rest.split(maxsplit=1)[0]) / 1024 if rest else 0.0  # a process that ended tells nothing


def turns(
    scene: Scene, names: Sequence[str], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Tensor], dict[str, Maps]]:
    """Seconds, CUDA's peaks in MiB, final latents and maps of contenders that take turns."""
    peaks: dict[str, list[float]] = {name: [] for name in names}
    latents: dict[str, Tensor] = {}
    maps: dict[str, Maps] = {}
    cuda = scene.device.startswith("cuda")

    def run(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        made = CONTENDERS[name].run(scene)
        if cuda:
            torch.cuda.synchronize()
            peaks[name].append((torch.cuda.max_memory_allocated() - before) / MIB)
        if made is not None:
            maps[name] = made
        latents[name] = seen[0]

    with final_latents(scene.family.pipeline) as seen:
        seconds = rounds({name: functools.partial(run, name) for name in names}, repeats)
    return seconds, {name: found[1:] for name, found in peaks.items()}, latents, maps


def exactness(scene: Scene) -> dict[str, Any]:
    """How far synthgen's word maps are from a softmax in float64 over the same queries and keys, two steps long."""
    sums: dict[Size, Tensor] = {}
    counts: dict[Size, int] = {}

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place = scene.place(query.shape[2])
        assert place is not None
        size, image, text = place
        q, k = scene.conditional(query)[:, :, image], scene.conditional(key).double()
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        for head in range(q.shape[1]):
            logits = q[:, head].double() @ k[:, head].transpose(-1, -2) * scale
            columns = torch.softmax(logits, dim=-1)[..., text] / q.shape[1]
            sums[size] = sums[size] + columns if size in sums else columns
        counts[size] = counts.get(size, 0) + 1
        return F.scaled_dot_product_attention(query, key, *args, **kwargs)

    with steps(scene, 2):
        recorder = scene.draw(recorded=True)
        with swapped(scene.network, dict.fromkeys(scene.layers, attention)):
            scene.draw()
        num_steps = scene.family.sampling.num_steps
    means = {size: total / counts[size] for size, total in sums.items()}
    error = 0.0
    for size, mean in means.items():
        found = recorder._cross[size] / recorder._counts[size]
        for row, words in enumerate(scene.tokens):
            for number, at in enumerate(words):
                expected = mean[row][:, list(at)].mean(-1)
                error = max(error, float((found[row, number] - expected).abs().max()))
    pairs = zip(recorder.weights(), word_maps(means, scene.tokens), strict=True)
    stored = max(float(np.abs(one - other).max()) for one, other in pairs)
    return {
        "largest_error": error,
        "largest_error_as_stored": stored,  # in float16
        "largest_value": max(float(mean.max()) for mean in means.values()),
        "agree": error <= TOLERANCE,
        "steps": num_steps,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


def measure(family: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one network."""
    torch.set_num_threads(1)  # a process that computed with more cannot be copied
    scene = make_scene(family, size, options)
    cuda = scene.device.startswith("cuda")
    sampling = scene.family.sampling
    asked = {name: CONTENDERS[name] for name in CONTENDERS if name in options.contenders or name == "plain"}
    tried = {
        name: reason_not_to_run(scene, contender, sampling.num_steps if cuda else 1)
        for name, contender in asked.items()
    }
    names = [name for name, reason in tried.items() if not reason]
    linux = not cuda and Path("/proc/self/status").is_file()
    peaks = {name: memory_on_cpu(scene, asked[name], min(2, options.repeat)) for name in names} if linux else {}
    torch.set_num_threads(options.threads)
    seconds, peaks_on_cuda, latents, maps = turns(scene, names, options.repeat)
    peaks = peaks_on_cuda if cuda else peaks
    rows: dict[str, Any] = {}
    for name, reason in tried.items():
        if reason:
            rows[name] = {"not_run": reason}
            continue
        ratios = [one / other for one, other in zip(seconds[name], seconds["plain"], strict=True)]
        difference = (latents[name].double() - latents["plain"].double()).abs().max()
        rows[name] = {
            "seconds_per_image": spread([one / options.batch for one in seconds[name]]),
            "time_over_plain": spread(ratios),
            "peak_mib": spread(peaks[name]) if peaks else None,
            "extra_mib": round(statistics.median(peaks[name]) - statistics.median(peaks["plain"]), 2)
            if peaks
            else None,
            "latents": {
                "claimed_identical": asked[name].same_latents,
                "identical": torch.equal(latents[name], latents["plain"]),
                "largest_difference": float(difference / latents["plain"].double().abs().max()),
            },
        }
        if name in maps:
            same = "synthgen" in maps and maps[name][0].shape == maps["synthgen"][0].shape
            pairs = zip(maps[name], maps["synthgen"], strict=True) if same else ()
            rows[name]["maps"] = {
                "shape": list(maps[name][0].shape),
                "largest_difference_to_synthgen": max((float(np.abs(a - b).max()) for a, b in pairs), default=None),
            }
    if "synthgen" in names:
        rows["synthgen"]["against_float64"] = exactness(scene)
    prompts = zip(scene.prompts, scene.tokens, strict=True)
    return {
        "family": family,
        "size": size,
        "network": PRESETS[family, size].network,
        "parameters": sum(weight.numel() for weight in scene.network.parameters()),
        "resolution": sampling.height,
        "steps": sampling.num_steps,
        "guidance": sampling.guidance_scale,
        "recorded_layers": len(scene.layers),
        "positions": [dict(zip(prompt.words, map(list, found), strict=True)) for prompt, found in prompts],
        "contenders": rows,
    }


def cases(options: argparse.Namespace, fail: Callable[[str], Any]) -> list[tuple[str, str]]:
    """Families and sizes; a size that is of one family needs none."""
    found = []
    for size in options.size:
        families = [FULL[size]] if size in FULL else options.family or ["sd"]
        if size in FULL and options.family and FULL[size] not in options.family:
            fail(f"--size {size} is of family {FULL[size]}, not of {' or '.join(options.family)}")
        found += [(family, size) for family in families]
    return found


def packages() -> dict[str, str]:
    found = {}
    for name in ("diffusers", "transformers", "daam", "attention-map-diffusers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and write ``results/capture-DEVICE.json``."""
    parser = argparse.ArgumentParser(prog="python benchmarks/capture.py", description=(__doc__ or "").splitlines()[0])
    families, sizes = list(dict.fromkeys(family for family, _ in PRESETS)), ["tiny", "small", *FULL]
    parser.add_argument("--family", nargs="+", choices=families, help="of tiny and small networks (sd)")
    parser.add_argument("--size", nargs="+", choices=sizes, default=["small"], help="the last four as published")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--resolution", type=int, help="pixels of a side; usual for the size if left out")
    parser.add_argument("--steps", type=int, help="usual for the size if left out")
    parser.add_argument("--guidance", type=float, help="usual for the family if left out")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="rounds that count")
    options = parser.parse_args(arguments)
    chosen = cases(options, parser.error)
    importlib.import_module("diffusers").logging.set_verbosity_error()
    figures: dict[str, Any] = {
        "device": device_name(options.device),
        "dtype": options.dtype,
        "batch": options.batch,
        "threads": options.threads,
        "repeat": options.repeat,
        "versions": packages(),
        "random": list(RANDOM),
        "cases": [],
    }
    for family, size in chosen:
        figures["cases"].append(measure(family, size, options))
        show(figures["cases"][-1])
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    name = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    print(write_result(f"capture-{name}", figures))
    return figures


def show(case: Mapping[str, Any]) -> None:
    print(f"{case['family']} {case['size']}, {case['resolution']} px, {case['steps']} steps")
    for name, row in case["contenders"].items():
        if "not_run" in row:
            print(f"  {name}: not run: {row['not_run']}")
            continue
        time, ratio = row["seconds_per_image"]["median"], row["time_over_plain"]["median"]
        same = "latents as plain's" if row["latents"]["identical"] else "other latents"
        extra = "" if row["extra_mib"] is None else f", {row['extra_mib']:+.1f} MiB"
        print(f"  {name}: {time:.3f} s an image, {ratio:.3f} x plain{extra}, {same}")
        if "against_float64" in row:
            print(f"    word maps within {row['against_float64']['largest_error']:.1e} of float64", flush=True)


if __name__ == "__main__":
    main()
