"""Write ``RESULTS.md`` from ``results/*.json``: the ratios, with date, machine and commit beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
HEAD = """# Results

Written by `python benchmarks/report.py` from `results/*.json`; `make bench` measures anew. Contenders take turns in one
process. The machines are shared and noisy (see the load): read the ratios, not the rates.
"""


def main() -> None:
    parts = [HEAD]
    tables = {
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
    for names, table in tables.items():
        for path in sorted((FOLDER / "results").glob(f"{names}.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            about = record["machine"]
            where = f"{about['cpu']}, {about['cores']} cores, load {about['load']}, Python {about['python']}"
            parts.append(f"## {path.stem}\n\n{record['date']}, {where}, commit {record['commit']}.\n")
            parts.append("\n".join(table(record["figures"])) + "\n")
    (FOLDER / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")


def tiny_model(figures: dict[str, Any]) -> Iterator[str]:
    drawn, pairs, real, pointing = (figures[name] for name in ("one_object", "two_objects", "held_out", "masks"))
    default = f"{figures['num_steps']} steps, guidance {figures['guidance_scale']:g}"
    yield f"The shipped model at its defaults ({default}). The judge is a classifier that was trained on composites of"
    yield "training alone; held-out composites, judged by their exact masks, show how far it can be trusted.\n"
    yield "| figure | model | held-out composites |\n| --- | --- | --- |"
    yield f"| one object, top-1 of {figures['objects']} | {drawn['top1']:.3f} | {real['top1']:.3f} |"
    yield f"| two objects, both found in their masks | {pairs['both']:.3f} | {real['both']:.3f} |"
    yield f"| autoencoder, mean PSNR | {figures['vae_psnr_db']:.2f} dB | |"
    yield f"| weights | {figures['size_mb']:.1f} MB | |"
    if "speed" in figures:
        speed = figures["speed"]
        where = f"{speed['workers']} workers of one thread, attention recorded"
        yield f"| images/s, {where} | {speed['images_per_second']:.2f} ({speed['with_start']:.2f} with their start) | |"
    counts = list(next(iter(pointing["mean_iou"].values())))
    level = pointing["levels"]["in hindsight"]
    yield f"\nMasks of {pointing['images']} held-out composites through `attend`, mean IoU with the exact ones. `level`"
    yield f"is one share of the maximum for all words, chosen on the other half of the images (in hindsight {level}).\n"
    yield f"| masks by | {' | '.join(count if count == 'all' else f'objects: {count}' for count in counts)} |"
    yield f"| --- |{' --- |' * len(counts)}"
    for name, rows in pointing["mean_iou"].items():
        cells = [f"{rows[count]['mean_iou']:.3f}" for count in counts]
        cells[0] += f" ({rows['all']['low']:.3f} to {rows['all']['high']:.3f})"
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"\nTop-1 of {figures['samplers'][0]['images']} objects, the same noise in all cells, and images/s.\n"
    scales = sorted({row["guidance"] for row in figures["samplers"]})
    yield f"| steps | {' | '.join(f'guidance {scale:g}' for scale in scales)} |\n| --- |{' --- |' * len(scales)}"
    cell = {(row["steps"], row["guidance"]): row for row in figures["samplers"]}
    for steps in sorted({row["steps"] for row in figures["samplers"]}):
        row = [cell[steps, scale] for scale in scales]
        shown = [f"{one['top1']:.3f}, {one['images_per_second']:.1f}/s" for one in row]
        yield f"| {steps} | {' | '.join(shown)} |"


def capture(figures: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    setting = f"{figures['dtype']}, images at once: {figures['batch']}, threads: {figures['threads']}"
    yield f"Recording attention on {figures['device']}, {setting}; {versions}. What was random:"
    yield (
        "; ".join(figures["random"]) + ". Time and memory include making the maps of the marked words; in brackets the"
    )
    yield f"quartiles of {figures['repeat']} rounds.\n"
    for case in figures["cases"]:
        about = f"{case['parameters'] / 1e6:.0f} million parameters, {case['resolution']} px, {case['steps']} steps"
        yield f"### {case['family']}, size {case['size']}\n\n{about}, guidance {case['guidance']:g}.\n"
        yield "| contender | s/image | time over plain | more peak memory | final latents | word maps |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for name, row in case["contenders"].items():
            yield f"| {name} | {' | '.join(capture_cells(row))} |"
        yield ""


def capture_cells(row: dict[str, Any]) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}", "", "", "", ""]
    time, ratio, latents = row["seconds_per_image"], row["time_over_plain"], row["latents"]
    spread = " to ".join(f"{value:.3f}" for value in ratio["quartiles"])
    same = "as plain's, to the bit" if latents["identical"] else f"differ by {latents['largest_difference']:.0e}"
    exact = row.get("against_float64")
    return [
        f"{time['median']:.3f}",
        f"{ratio['median']:.3f} ({spread})",
        "" if row["extra_mib"] is None else f"{row['extra_mib']:+.1f} MiB",
        same,
        f"within {exact['largest_error']:.0e} of float64" if exact else "",
    ]


def generate(figures: dict[str, Any]) -> Iterator[str]:
    yield f"Images of the shipped model, {figures['steps']} steps, batches of {figures['batch_size']}, one thread.\n"
    yield "| contender | images/s | time over plain |\n| --- | --- | --- |"
    for name, rate in figures["images_per_second"].items():
        yield f"| {name} | {rate:.2f} | {figures['time_over_plain'][name]:.2f} |"


def masks(figures: dict[str, Any]) -> Iterator[str]:
    damage, settings = figures["damage"], figures["settings"]
    yield "Masks against exact ones. `level` is one level for all words, `propagation` a walk along self-attention to"
    yield f"such a level, both chosen on {figures['tuning']} other composites ({describe(settings['level'])};"
    yield f"{describe(settings['propagation'])}); the others have their defaults. `gain` is by how much AttentionCut is"
    yield "better in mean IoU, with its interval over images (95 %). `wrong word` is the share of objects' pixels that"
    yield f"another word's mask has, `outline` the F-score of outlines within {figures['tolerance']:g} pixels.\n"
    for part, about in {
        "composites": "Held-out composites through `attend` on the shipped model",
        "photos": "Real photos; their attention is the truth, damaged as the model's own maps are: "
        + ", ".join(f"{name} {value:g}" for name, value in damage.items()),
    }.items():
        if part not in figures:
            continue
        yield f"{about}.\n\n| words | masks by | mean IoU | gain | outline | wrong word |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for group, rows in figures[part].items():
            for name in settings:
                row = rows[name]
                gain, low, high = row["attentioncut_gains"]
                shown = "" if name == "attentioncut" else f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
                figures_of = f"{row['iou']:.3f} | {shown} | {row['boundary_f']:.3f} | {row['wrong_word']:.1%}"
                yield f"| {group} ({rows['images']} images) | {name} | {figures_of} |"
        yield ""


def describe(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("refiner", "method"))


def masks_speed(figures: dict[str, Any]) -> Iterator[str]:
    yield "Drawn shapes, noisy maps of 16 × 16 cells, one thread, processor time. `whole` is AttentionCut without its"
    yield f"bands, by SciPy. Compiling, once a machine, takes {figures['compile_seconds']:.1f} s and is not counted."
    yield "Spots of the objects' colours lie behind them; where one touches its object, `attentioncut` takes it along,"
    yield "and `grabcut` does not. What masks are worth on composites and photos stands under [masks](#masks).\n"
    yield "| case | refiner | masks/s | speed over whole | mean IoU |\n| --- | --- | --- | --- | --- |"
    for case, refiners in figures.items():
        if isinstance(refiners, dict):
            for name, row in refiners.items():
                ratio = row["masks_per_second"] / refiners["whole"]["masks_per_second"]
                yield f"| {case} | {name} | {row['masks_per_second']:.0f} | {ratio:.2f} | {row['iou']:.3f} |"


def mask_quality(figures: dict[str, Any]) -> Iterator[str]:
    yield "The stage `masks` with its figures over without them, in processor time: the median of rounds.\n"
    yield "| image | refiner | ms a mask without | ratio |\n| --- | --- | --- | --- |"
    for case, refiners in figures["milliseconds_per_mask"].items():
        for name, row in refiners.items():
            if isinstance(row, dict):
                yield f"| {case} | {name} | {row['without']:.2f} | {row['ratio_median']:.2f} |"
    if worth := figures.get("confidence"):
        yield f"\nConfidence beside true IoU, of {worth['composites']} held-out composites.\n"
        yield "| refiner | masks | mean confidence | mean IoU | apart, in tenths | AUC of IoU above 0.5 |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for name, row in worth.items():
            if isinstance(row, dict):
                cells = [
                    row[key] for key in ("mean_confidence", "mean_iou", "calibration_error", "auc_of_iou_above_half")
                ]
                yield f"| {name} | {row['masks']} | {' | '.join(f'{cell:.3f}' for cell in cells)} |"


def shards(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{figures['samples']} samples, {figures['content_mb']} MB. Ours hashes and flushes; `as others` does not.\n"
    yield "| | contender | MB/s | speed over tarfile |\n| --- | --- | --- | --- |"
    for way in ("write", "read"):
        for name, row in figures[way].items():
            yield f"| {way} | {name} | {row['mb_per_s']:.0f} | {row['times_tarfile']:.2f} |"
    overhead = figures["tar_overhead_percent"]
    yield "\nTime to open a shard so that any sample can be found, µs a sample: " + (
        ", ".join(
            f"{name} {row['us_per_sample']:.0f} ({row['times_tarfile']:.1f} x as fast as tarfile)"
            for name, row in figures["open"].items()
        )
        + "."
    )
    held = figures["held_bytes_per_sample"]
    yield "\nHeld in memory to find any sample of an open shard, bytes a sample: " + (
        ", ".join(f"{name} {value:.0f} ({value / held['synthgen']:.0f} x)" for name, value in held.items()) + "."
    )
    yield "\nTar overhead: " + ", ".join(f"{name} {value:.1f} %" for name, value in overhead.items()) + "."


def pretrain(figures: dict[str, Any]) -> Iterator[str]:
    yield f"Training steps of MAE on {figures['device']}, threads: {figures['threads']}, beside ViTMAE.\n"
    yield "| case | contender | images/s | speed over transformers |\n| --- | --- | --- | --- |"
    for case, row in figures.items():
        if isinstance(row, dict):
            rates = row["images_per_second"]
            for name, rate in rates.items():
                yield f"| {case}, batch {row['batch']} | {name} | {rate:.1f} | {rate / rates['transformers']:.2f} |"
    for case, row in figures.items():
        if isinstance(row, dict) and "pretrain" in row:
            over = ", ".join(f"{value:.1f} x {name}" for name, value in row["loader_over_training"].items())
            waiting = row["pretrain"]["waiting_percent"]
            yield f"\n{case}: the loader alone is faster than training by {over}. A real `pretrain` waits for data"
            yield f"{waiting:.1f} % of its time."


def methods(figures: dict[str, Any]) -> Iterator[str]:
    settings, encoder = next(iter(figures["settings"].values())), figures["encoder"]
    shape = f"{encoder['dim']} wide and {encoder['depth']} deep, on {encoder['image_size']} pixels"
    samples, images = settings["samples_seen"], figures["images"]
    yield f"Every method that learns from images alone, plain / guided by the masks: one seed, {samples:,} samples out"
    yield f"of {images:,} images of the shipped model (by earlier weights), an encoder {shape}. It is a short"
    yield "training of a small network: where a method stands here says little of where it stands at scale, and a few"
    yield "hundredths are the luck of the seed. Composites are held out; photos are of Caltech-101; `knn` and"
    yield "`linear_probe` are accuracies, `segmentation` is a mean IoU.\n"
    scores = figures["scores"]
    names = [label.split("-")[1] for label in scores if label.endswith("-plain")]
    tasks = list(scores[f"all-{names[0]}-plain"])
    yield f"| method | {' | '.join(tasks)} |\n| --- |{' --- |' * len(tasks)}"
    for name in names:
        cells = [
            " / ".join(f"{scores[f'all-{name}-{arm}'][task][0]:.3f}" for arm in ("plain", "guided")) for task in tasks
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    for row, found in figures["baselines"].items():
        yield f"| {row} | {' | '.join(f'{found[task]:.3f}' if task in found else '' for task in tasks)} |"


def heads(figures: dict[str, Any]) -> Iterator[str]:
    learned, judged = figures["images"]
    classes = figures["classes"]
    yield f"What heads read off the shipped model's own activations (by earlier weights): {classes} classes of held-out"
    yield f"composites of one object, {learned} to learn from and {judged} to be judged on. Accuracy is the mean over"
    yield "three trainings of the head, with its interval over images (95 %); `spread` is the deviation over trainings."
    yield "DifFeed sees half as many images a step as the attention head, at half the rate: its measure is its control."
    yield "A toy model and its own kind of images: the order of heads need not be that of larger ones.\n"
    yield "| head | blocks | timesteps | accuracy | on what it learned from | spread |"
    yield f"|{' --- |' * 6}"
    for name, one in figures["heads"].items():
        yield (
            f"| {name} | {one['blocks']} | {one['timesteps']} | {one['accuracy']:.3f} ({one['low']:.3f} to "
            f"{one['high']:.3f}) | {one['train_accuracy']:.3f} | {one.get('spread', 0):.3f} |"
        )


def engines(figures: dict[str, Any]) -> Iterator[str]:
    yield f"What engines cost beside {figures['units']} units of {figures['seconds']:g} s that only sleep and write one"
    yield "sample: `cost` is what a worker does between two units and to write one, as a share of a unit (means).\n"
    yield "| engine | cost | between units | writing | first unit after | end after the last |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, row in figures["engines"].items():
        shown = name if "worker" in name else f"{name}, {figures['workers']} workers"
        cells = [f"{row['share_of_a_unit']:.2%}", f"{row['between_units_ms']:.1f} ms", f"{row['writing_ms']:.1f} ms"]
        cells += [f"{row['start_seconds']:.1f} s", f"{row['end_seconds']:.1f} s"]
        yield f"| {shown} | {' | '.join(cells)} |"
    pair, large = figures["masks, 2 workers against 1"], figures["large run"]
    yield f"\n`local` on two cores: AttentionCut masks of {pair['samples']} drawn images in {pair['units']} units."
    yield "Processor time is that of all processes; plain arithmetic is what the machine itself gives two processes.\n"
    yield "| speed of 2 workers over 1 | |\n| --- | --- |"
    start = f"whole command, with {pair['start_seconds_of_two']:.1f} s until both have begun"
    for about, name in (
        (start, "speedup"),
        ("the same, medians", "speedup_median"),
        ("while they work", "steady_speedup"),
        ("by processor time alone", "processor_speedup"),
        ("plain arithmetic", "machine_speedup"),
    ):
        yield f"| {about} | {pair[name]:.2f} |"
    yield f"\nA run of {large['units']:,} units: `status` in {large['status_seconds']:.1f} s, and a command that finds"
    yield f"nothing to do in {large['nothing_to_do_seconds']:.1f} s."


def prompts(figures: dict[str, Any]) -> Iterator[str]:
    yield f"What prompts of {figures['line_bytes']} bytes cost before the first image, beyond the libraries: the"
    yield "command until its engine has the units, the same command again, and each worker until it can ask for its"
    yield "first unit. `whole list` holds all prompts in each process. Seconds are of the processor.\n"
    yield "| prompts | | command | the same again | each worker | a further unit |"
    yield "| --- | --- | --- | --- | --- | --- |"
    parts = ("begin", "resume", "worker")
    for size in figures["sizes"]:
        for name in ("block by block", "whole list"):
            row = size[name]
            cells = [f"{row[part]['processor_seconds']:.1f} s, {row[part]['megabytes']:.1f} MB" for part in parts]
            yield f"| {size['prompts']:,} | {name} | {' | '.join(cells)} | {row['unit_milliseconds']:.1f} ms |"


if __name__ == "__main__":
    main()
