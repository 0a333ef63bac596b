"""What an evaluation costs: some images pass through the networks, and each evaluator is tried on their features.

The features are repeated to make more images of them; see :func:`enlarged`.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from synthgen.devices import devices_for
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.models.transformers_encoder import encoder_folder
from synthgen.plan.files import link_tars
from synthgen.plan.meter import Measurement, Meter
from synthgen.plan.source import survey_images
from synthgen.stages import Worker
from synthgen.stages._eval_rows import has_scores, make_extractor, table_rows
from synthgen.stages._eval_sources import Source

if TYPE_CHECKING:
    from synthgen.evaluators import DenseFeatures, EvalData, Evaluator, ImageTextPairs, Row
    from synthgen.plan.count import EvalCounts
    from synthgen.plan.sample import Sample
    from synthgen.stages.evaluate import Evaluate

__all__ = ["enlarged", "estimate_seconds", "measure_evaluation"]

_FEW = 8  # images of the first extractions
_LENGTHS = ("steps", "max_steps")  # what evaluators call the length of a training; of the second it is the most
_SHORT = (4, 10)  # steps of the two trainings that are timed
_MOST = {"features": 4096, "pairs": 1024, "latents": 64, "images": 64}  # images that are tried, at most; of others 256
_WARM_UP = 16  # images
_NOISE = 0.01  # relative, of repeated features
_VALUES = {"": "features", "_maps": "maps", "_latents": "values", "_images": "pixels"}  # of labelled images


def measure_evaluation(stage: Evaluate, sample: Sample, counts: EvalCounts, rounds: int, meter: Meter) -> Measurement:
    """Evaluate some images, used for training and test, and extrapolate to all: seconds an image in each of ``rounds``.

    Raises:
        SynthgenError: it cannot be done, for the reason that it would have in a run.
    """
    from synthgen.stages._eval_data import image_data

    run, device = sample.run("probe"), devices_for(stage)[0]
    folder = Path(tempfile.mkdtemp(dir=sample.folder))  # of this evaluation: there may be several
    tars = sorted(sample.run("rounds").folder("shards").glob("train/*.tar"))
    if stage.test:
        survey_images(stage.test).write(folder / "test")
        tars = sorted((folder / "test").glob("*.tar"))
    few = str(link_tars(tars, folder / "few", _FEW))
    stage = replace(stage, encoder=_encoder(sample, counts), train=few, test=few, verify=False)
    chosen, left_out = stage.usable_evaluators(run)
    evaluators = {name: evaluator for name, evaluator in chosen.items() if evaluator.needs != "masks"}
    if not evaluators:
        raise ConfigError("; ".join(left_out.values()))
    encoder = encoder_folder(stage.encoder) if stage.encoder else None
    rows = list(table_rows(stage, encoder, evaluators.values()).values())
    extractor = make_extractor(stage, run, encoder, Worker(device=device), evaluators.values())
    meter.mark_start()

    def extract(path: str) -> tuple[float, int, dict[Row, EvalData]]:
        """Seconds, images and features."""
        sources = {name: Source(name, path) for name in stage.splits(run)}
        started = time.perf_counter()
        data = image_data(sources, extractor, rows, stage.patch_memory, lambda count: None, {"warnings": []})
        return time.perf_counter() - started, sum(len(source.samples) for source in sources.values()), data

    extract(few)
    few_seconds, few_images, _ = extract(few)
    of_set = few_images // len(stage.splits(run))
    batch = min(stage.batch_size, max(counts.train, counts.test))
    if not device.startswith("cuda"):
        batch = int(min(batch, sample.seconds / 2 / rounds * of_set / few_seconds))
    batch = max(2 * of_set, batch)
    more = str(link_tars(tars, folder / "more", batch))
    extracted = [extract(more) for _ in range(rounds)]
    more_images, data = extracted[0][1:]
    # the start of loader processes is in both, so that it is not extrapolated
    each = [max(0.0, seconds - few_seconds) / (more_images - few_images) for seconds, *_ in extracted]

    classes = counts.classes or len(set(Source("test", more).labels.values()))
    total, parts, images = 0.0, list[str](), counts.train + counts.test
    for name, evaluator in evaluators.items():
        sizes = (counts.test if evaluator.needs == "pairs" else counts.train, counts.test)
        basis = ""
        for row in rows:
            if has_scores(evaluator, row):
                seconds, basis = estimate_seconds(evaluator, data[row], sizes, classes)
                total += seconds
        parts.append(f"{name}: {basis}")
    parts += [f"{name}: left out" for name in left_out]
    limited = (extractor.patch_bytes if any(one.test_scenes for one in data.values()) else 0) + extractor.labelled_bytes
    features = sum(one.test.features[0].nbytes for one in data.values() if one.test is not None) * images
    features += min(limited * images, int(stage.patch_memory * 1e9))
    return Measurement(
        tuple(seconds + total / images for seconds in each),
        more_images * rounds,
        min(batch, stage.batch_size),
        meter.start_seconds,
        device,
        meter.memory(device),
        tuple(parts),
        features if device == "cpu" else 0,  # they are in main memory, and for a GPU its own is reported
    )


def _encoder(sample: Sample, counts: EvalCounts) -> str:
    """The encoder, or one of the same shape that was trained on the sample; empty for a generator."""
    if not counts.encoder:
        return ""
    with suppress(MissingArtifact):
        encoder_folder(counts.encoder)
        return counts.encoder
    trained = sample.run("rounds").folder("pretrain") / Path(counts.encoder).name
    if not (trained / "encoder.safetensors").is_file():
        raise MissingArtifact(f"there is no encoder in {counts.encoder}, and no training before makes it")
    return str(trained)


# -- evaluators


def estimate_seconds(evaluator: Evaluator, data: EvalData, sizes: tuple[int, int], classes: int) -> tuple[float, str]:
    """Seconds of an evaluation with ``sizes`` training and test images, and what was measured.

    If there are more images than are tried, a second measurement with half of a set shows how much of the time grows
    with that set.
    """
    most = max(_MOST.get(evaluator.needs, 256), getattr(evaluator, "batch_size", 0))
    few = min(sizes[0], most), min(sizes[1], most)
    _seconds(evaluator, enlarged(data, (min(few[0], _WARM_UP), min(few[1], _WARM_UP)), classes))
    measured = total = _seconds(evaluator, enlarged(data, few, classes))
    for size, tried, half in zip(sizes, few, ((few[0] // 2, few[1]), (few[0], few[1] // 2)), strict=True):
        if size > tried:
            growing = 2 * (1 - _seconds(evaluator, enlarged(data, half, classes)) / measured)
            total *= 1 + (size / tried - 1) * min(max(growing, 0.0), 1.0)
    basis = f"{few[0]:,} x {few[1]:,} images" + (f" of {sizes[0]:,} x {sizes[1]:,}" if few != sizes else "")
    name, steps = _length(evaluator)
    if steps > _SHORT[1]:
        basis += f", {_SHORT[1]} of {'at most ' if name == 'max_steps' else ''}{steps} steps"
    return total, basis


def _length(evaluator: Evaluator) -> tuple[str, int]:
    """The option for the length of an evaluator's training, and its value; 0 if it has none."""
    names: list[str] = [field.name for field in fields(evaluator)] if is_dataclass(evaluator) else []
    name = next((name for name in _LENGTHS if name in names), "")
    return name, int(getattr(evaluator, name)) if name else 0


def _seconds(evaluator: Evaluator, data: EvalData) -> float:
    """Seconds of an evaluation with all its steps, extrapolated from two short trainings."""
    name, steps = _length(evaluator)
    if steps <= _SHORT[1]:
        return _timed(evaluator, data)
    trained: Any = evaluator
    short, longer = (_timed(replace(trained, **{name: count}), data) for count in _SHORT)
    return short + max(0.0, longer - short) / (_SHORT[1] - _SHORT[0]) * (steps - _SHORT[0])


def _timed(evaluator: Evaluator, data: EvalData) -> float:
    started = time.perf_counter()
    evaluator.evaluate(data)
    return time.perf_counter() - started


def enlarged(data: EvalData, sizes: tuple[int, int], classes: int) -> EvalData:
    """The data with ``sizes`` training and test images (of pairs: texts and images) of ``classes`` classes."""
    changed: dict[str, Any] = {}
    for name, count in zip(("train", "test"), sizes, strict=True):
        for kind, values in _VALUES.items():
            if (labelled := getattr(data, name + kind)) is not None:
                changed[name + kind] = _labelled(labelled, values, count, classes)
        if (scenes := getattr(data, f"{name}_scenes")) is not None:
            changed[f"{name}_scenes"] = _scenes(scenes, count, classes)
    return replace(data, pairs=data.pairs and _pairs(data.pairs, *sizes), **changed)


def _labelled(given: Any, name: str, count: int, classes: int) -> Any:
    values: Any = getattr(given, name)
    many: Any = tuple(_repeat(block, count) for block in values) if name == "maps" else _repeat(values, count)
    if name == "features" and count > len(values):  # equal copies would all be nearest neighbours: kNN would be slower
        many = many * (1 + _NOISE * torch.randn(many.shape, generator=torch.Generator().manual_seed(count)))
    return replace(given, labels=torch.arange(count) % max(1, classes), keys=_keys(count), **{name: many})


def _scenes(given: DenseFeatures, count: int, classes: int) -> DenseFeatures:
    """Boxes get other classes each time, so that all occur."""
    names = (*given.classes, *(f"class {number}" for number in range(len(given.classes), classes + 1)))
    classes_of = ((given.box_classes[row % len(given)] - 1 + row) % (len(names) - 1) + 1 for row in range(count))
    return replace(
        given,
        patches=_repeat(given.patches, count),
        pixels=_repeat(given.pixels, count),
        boxes=tuple(given.boxes[row % len(given)] for row in range(count)),
        box_classes=tuple(classes_of),
        keys=_keys(count),
        classes=names,
    )


def _pairs(given: ImageTextPairs, texts: int, images: int) -> ImageTextPairs:
    rows = torch.arange(max(images, texts))
    many = replace(given, images=_repeat(given.images, images), texts=_repeat(given.texts, texts))
    return replace(many, of_image=rows % images, of_text=rows % texts)


def _repeat(rows: Tensor, count: int) -> Tensor:
    return rows[torch.arange(count) % len(rows)]


def _keys(count: int) -> tuple[str, ...]:
    return tuple(f"{number:09d}" for number in range(count))
