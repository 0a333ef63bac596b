"""The data that evaluators score, from images and from masks; each image is decoded and processed once."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from synthgen.codecs import decode_masks, decode_meta
from synthgen.datasets import LazyMasks, open_masks
from synthgen.errors import ConfigError
from synthgen.evaluators import (
    OF_LABELLED,
    OF_SCENES,
    EvalData,
    Evaluator,
    LabelledFeatureMaps,
    LabelledFeatures,
    LabelledImages,
    Latents,
    Need,
    Row,
    json_safe,
)
from synthgen.evaluators._extraction import Extracted, Extractor, class_numbers, joined_classes, scenes, text_pairs
from synthgen.records import WordMasks
from synthgen.run import Run
from synthgen.stages._eval_sources import Source, scene_samples, used_samples
from synthgen.stages._eval_warnings import few_warnings, label_warnings, overlap_warnings, scene_warnings, word_warnings
from synthgen.stores.tar import read_tar

if TYPE_CHECKING:
    from synthgen.stages.evaluate import Evaluate

__all__ = ["image_data", "mask_scores", "stratified_sample"]

Parts = dict[Row, dict[str, Any]]  # arguments of EvalData, by kind of row
Numbers = dict[str, tuple[int, ...]]  # of samples, in order, by the name of their source

_KEPT: dict[Need, str] = {"maps": "maps of blocks", "latents": "latents", "images": "pixels"}  # of images with labels


def image_data(
    sources: Mapping[str, Source],
    extractor: Extractor,
    kinds: Collection[Row],
    patch_memory: float,
    advance: Callable[[int], None],
    result: dict[str, Any],
) -> dict[Row, EvalData]:
    """The data of each kind of row: those of the extractor's networks, and ``pixels``.

    Counts and warnings go into ``result``.
    """
    needs = extractor.needs
    used, scene_numbers, label_numbers = _select(sources, extractor, patch_memory, result)
    if skipped := sum(len(used_samples(source, needs)) - len(used[name]) for name, source in sources.items()):
        advance(skipped)
    extracted: dict[str, Extracted] = {}
    for name, source in sources.items():
        of_source = extractor if name == "test" else replace(extractor, dual=None)
        samples = source.open(masks=bool(OF_SCENES & needs))
        chosen = scene_numbers.get(name, ()), label_numbers.get(name, ())
        extracted[name] = of_source.extract(samples, used[name], *chosen, advance)
        result[name] = {"images": len(used[name])}

    result["warnings"] += overlap_warnings(sources)
    parts: Parts = {kind: {"device": extractor.device} for kind in kinds}
    if "features" in needs:
        _add_features(parts, sources, extracted, used)
    if label_numbers:
        _add_labelled(parts, sources, extracted, label_numbers, extractor)
    if OF_LABELLED & needs:
        for name, source in sources.items():
            result[name] |= {"images": len(source.labels), "classes": len(set(source.labels.values()))}
            result[name] |= {"images_with_maps": len(label_numbers[name])} if needs & {"maps", "latents"} else {}
            result[name] |= {"images_with_pixels": len(label_numbers[name])} if "images" in needs else {}
        labels = {name: [sources[name].labels[number] for number in some] for name, some in label_numbers.items()}
        result["warnings"] += label_warnings(sources, {} if "features" in needs else labels)
    if OF_SCENES & needs:
        _add_scenes(parts, extracted, result)
        result["warnings"] += scene_warnings(extracted, scene_numbers)
    num_bytes = extractor.patch_bytes * sum(len(one.keys) for one in extracted.values())
    num_bytes += extractor.labelled_bytes * sum(map(len, label_numbers.values()))
    if num_bytes:
        result["patch_memory_mb"] = round(num_bytes / 1e6, 1)
    if extractor.dual is not None:
        captions = [sources["test"].captions.get(number, ()) for number in used["test"]]
        parts["encoder"]["pairs"] = text_pairs(extracted["test"], captions, extractor.dual)
        count = sum(map(bool, captions))
        result["test"] |= {"images_with_texts": count, "texts": sum(map(len, captions))}
        result["warnings"] += few_warnings("test images with texts", count)
    return {kind: EvalData(**part) for kind, part in parts.items()}


def _select(
    sources: Mapping[str, Source], extractor: Extractor, patch_memory: float, result: dict[str, Any]
) -> tuple[Numbers, Numbers, Numbers]:
    """The samples to read, and those of them to keep patch features of, and to keep maps, latents and pixels of."""
    needs, scene_numbers, label_numbers = extractor.needs, Numbers(), Numbers()
    if OF_SCENES & needs:
        numbers: dict[str, Sequence[int]] = {name: scene_samples(source, needs) for name, source in sources.items()}
        scene_numbers = _fit_memory(numbers, extractor.patch_bytes, patch_memory, "patch features", result)
    if labelled_bytes := extractor.labelled_bytes:
        # sorted by class, so that each keeps its share
        numbers = {name: sorted(source.labels, key=source.labels.__getitem__) for name, source in sources.items()}
        what = " and ".join(text for need, text in _KEPT.items() if need in needs)
        label_numbers = _fit_memory(numbers, labelled_bytes, patch_memory, what, result)
    if needs & {"features", "pairs"}:
        return {name: used_samples(source, needs) for name, source in sources.items()}, scene_numbers, label_numbers
    # only images that are kept need be read
    used = {name: tuple(sorted({*scene_numbers.get(name, ()), *label_numbers.get(name, ())})) for name in sources}
    return used, scene_numbers, label_numbers


def _fit_memory(
    numbers: Mapping[str, Sequence[int]], each: int, memory: float, what: str, result: dict[str, Any]
) -> Numbers:
    """The samples, in rising order, of which ``what`` fits into ``memory`` GB at ``each`` bytes; warns if not all."""
    total = sum(map(len, numbers.values()))
    share = min(1.0, memory * 1e9 / (each * total))
    fitting = {}
    for name, given in numbers.items():
        fitting[name] = tuple(sorted(stratified_sample(given, max(1, int(len(given) * share)))))
        if len(fitting[name]) < len(given):
            result["warnings"].append(
                f"{what} are those of {len(fitting[name])} of {len(given)} {name} images: all would "
                f"take {each * total / 1e9:.1f} GB, and patch_memory is {memory:g}"
            )
    return fitting


def stratified_sample(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of ``numbers``: a random one out of each of that many parts of equal length; deterministic.

    Every n-th instead would follow a period in the order of the images, for example classes in turn.
    """
    if len(numbers) <= most:
        return tuple(numbers)
    rng, ends = random.Random(0), [place * len(numbers) // most for place in range(most + 1)]
    return tuple(numbers[rng.randrange(start, end)] for start, end in pairwise(ends))


def _add_features(
    parts: Parts,
    sources: Mapping[str, Source],
    extracted: Mapping[str, Extracted],
    used: Mapping[str, tuple[int, ...]],
) -> None:
    classes = sorted(set(sources["train"].labels.values()))
    for name, source in sources.items():
        rows = [row for row, number in enumerate(used[name]) if number in source.labels]
        numbers = class_numbers([source.labels[used[name][row]] for row in rows], classes)
        keys = tuple(source.samples.key(used[name][row]) for row in rows)
        for kind, features in extracted[name].features.items():
            if kind in parts:
                some = features if len(rows) == len(features) else features[rows]
                parts[kind][name] = LabelledFeatures(some, numbers, keys)


def _add_labelled(
    parts: Parts,
    sources: Mapping[str, Source],
    extracted: Mapping[str, Extracted],
    label_numbers: Mapping[str, tuple[int, ...]],
    extractor: Extractor,
) -> None:
    """Add maps, latents and pixels."""
    classes = sorted(set(sources["train"].labels.values()))
    for name, source in sources.items():
        found = extracted[name]
        numbers = class_numbers([source.labels[number] for number in label_numbers[name]], classes)
        keys = tuple(source.samples.key(number) for number in label_numbers[name])
        for kind, part in parts.items():
            pixels = None
            if kind in extractor.networks:
                pixels = found.images
                part |= {"encoder": extractor.networks[kind], "pool": extractor.pool}
            elif kind in ("generator", "random generator"):
                pixels = found.generator_images
                part |= {"reader": extractor.generator, "random_init": kind == "random generator"}
            if pixels is not None:
                part[f"{name}_images"] = LabelledImages(pixels, numbers, keys)
            if maps := found.maps.get(kind):
                part[f"{name}_maps"] = LabelledFeatureMaps(tuple(maps), numbers, keys)
        if found.latents is not None:
            parts["generator"][f"{name}_latents"] = Latents(found.latents, numbers, keys)


def _add_scenes(parts: Parts, extracted: Mapping[str, Extracted], result: dict[str, Any]) -> None:
    for name, classes in zip(("train", "test"), joined_classes(extracted["train"], extracted["test"]), strict=True):
        found = extracted[name]
        for kind, split in scenes(found, classes).items():
            if kind in parts:
                parts[kind][f"{name}_scenes"] = split
        boxes_only = found.num_boxes_only
        result[name] |= {"images_with_masks": len(found.keys) - boxes_only, "mask_classes": len(found.names)}
        result[name] |= {"images_with_boxes_only": boxes_only} if boxes_only else {}


# -- masks


class _MaskReader(Mapping[str, WordMasks]):
    """Masks by key; ``words`` are those of the masks read so far, in lower case, and whether any has pixels."""

    def __init__(self, masks: Mapping[str, WordMasks]) -> None:
        self._masks = masks
        self.words: dict[str, bool] = {}

    def __getitem__(self, key: str) -> WordMasks:
        masks = self._masks[key]
        for word, mask in zip(masks.words, masks.values, strict=True):
            self.words[word.lower()] = self.words.get(word.lower(), False) or bool(mask.any())
        return masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


def mask_scores(
    stage: Evaluate, run: Run, evaluators: Mapping[str, Evaluator], result: dict[str, Any]
) -> dict[str, Any]:
    """The scores by those evaluators that compare masks; counts and warnings go into ``result``.

    Raises:
        ConfigError: predicted and true masks have no key in common, or a key is that of two images.
    """
    truth = _MaskReader(open_masks(stage.truth))
    predicted = _MaskReader(open_masks(stage.predicted) if stage.predicted else _masks_of_run(run))
    shared = len(predicted.keys() & truth.keys())
    if not shared:
        raise ConfigError(f"no key of the predicted masks is among those of {stage.truth}")
    if shared < len(truth):
        result["warnings"].append(f"{len(truth) - shared} of {len(truth)} true masks have no prediction beside them")
    result["masks"] = {"images": shared}
    data = EvalData(predicted=predicted, truth=truth)
    scores = {name: json_safe(one.evaluate(data)) for name, one in evaluators.items() if one.needs == "masks"}
    result["warnings"] += [*few_warnings("images with masks", shared), *word_warnings(predicted.words, truth.words)]
    return scores


def _masks_of_run(run: Run) -> LazyMasks:
    """The run's own masks, by key; those of attended images by the images' original names.

    Raises:
        ConfigError: two images had the same name.
    """
    readers: dict[str, Callable[[], WordMasks]] = {}
    names = _original_names(run)
    for unit in run.units("masks"):
        for key, members in run.read("masks", unit):  # packed: a few hundred bytes a sample
            name = names.get(key, key)
            if name in readers:
                raise ConfigError(
                    f"two images of {run.path} are called {name}; true masks are matched by name, so evaluate one "
                    "data set at a time"
                )
            readers[name] = partial(decode_masks, key, members)
    return LazyMasks(readers)


def _original_names(run: Run) -> dict[str, str]:
    """The names that attended images had, which are those of their true masks, by key; none for generated images."""
    if run.artifact("images")["stage"] != "attend":
        return {}
    rows = (row for unit in run.units("images") for row in read_tar(run.tar("images", unit), ("json",)))
    return {key: str(decode_meta(key, members).get("source") or key) for key, members in rows}
