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
    for name, table in (("generate", generate), ("masks", masks), ("shards", shards), ("pretrain", pretrain)):
        path = FOLDER / "results" / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            about = record["machine"]
            where = f"{about['cpu']}, {about['cores']} cores, load {about['load']}, Python {about['python']}"
            parts.append(f"## {name}\n\n{record['date']}, {where}, commit {record['commit']}.\n")
            parts.append("\n".join(table(record["figures"])) + "\n")
    (FOLDER / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")


def generate(figures: dict[str, Any]) -> Iterator[str]:
    yield f"Images of the shipped model, {figures['steps']} steps, batches of {figures['batch_size']}, one thread.\n"
    yield "| contender | images/s | time over plain |\n| --- | --- | --- |"
    for name, rate in figures["images_per_second"].items():
        yield f"| {name} | {rate:.2f} | {figures['time_over_plain'][name]:.2f} |"


def masks(figures: dict[str, Any]) -> Iterator[str]:
    yield "Drawn shapes, noisy maps on a 16 × 16 grid, one thread. `whole` is AttentionCut's energy on all pixels.\n"
    yield "| case | refiner | masks/s | speed over whole | mean IoU |\n| --- | --- | --- | --- | --- |"
    for case, refiners in figures.items():
        if isinstance(refiners, dict):
            for name, row in refiners.items():
                ratio = row["masks_per_second"] / refiners["whole"]["masks_per_second"]
                yield f"| {case} | {name} | {row['masks_per_second']:.0f} | {ratio:.2f} | {row['iou']:.3f} |"


def shards(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{figures['samples']} samples, {figures['content_mb']} MB. Ours hashes and flushes; `as others` does not.\n"
    yield "| | contender | MB/s | speed over tarfile |\n| --- | --- | --- | --- |"
    for way in ("write", "read"):
        for name, row in figures[way].items():
            yield f"| {way} | {name} | {row['mb_per_s']:.0f} | {row['times_tarfile']:.2f} |"
    overhead = figures["tar_overhead_percent"]
    yield "\nTar overhead: " + ", ".join(f"{name} {value:.1f} %" for name, value in overhead.items()) + "."


def pretrain(figures: dict[str, Any]) -> Iterator[str]:
    yield f"Training steps of MAE on {figures['device']}, threads: {figures['threads']}, beside ViTMAE.\n"
    yield "| case | contender | images/s | speed over transformers |\n| --- | --- | --- | --- |"
    for case, row in figures.items():
        if isinstance(row, dict):
            rates = row["images_per_second"]
            for name, rate in rates.items():
                yield f"| {case}, batch {row['batch']} | {name} | {rate:.1f} | {rate / rates['transformers']:.2f} |"


if __name__ == "__main__":
    main()
