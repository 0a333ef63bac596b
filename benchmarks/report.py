"""Write ``RESULTS.md`` from ``results/*.json``, each with its date, machine and commit."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _common import make_parser

FOLDER = Path(__file__).resolve().parent
HEAD = """# Results

Written by `python benchmarks/report.py` from `results/*.json`; `make bench` repeats the measurements of speed. The
contenders of a comparison alternate on the same machine. The machines were shared with other work (see the load), so
ratios are more reliable than rates.
"""
Figures = dict[str, Any]


def main() -> None:
    make_parser(__doc__).parse_args()
    sections: dict[str, Callable[[Figures], Iterator[str]]] = {
        "tiny": tiny_model,
        "capture-*": capture,
        "generate": generate,
        "masks": masks,
        "masks_speed": masks_speed,
        "mask_quality": mask_quality,
        "shards": shards,
        "pretrain": pretrain,
        "methods": methods,
        "heads": heads,
        "engines": engines,
        "prompts": prompts,
    }
    parts = [HEAD]
    for pattern, section in sections.items():
        for path in sorted((FOLDER / "results").glob(f"{pattern}.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            machine = record["machine"]
            where = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}, Python {machine['python']}"
            parts.append(f"## {path.stem}\n\n{record['date']}, {where}, commit {record['commit']}.\n")
            parts.append("\n\n".join(map(wrapped, section(record["figures"]))) + "\n")
    (FOLDER / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")


def wrapped(block: str) -> str:
    """A paragraph in lines of at most 120 characters; tables and headings as they are."""
    return block if block.startswith(("|", "#")) else textwrap.fill(block, 120, break_on_hyphens=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


# Each section yields its paragraphs and tables.


def tiny_model(figures: Figures) -> Iterator[str]:
    generated, pairs, composites, masks = (figures[name] for name in ("one_object", "two_objects", "held_out", "masks"))
    yield (
        f"The shipped model at its defaults ({figures['num_steps']} steps, guidance scale "
        f"{figures['guidance_scale']:g}). Images are evaluated by a classifier that was trained on training composites "
        "only. Its results on held-out composites, with their exact masks, show how reliable it is."
    )
    rows = [
        (f"one object, top-1 of {figures['objects']}", f"{generated['top1']:.3f}", f"{composites['top1']:.3f}"),
        ("two objects, both found in their masks", f"{pairs['both']:.3f}", f"{composites['both']:.3f}"),
        ("autoencoder, mean PSNR", f"{figures['vae_psnr_db']:.2f} dB", ""),
        ("weights", f"{figures['size_mb']:.1f} MB", ""),
    ]
    if "speed" in figures:
        speed = figures["speed"]
        rates = f"{speed['images_per_second']:.2f} ({speed['with_start']:.2f} including their start)"
        rows.append((f"images/s, {speed['workers']} workers of one thread, attention recorded", rates, ""))
    yield table(("figure", "model", "held-out composites"), rows)
    level = masks["levels"]["in hindsight"]
    yield (
        f"Masks of {masks['images']} held-out composites through `attend`: mean IoU with the exact masks. `level` is "
        "one threshold for all words, relative to the maximum of the map, chosen on the other half of the images (in "
        f"hindsight {level})."
    )
    counts = list(next(iter(masks["mean_iou"].values())))
    header = ["masks by", *(count if count == "all" else f"objects: {count}" for count in counts)]
    ious = []
    for name, scores in masks["mean_iou"].items():
        cells = [f"{scores[count]['mean_iou']:.3f}" for count in counts]
        cells[0] += f" ({scores['all']['low']:.3f} to {scores['all']['high']:.3f})"
        ious.append([name, *cells])
    yield table(header, ious)
    samplers = {(row["steps"], row["guidance"]): row for row in figures["samplers"]}
    num = figures["samplers"][0]["images"]
    yield f"Top-1 accuracy on {num} objects, with the same noise in all cells, and images/s."
    scales = sorted({scale for _, scale in samplers})
    accuracies = []
    for steps in sorted({steps for steps, _ in samplers}):
        row = [samplers[steps, scale] for scale in scales]
        accuracies.append([str(steps), *(f"{cell['top1']:.3f}, {cell['images_per_second']:.1f}/s" for cell in row)])
    yield table(["steps", *(f"guidance {scale:g}" for scale in scales)], accuracies)


def capture(figures: Figures) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    yield (
        f"Recording attention on {figures['device']}, {figures['dtype']}, images per batch: {figures['batch']}, "
        f"threads: {figures['threads']}; {versions}. What is random or reduced: {'; '.join(figures['random'])}. Time "
        f"and memory include making the maps of the marked words. In parentheses: quartiles of "
        f"{figures['repeat']} rounds."
    )
    for case in figures["cases"]:
        yield f"### {case['family']}, size {case['size']}"
        yield (
            f"{case['parameters'] / 1e6:.0f} million parameters, {case['resolution']} px, {case['steps']} steps, "
            f"guidance scale {case['guidance']:g}."
        )
        header = ("contender", "s/image", "time over plain", "additional peak memory", "final latents", "word maps")
        yield table(header, [(name, *capture_cells(row)) for name, row in case["contenders"].items()])


def capture_cells(row: Figures) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}", "", "", "", ""]
    time, ratio, latents = row["seconds_per_image"], row["time_over_plain"], row["latents"]
    quartiles = " to ".join(f"{value:.3f}" for value in ratio["quartiles"])
    same = "identical to the bit" if latents["identical"] else f"differ by {latents['largest_difference']:.0e}"
    exact = row.get("against_float64")
    return [
        f"{time['median']:.3f}",
        f"{ratio['median']:.3f} ({quartiles})",
        "" if row["extra_mib"] is None else f"{row['extra_mib']:+.1f} MiB",
        same,
        f"within {exact['largest_error']:.0e} of float64" if exact else "",
    ]


def generate(figures: Figures) -> Iterator[str]:
    yield f"The shipped model with {figures['steps']} steps, in batches of {figures['batch_size']}, on one thread."
    rates, ratios = figures["images_per_second"], figures["time_over_plain"]
    rows = [(name, f"{rate:.2f}", f"{ratios[name]:.2f}") for name, rate in rates.items()]
    yield table(("contender", "images/s", "time over plain"), rows)


def masks(figures: Figures) -> Iterator[str]:
    damage, settings = figures["damage"], figures["settings"]
    yield (
        "Masks compared with exact masks. `level` is one threshold for all words; `propagation` is a walk along "
        "self-attention, then a threshold. Their parameters were chosen on "
        f"{figures['tuning']} other composites ({describe(settings['level'])}; {describe(settings['propagation'])}); "
        "the others have their defaults. `gain` is the difference in mean IoU between AttentionCut and the row, with "
        "its 95 % interval over images. `outline` is the F-score of outlines within "
        f"{figures['tolerance']:g} pixels, `wrong word` the share of object pixels in the mask of another word."
    )
    sources = {
        "composites": "Held-out composites through `attend` on the shipped model.",
        "photos": "Photos. Their attention is simulated: the truth with the damage that the maps of the model have: "
        + ", ".join(f"{name} {value:g}" for name, value in damage.items())
        + ".",
    }
    for part, description in sources.items():
        if part in figures:
            yield description
            rows = [
                (f"{group} ({scores['images']} images)", name, *mask_cells(name, scores[name]))
                for group, scores in figures[part].items()
                for name in settings
            ]
            yield table(("words", "masks by", "mean IoU", "gain", "outline", "wrong word"), rows)


def mask_cells(name: str, row: Figures) -> list[str]:
    gain, low, high = row["attentioncut_gains"]
    shown = "" if name == "attentioncut" else f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
    return [f"{row['iou']:.3f}", shown, f"{row['boundary_f']:.3f}", f"{row['wrong_word']:.1%}"]


def describe(settings: Figures) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("refiner", "method"))


def masks_speed(figures: Figures) -> Iterator[str]:
    yield (
        "Drawn shapes with noisy maps of 16 × 16 cells, one thread, processor time. `whole` is AttentionCut without "
        f"its bands, by SciPy. Compilation, needed once per machine, takes {figures['compile_seconds']:.1f} s and is "
        "not included. Spots in the background have the colours of the objects; where one touches its object, "
        "`attentioncut` includes it and `grabcut` does not. The quality of masks on composites and photos is given "
        "under [masks](#masks)."
    )
    rows = []
    for case, refiners in figures.items():
        if isinstance(refiners, dict):
            for name, row in refiners.items():
                rate = row["masks_per_second"]
                ratio = rate / refiners["whole"]["masks_per_second"]
                rows.append((case, name, f"{rate:.0f}", f"{ratio:.2f}", f"{row['iou']:.3f}"))
    yield table(("case", "refiner", "masks/s", "speed over whole", "mean IoU"), rows)


def mask_quality(figures: Figures) -> Iterator[str]:
    yield "The processor time of the stage `masks` with its figures, relative to without them: the median of rounds."
    rows = [
        (case, name, f"{row['without']:.2f}", f"{row['ratio_median']:.2f}")
        for case, refiners in figures["milliseconds_per_mask"].items()
        for name, row in refiners.items()
        if isinstance(row, dict)
    ]
    yield table(("image", "refiner", "ms per mask without", "ratio"), rows)
    if confidence := figures.get("confidence"):
        yield (
            f"The confidence compared with the true IoU, on {confidence['composites']} held-out composites. The "
            "calibration error is the mean absolute difference of the two over tenths of the masks."
        )
        keys = ("mean_confidence", "mean_iou", "calibration_error", "auc_of_iou_above_half")
        rows = [
            (name, str(row["masks"]), *(f"{row[key]:.3f}" for key in keys))
            for name, row in confidence.items()
            if isinstance(row, dict)
        ]
        header = ("refiner", "masks", "mean confidence", "mean IoU", "calibration error", "AUC for IoU above 0.5")
        yield table(header, rows)


def shards(figures: Figures) -> Iterator[str]:
    yield (
        f"{figures['samples']} samples, {figures['content_mb']} MB. synthgen computes a hash and flushes to the disk; "
        "`as others` does neither."
    )
    rows = [
        (way, name, f"{row['mb_per_s']:.0f}", f"{row['times_tarfile']:.2f}")
        for way in ("write", "read")
        for name, row in figures[way].items()
    ]
    yield table(("", "contender", "MB/s", "speed over tarfile"), rows)
    opened = (
        f"{name} {row['us_per_sample']:.0f} ({row['times_tarfile']:.1f} x as fast as tarfile)"
        for name, row in figures["open"].items()
    )
    yield f"Time to open a shard for random access, µs per sample: {', '.join(opened)}."
    memory = figures["held_bytes_per_sample"]
    held = (f"{name} {value:.0f} ({value / memory['synthgen']:.0f} x)" for name, value in memory.items())
    yield f"Memory of an open shard, bytes per sample: {', '.join(held)}."
    overhead = (f"{name} {value:.1f} %" for name, value in figures["tar_overhead_percent"].items())
    yield f"Overhead of the tar format: {', '.join(overhead)}."


def pretrain(figures: Figures) -> Iterator[str]:
    yield (
        f"Training steps of MAE on {figures['device']}, threads: {figures['threads']}, compared with ViTMAE of "
        "transformers."
    )
    cases = {case: row for case, row in figures.items() if isinstance(row, dict)}
    rows = []
    for case, row in cases.items():
        rates = row["images_per_second"]
        for name, rate in rates.items():
            rows.append((f"{case}, batch {row['batch']}", name, f"{rate:.1f}", f"{rate / rates['transformers']:.2f}"))
    yield table(("case", "contender", "images/s", "speed over transformers"), rows)
    for case, row in cases.items():
        if "pretrain" in row:
            ratios = ", ".join(f"{value:.1f} x {name}" for name, value in row["loader_over_training"].items())
            yield (
                f"{case}: speed of the loader alone over training: {ratios}. A real `pretrain` waits for data "
                f"{row['pretrain']['waiting_percent']:.1f} % of its time."
            )


def methods(figures: Figures) -> Iterator[str]:
    settings, encoder = next(iter(figures["settings"].values())), figures["encoder"]
    yield (
        "All methods that learn from images alone, plain / guided by the masks: one seed, "
        f"{settings['samples_seen']:,} samples of {figures['images']:,} images of the shipped model (with earlier "
        f"weights), an encoder of width {encoder['dim']} and depth {encoder['depth']} on {encoder['image_size']} "
        "pixels. These are short trainings of a small network: the order of the methods says little about larger ones, "
        "and differences of a few hundredths may be chance. Composites are held out; photos "
        "are from Caltech-101; `knn` and `linear_probe` are accuracies, `segmentation` is a mean IoU."
    )
    scores = figures["scores"]
    names = [label.split("-")[1] for label in scores if label.endswith("-plain")]
    tasks = list(scores[f"all-{names[0]}-plain"])
    rows = [
        (
            name,
            *(
                " / ".join(f"{scores[f'all-{name}-{arm}'][task][0]:.3f}" for arm in ("plain", "guided"))
                for task in tasks
            ),
        )
        for name in names
    ]
    for name, found in figures["baselines"].items():
        rows.append((name, *(f"{found[task]:.3f}" if task in found else "" for task in tasks)))
    yield table(("method", *tasks), rows)


def heads(figures: Figures) -> Iterator[str]:
    train, test = figures["images"]
    yield (
        f"Classification heads on the activations of the shipped model (with earlier weights): {figures['classes']} "
        f"classes of held-out composites of one object, {train} for training and {test} for evaluation. Accuracy is "
        "the mean over three trainings of the head, with its 95 % interval over images; `spread` is the standard "
        "deviation over trainings. DifFeed sees half as many images per step as the attention head, at half the "
        "learning rate, so it should be compared with its own control, without feedback. The order of heads need not "
        "be the same for larger models and real photos."
    )
    rows = [
        (
            name,
            str(row["blocks"]),
            str(row["timesteps"]),
            f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['train_accuracy']:.3f}",
            f"{row.get('spread', 0):.3f}",
        )
        for name, row in figures["heads"].items()
    ]
    yield table(("head", "blocks", "timesteps", "accuracy", "training accuracy", "spread"), rows)


def engines(figures: Figures) -> Iterator[str]:
    yield (
        f"The cost of the engines for {figures['units']} units that sleep for {figures['seconds']:g} s and write one "
        "sample. `cost` is the time of a worker between two units and for writing one, as a share of a unit (means)."
    )
    rows = [
        (
            name if "worker" in name else f"{name}, {figures['workers']} workers",
            f"{row['share_of_a_unit']:.2%}",
            f"{row['between_units_ms']:.1f} ms",
            f"{row['writing_ms']:.1f} ms",
            f"{row['start_seconds']:.1f} s",
            f"{row['end_seconds']:.1f} s",
        )
        for name, row in figures["engines"].items()
    ]
    yield table(("engine", "cost", "between units", "writing", "until the first unit", "after the last unit"), rows)
    pair, large = figures["masks, 2 workers against 1"], figures["large run"]
    yield (
        f"`local` on two cores: AttentionCut masks of {pair['samples']} drawn images in {pair['units']} units. "
        "Processor time is that of all processes; plain arithmetic shows what the machine itself gains from two "
        "processes."
    )
    speedups = {
        f"whole command, with {pair['start_seconds_of_two']:.1f} s until both workers run": "speedup",
        "the same, medians": "speedup_median",
        "while the workers run": "steady_speedup",
        "by processor time": "processor_speedup",
        "plain arithmetic": "machine_speedup",
    }
    yield table(("speed of 2 workers over 1", ""), [(text, f"{pair[key]:.2f}") for text, key in speedups.items()])
    yield (
        f"A run of {large['units']:,} units: `status` takes {large['status_seconds']:.1f} s, and a command with "
        f"nothing to do {large['nothing_to_do_seconds']:.1f} s."
    )


def prompts(figures: Figures) -> Iterator[str]:
    yield (
        f"The cost of prompts of {figures['line_bytes']} bytes before the first image, without that of loading "
        "libraries: the command until its engine has the units, the same command again, and each worker until it can "
        "request its first unit. `whole list` keeps all prompts in memory in each process. Seconds are processor time."
    )
    rows = []
    for size in figures["sizes"]:
        for name in ("block by block", "whole list"):
            row = size[name]
            cells = [
                f"{row[part]['processor_seconds']:.1f} s, {row[part]['megabytes']:.1f} MB"
                for part in ("begin", "resume", "worker")
            ]
            rows.append((f"{size['prompts']:,}", name, *cells, f"{row['unit_milliseconds']:.1f} ms"))
    yield table(("prompts", "", "command", "the same again", "each worker", "a further unit"), rows)


if __name__ == "__main__":
    main()
