"""Write ``docs/results.md`` and its figure from ``results/learning.json``."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FAMILIES = {  # comparisons, with their titles
    "mae": "mae: masks choose the hidden patches",
    "contrastive": "contrastive: masks choose what is compared",
    "vlp": "vlp: masks match objects to words",
    "vlp-words": "vlp: the same, compared with words without location",
    "vlp-places": "vlp: texts say where objects are",
}
METHODS = ("mae", "contrastive", "vlp")
ARMS = ("plain", "guided", "elsewhere")
TRAININGS = {  # of comparisons that share trainings with others
    ("vlp-words", "plain"): "vlp-scattered",
    ("vlp-words", "guided"): "vlp-guided",
    ("vlp-words", "elsewhere"): "vlp-elsewhere",
    ("vlp-places", "plain"): "vlp-plain",
}
COLOURS = {"plain": "#666666", "guided": "#0a7d4f", "elsewhere": "#c2571a"}
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # training → task → a score per seed

TEXT = """# Do free attention masks help an encoder?

Free-ATM claims that the masks which a diffusion model's attention gives for free improve the three common methods of
pretraining on generated images. This page tests that on {images:,} images of the shipped model, with earlier weights,
from the prompts in [familiar.txt](../prompts/familiar.txt) (32 objects, one to three per image); {masks:,} of them have
masks by AttentionCut. Each of `mae`, `contrastive` and `vlp` is trained in three ways: **plain**, without masks;
**guided** by the masks; and, as a control, with masks of the same area and shape **elsewhere** in the image. `vlp` is
guided in two ways: objects are matched to their words (`region_weight`, ours), or texts say where an object is
(`position_share`, after Free-ATM). [methods.md](methods.md) describes them.

Masks elsewhere still tell `vlp` which words belong to an image, and words alone help much. The guided form is therefore
also compared with a second plain one, which gets the same words by the same loss but no location: the pixels of its
masks are scattered over the image (`masks: scattered`). All trainings of a method see the same images equally often
({samples} samples) in batches of {batch}, with {seeds} seeds; the encoder has width {dim} and depth {depth}, on {size}
pixels. Model and images are small and trainings short: these results need not hold at scale, and none of them
reproduces a figure of the paper.

Written by `python benchmarks/learning.py --data DATA --photos PHOTOS` on {date} ({machine}, commit {commit}; the
trainings took {minutes:.0f} minutes in all, each on one core of a machine that had other work). Figures and settings
are in `benchmarks/results/learning.json`.

## Scores

Mean over the seeds ± standard deviation. A difference is **bold** if it exceeds both deviations together (the root of
the sum of their squares): with {seeds} seeds that is an indication, not a proof. Composites are {truth}held-out images
with exact labels, masks and captions; photos are 25 classes of Caltech-101 (`photos`) and 159 images of COCO with five
captions each (`photo-captions`). `knn` and `linear_probe` are accuracies, `segmentation` is the mean IoU of a linear
head, `retrieval` the mean recall: see [evaluation.md](evaluation.md).

{tables}
{baselines}
## Summary

Better and worse mean a difference that is bold above; the last two comparisons use the same rule.

{verdicts}

## Scores during training

Scores on composites at each quarter of the training, with the range over seeds.

![Scores over steps](results.png)

Steps at which the guided form and the control reached the final score of the plain form, interpolated linearly between
the four points:

{reached}
"""


def write_report(root: Path) -> None:
    """Write the page and its plot."""
    record = json.loads((root / "benchmarks" / "results" / "learning.json").read_text(encoding="utf-8"))
    figures, notes = record["figures"], record.get("notes", {})
    scores, curves = figures["scores"], figures["curves"]
    settings = next(iter(figures["settings"].values()))
    encoder = figures["encoder"]
    samples = {method: figures["settings"][f"{method}-plain"]["samples_seen"] for method in METHODS}
    text = TEXT.format(
        images=figures["images"],
        masks=figures["with_masks"],
        samples=", ".join(f"{method} {samples[method]:,}" for method in METHODS),
        batch=settings["batch_size"],
        dim=encoder["dim"],
        depth=encoder["depth"],
        size=encoder["image_size"],
        seeds=max(len(seconds) for seconds in figures["seconds"].values()),
        date=record["date"],
        machine=f"{record['machine']['cpu']}, {record['machine']['cores']} cores",
        commit=record["commit"],
        minutes=sum(map(sum, figures["seconds"].values())) / 60,
        truth=f"{figures['truth']['test']:,} ",
        tables="\n".join("\n".join(table(family, scores, notes.get(family, ""))) + "\n" for family in FAMILIES),
        baselines="\n".join(baselines(figures["baselines"])),
        verdicts="\n".join(verdicts(scores)),
        reached="\n".join(reached_table(scores, curves)),
    )
    (root / "docs" / "results.md").write_text(wrapped(text), encoding="utf-8")
    draw(curves, root / "docs" / "results.png")


def label(family: str, arm: str) -> str:
    """The name of a training."""
    return TRAININGS.get((family, arm), f"{family}-{arm}")


def wrapped(text: str) -> str:
    """Lines of at most 118 characters, except in tables."""
    lines = []
    for block in text.strip().split("\n\n"):
        items = block.split("\n- ")  # a single one in a paragraph
        if not block.startswith(("|", "#", "!")):
            indent = "  " if block.startswith("- ") else ""
            items = [textwrap.fill(item, 118, subsequent_indent=indent, break_on_hyphens=False) for item in items]
        lines.append("\n- ".join(items))
    return "\n\n".join(lines) + "\n"


def table(family: str, scores: Scores, note: str = "") -> Iterator[str]:
    """The scores of a comparison, one row per task, below a note on the measurement if there is one."""
    yield f"### {FAMILIES[family]}\n"
    if note:
        yield f"{note}\n"
    yield "| task | plain | guided | elsewhere | guided - plain | elsewhere - plain |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for task in scores[label(family, "plain")]:
        arms = [scores[label(family, arm)].get(task, ()) for arm in ARMS]
        cells = [f"{statistics.mean(arm):.3f} ± {deviation(arm):.3f}" if arm else "" for arm in arms]
        yield f"| {task} | {' | '.join(cells)} | {change(arms[0], arms[1])} | {change(arms[0], arms[2])} |"


def baselines(rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The scores of a random encoder and of raw pixels."""
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row))
    yield "### Baselines\n"
    yield f"| task | {' | '.join(rows)} |\n| --- |{' --- |' * len(rows)}"
    for task in tasks:
        yield f"| {task} | {' | '.join(f'{row[task]:.3f}' if task in row else '' for row in rows.values())} |"
    yield ""


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def beyond(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the means differ by more than both deviations together; never with a single seed."""
    if min(len(before), len(after)) < 2:
        return False
    return abs(statistics.mean(after) - statistics.mean(before)) > math.hypot(deviation(before), deviation(after))


def change(before: Sequence[float], after: Sequence[float]) -> str:
    """The difference of the means, bold if it is beyond both deviations."""
    if not before or not after:
        return ""
    text = f"{statistics.mean(after) - statistics.mean(before):+.3f}"
    return f"**{text}**" if beyond(before, after) else text


def verdicts(scores: Scores) -> Iterator[str]:
    """For each comparison, the tasks on which guidance is better or worse, and what the control shows there."""
    for family in FAMILIES:
        plain, guided, control = (scores[label(family, arm)] for arm in ARMS)
        better = [task for task in plain if is_better(plain, guided, task)]
        worse = [task for task in plain if is_better(guided, plain, task)]
        control_better = [task for task in better if is_better(plain, control, task)]
        beats_control = [task for task in better if is_better(control, guided, task)]
        yield (
            f"- **{FAMILIES[family]}**: guided is better than plain on {listed(better)}, and worse on {listed(worse)}. "
            f"Where it is better, elsewhere is also better than plain on {listed(control_better)}, and guided is "
            f"better than elsewhere on {listed(beats_control)}."
        )


def is_better(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], task: str) -> bool:
    """Whether ``after`` has a better score beyond both deviations."""
    if task not in before or task not in after:
        return False
    return beyond(before[task], after[task]) and statistics.mean(after[task]) > statistics.mean(before[task])


def listed(tasks: Sequence[str]) -> str:
    return "; ".join(tasks) or "none"


def reached_table(scores: Scores, curves: Mapping[str, Any]) -> Iterator[str]:
    """The steps at which guided and control reach the final score of the plain training."""
    yield "| method | task | steps | final score of plain | guided reaches it at | elsewhere reaches it at |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for family in FAMILIES:
        for task in curves[label(family, "plain")]:
            goal = statistics.mean(scores[label(family, "plain")][task])
            at = [reached(curves[label(family, arm)].get(task, {}), goal) for arm in ARMS[1:]]
            cells = ["never" if one is None else f"{one:.0f}" for one in at]
            steps = max(map(int, curves[label(family, "plain")][task]))
            yield f"| {family} | {task} | {steps} | {goal:.3f} | {' | '.join(cells)} |"


def reached(points: Mapping[str, Sequence[float]], goal: float) -> float | None:
    """The first step with that mean score, interpolated linearly between the points."""
    line = sorted((int(step), statistics.mean(values)) for step, values in points.items())
    for number, (step, score) in enumerate(line):
        if score >= goal:
            if not number:
                return float(step)
            before, lower = line[number - 1]
            return before + (step - before) * (goal - lower) / (score - lower)
    return None


def draw(curves: Mapping[str, Any], path: Path) -> None:
    """Plot the mean and the range over seeds, one panel per comparison and task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(task for arm in curves.values() for task in arm))
    figure, axes = plt.subplots(len(tasks), len(FAMILIES), figsize=(12, 2.3 * len(tasks)), squeeze=False, sharex="col")
    for row, task in enumerate(tasks):
        for column, family in enumerate(FAMILIES):
            panel = axes[row][column]
            for arm in ARMS:
                points = sorted(
                    (int(step), values) for step, values in curves[label(family, arm)].get(task, {}).items()
                )
                steps = [step for step, _ in points]
                panel.plot(steps, [statistics.mean(values) for _, values in points], color=COLOURS[arm], label=arm)
                low, high = ([pick(values) for _, values in points] for pick in (min, max))
                panel.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=7)
            panel.set_title(f"{family}: {task.partition(',')[0]}", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("steps", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    from _common import make_parser

    make_parser(__doc__).parse_args()
    write_report(Path(__file__).resolve().parent.parent)
