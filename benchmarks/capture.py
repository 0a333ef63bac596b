"""The cost of recording attention while images are generated.

``python benchmarks/capture.py --family sd sd3 flux`` writes ``results/capture-cpu.json``; with ``--device cuda --dtype
float16 --size sd15 sdxl sd3 flux`` networks of full size are measured, and the file is named after the device. Weights
are random: the images mean nothing, but time, memory and the agreement of maps do. Contenders alternate, and each makes
the maps of the marked words:

* ``plain``: the pipeline alone, without maps; the others are compared with it.
* ``synthgen``: what ``synthgen generate`` runs; it also records the self-attention between neighbours.
* ``daam`` and ``attention-map-diffusers``: the packages of those names, if they are installed.
* ``naive``: a hook script that writes out softmax(QK^T) with all its columns in the same layers, keeps the mean over
  heads for each layer and step, and averages at the end.

Memory on a CPU is the growth of the resident set, with each contender in a process of its own (Linux only). The maps of
``synthgen`` are compared with a softmax in float64.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import make_parser, rounds, write_result
from _contenders import CONTENDERS, Contender, Maps, Size, Workload, limit_steps, make_workload, patched, word_maps
from _models import FULL, PRESETS
from torch import Tensor

from synthgen.diffusion.loading import DTYPES

TOLERANCE = 1e-5  # of word maps, against a softmax in float64
RANDOM = (
    "all weights are random; those of the queries are six times as large, so that maps have a shape",
    "text encoders have the right output widths and two layers; tokenizers know each word of the prompts whole, and "
    "the positions of words are what they say",
    "the autoencoder has eight channels, so that its time and memory hide nothing of the network's",
)
MIB = 2**20


def reason_not_to_run(workload: Workload, contender: Contender, num_steps: int) -> str:
    """Why a contender fails with ``num_steps`` steps; empty if it does not."""
    if contender.module and importlib.util.find_spec(contender.module) is None:
        return "not installed"
    before = dict(workload.network.attn_processors)
    try:
        with limit_steps(workload, num_steps):
            contender.run(workload)
    except Exception as error:  # of another package, so of any type
        workload.network.set_attn_processor(before)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


@contextmanager
def final_latents(pipeline: Any) -> Iterator[list[Tensor]]:
    """A list that holds the latents after the last step of the sampler."""
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step
    latents: list[Tensor] = []

    @functools.wraps(step)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents[:] = [result[0]]
        return result

    scheduler.step = recorded
    try:
        yield latents
    finally:
        del scheduler.step


def memory_on_cpu(workload: Workload, contender: Contender, repeats: int) -> list[float]:
    """The peak growth of a contender's memory in MiB, in each of ``repeats`` runs.

    After a step that is not counted, it runs with one thread in a fork of this process, which polls its memory. Pages
    of files are not counted, since the system drops and reloads them at any time.
    """
    parent, child = mp.Pipe()

    def run() -> None:
        torch.set_num_threads(1)
        trim_memory()
        with limit_steps(workload, 1):
            contender.run(workload)
        for _ in range(repeats):
            trim_memory()
            child.send("ready")
            child.recv()
            contender.run(workload)
            child.send("done")
            child.recv()

    process = mp.get_context("fork").Process(target=run, daemon=True)
    process.start()
    child.close()
    assert process.pid is not None
    peaks = []
    try:
        for _ in range(repeats):
            parent.recv()
            before = peak = anonymous_mib(process.pid)
            parent.send("run")
            while not parent.poll(0.0005):
                peak = max(peak, anonymous_mib(process.pid))
            parent.recv()
            parent.send("continue")
            peaks.append(peak - before)
    except EOFError:
        process.join()
        raise RuntimeError(f"the measured process exited with {process.exitcode}") from None
    process.join()
    return peaks


def trim_memory() -> None:
    """Return freed blocks of 0.25 MiB and more to the system, so that resident memory is memory in use."""
    gc.collect()
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # a C library other than glibc
        libc.mallopt(-3, MIB // 4)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, MIB // 4)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def anonymous_mib(pid: int) -> float:
    """The resident memory of a process without that of files, in MiB (Linux)."""
    _, _, rest = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").partition("RssAnon:")
    return int(rest.split(maxsplit=1)[0]) / 1024 if rest else 0.0  # a process that has ended has no such line


def run_rounds(
    workload: Workload, names: Sequence[str], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Tensor], dict[str, Maps]]:
    """The seconds, CUDA memory peaks in MiB, final latents and maps of alternating contenders."""
    peaks: dict[str, list[float]] = {name: [] for name in names}
    latents: dict[str, Tensor] = {}
    maps: dict[str, Maps] = {}
    cuda = workload.device.startswith("cuda")

    def run(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        made = CONTENDERS[name].run(workload)
        if cuda:
            torch.cuda.synchronize()
            peaks[name].append((torch.cuda.max_memory_allocated() - before) / MIB)
        if made is not None:
            maps[name] = made
        latents[name] = last[0]

    with final_latents(workload.family.pipeline) as last:
        seconds = rounds({name: functools.partial(run, name) for name in names}, repeats)
    return seconds, {name: values[1:] for name, values in peaks.items()}, latents, maps


def exactness(workload: Workload) -> dict[str, Any]:
    """The error of synthgen's word maps against a softmax in float64 over the same queries and keys, for two steps."""
    sums: dict[Size, Tensor] = {}
    counts: dict[Size, int] = {}

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        location = workload.locate(query.shape[2])
        assert location is not None
        size, image, text = location
        q, k = workload.conditional(query)[:, :, image], workload.conditional(key).double()
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        for head in range(q.shape[1]):
            logits = q[:, head].double() @ k[:, head].transpose(-1, -2) * scale
            columns = torch.softmax(logits, dim=-1)[..., text] / q.shape[1]
            sums[size] = sums[size] + columns if size in sums else columns
        counts[size] = counts.get(size, 0) + 1
        return F.scaled_dot_product_attention(query, key, *args, **kwargs)

    with limit_steps(workload, 2):
        recorder = workload.generate(recorded=True)
        with patched(workload.network, dict.fromkeys(workload.layers, attention)):
            workload.generate()
        num_steps = workload.family.sampling.num_steps
    means = {size: total / counts[size] for size, total in sums.items()}
    error = 0.0
    for size, mean in means.items():
        found = recorder._cross[size] / recorder._counts[size]
        for row, words in enumerate(workload.tokens):
            for number, at in enumerate(words):
                expected = mean[row][:, list(at)].mean(-1)
                error = max(error, float((found[row, number] - expected).abs().max()))
    pairs = zip(recorder.weights(), word_maps(means, workload.tokens), strict=True)
    stored = max(float(np.abs(one - other).max()) for one, other in pairs)
    return {
        "largest_error": error,
        "largest_error_as_stored": stored,  # in float16
        "largest_value": max(float(mean.max()) for mean in means.values()),
        "agree": error <= TOLERANCE,
        "steps": num_steps,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


def measure(family: str, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one network."""
    torch.set_num_threads(1)  # a process with more threads cannot be forked
    workload = make_workload(family, size, args)
    cuda = workload.device.startswith("cuda")
    sampling = workload.family.sampling
    selected = {name: CONTENDERS[name] for name in CONTENDERS if name in args.contenders or name == "plain"}
    reasons = {
        name: reason_not_to_run(workload, contender, sampling.num_steps if cuda else 1)
        for name, contender in selected.items()
    }
    names = [name for name, reason in reasons.items() if not reason]
    linux = not cuda and Path("/proc/self/status").is_file()
    peaks = {name: memory_on_cpu(workload, selected[name], min(2, args.repeat)) for name in names} if linux else {}
    torch.set_num_threads(args.threads)
    seconds, peaks_on_cuda, latents, maps = run_rounds(workload, names, args.repeat)
    peaks = peaks_on_cuda if cuda else peaks
    rows: dict[str, Any] = {}
    for name, reason in reasons.items():
        if reason:
            rows[name] = {"not_run": reason}
            continue
        ratios = [one / other for one, other in zip(seconds[name], seconds["plain"], strict=True)]
        difference = (latents[name].double() - latents["plain"].double()).abs().max()
        rows[name] = {
            "seconds_per_image": spread([one / args.batch for one in seconds[name]]),
            "time_over_plain": spread(ratios),
            "peak_mib": spread(peaks[name]) if peaks else None,
            "extra_mib": round(statistics.median(peaks[name]) - statistics.median(peaks["plain"]), 2)
            if peaks
            else None,
            "latents": {
                "claimed_identical": selected[name].same_latents,
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
        rows["synthgen"]["against_float64"] = exactness(workload)
    prompts = zip(workload.prompts, workload.tokens, strict=True)
    return {
        "family": family,
        "size": size,
        "network": PRESETS[family, size].network,
        "parameters": sum(weight.numel() for weight in workload.network.parameters()),
        "resolution": sampling.height,
        "steps": sampling.num_steps,
        "guidance": sampling.guidance_scale,
        "recorded_layers": len(workload.layers),
        "positions": [dict(zip(prompt.words, map(list, found), strict=True)) for prompt, found in prompts],
        "contenders": rows,
    }


def cases(args: argparse.Namespace, fail: Callable[[str], Any]) -> list[tuple[str, str]]:
    """Pairs of family and size; a full size determines its family."""
    found = []
    for size in args.size:
        families = [FULL[size]] if size in FULL else args.family or ["sd"]
        if size in FULL and args.family and FULL[size] not in args.family:
            fail(f"--size {size} belongs to --family {FULL[size]}, not {' or '.join(args.family)}")
        found += [(family, size) for family in families]
    return found


def packages() -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for name in ("diffusers", "transformers", "daam", "attention-map-diffusers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and write ``results/capture-DEVICE.json``."""
    parser = make_parser(__doc__)
    families, sizes = list(dict.fromkeys(family for family, _ in PRESETS)), ["tiny", "small", *FULL]
    parser.add_argument("--family", nargs="+", choices=families, help="for sizes tiny and small (sd)")
    parser.add_argument(
        "--size", nargs="+", choices=sizes, default=["small"], help="the last four are full sizes, as published"
    )
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--resolution", type=int, help="pixels a side; default: usual for the size")
    parser.add_argument("--steps", type=int, help="default: usual for the size")
    parser.add_argument("--guidance", type=float, help="default: usual for the family")
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    args = parser.parse_args(arguments)
    chosen = cases(args, parser.error)
    importlib.import_module("diffusers").logging.set_verbosity_error()
    figures: dict[str, Any] = {
        "device": device_name(args.device),
        "dtype": args.dtype,
        "batch": args.batch,
        "threads": args.threads,
        "repeat": args.repeat,
        "versions": packages(),
        "random": list(RANDOM),
        "cases": [],
    }
    for family, size in chosen:
        figures["cases"].append(measure(family, size, args))
        show(figures["cases"][-1])
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    name = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    print(write_result(f"capture-{name}", figures))
    return figures


def show(case: Mapping[str, Any]) -> None:
    """Print the figures of a case."""
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
