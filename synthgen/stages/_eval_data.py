"""What evaluators judge, gathered from the sources: each image is decoded once, and seen once by each network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from synthgen.evaluators import OF_LABELLED, OF_SCENES, EvalData, Evaluator, Need, Row, json_safe
from synthgen.evaluators._extraction import (
    Extracted,
    Extractor,
    as_latents,
    class_numbers,
    joined_classes,
    labelled,
    mapped,
    paired,
    pictured,
    scenes,
)
from synthgen.records import WordMasks
from synthgen.run import Run
from synthgen.stages._eval_sources import Source, looked_at, masks_to_judge, placed, thinned
from synthgen.stages._eval_warnings import doubts, doubts_of_masks, doubts_of_words

if TYPE_CHECKING:
    from synthgen.stages.evaluate import Evaluate

__all__ = ["ReadMasks", "gathered", "scores_of_masks", "telling"]

Parts = dict[Row, dict[str, Any]]  # of the data of each kind of row

_KEPT: dict[Need, str] = {"maps": "maps of blocks", "latents": "latents", "images": "pixels"}  # of images with labels


def gathered(
    sources: Mapping[str, Source],
    extractor: Extractor,
    kinds: Collection[Row],
    patch_memory: float,
    tick: Callable[[int], None],
    result: dict[str, Any],
) -> dict[Row, EvalData]:
    """The data of each kind of row: those of the extractor's networks, and ``pixels``.

    What was found, and what is doubtful about it, goes into ``result``.
    """
    needs = extractor.needs
    sizes = {"patches": extractor.patch_bytes if OF_SCENES & needs else 0, "maps": extractor.labelled_bytes}
    masked, classed = dict[str, tuple[int, ...]](), dict[str, tuple[int, ...]]()
    if sizes["patches"]:
        given: dict[str, Sequence[int]] = {name: placed(source, needs) for name, source in sources.items()}
        masked = thinned(given, sizes["patches"], patch_memory, "patch features", result)
    if sizes["maps"]:
        # class by class, so that each keeps its share
        given = {name: sorted(source.labels, key=source.labels.__getitem__) for name, source in sources.items()}
        kept = " and ".join(told for need, told in _KEPT.items() if need in needs)
        classed = thinned(given, sizes["maps"], patch_memory, kept, result)
    numbers = {name: looked_at(source, needs) for name, source in sources.items()}
    if not needs & {"features", "pairs"}:  # then nothing is made of the others
        seen = {name: tuple(sorted({*masked.get(name, ()), *classed.get(name, ())})) for name in sources}
        tick(sum(len(numbers[name]) - len(seen[name]) for name in sources))
        numbers = seen
    found: dict[str, Extracted] = {}
    for name, source in sources.items():
        taker = extractor if name == "test" else replace(extractor, dual=None)
        samples = source.open(masks=bool(OF_SCENES & needs))
        found[name] = taker.extract(samples, numbers[name], masked.get(name, ()), classed.get(name, ()), tick)
        result[name] = {"images": len(numbers[name])}

    parts: Parts = {kind: {"device": extractor.device} for kind in kinds}
    if "features" in needs:
        _add_labelled(parts, sources, found, numbers)
    if classed:
        _add_mapped(parts, sources, found, classed, extractor)
    if OF_LABELLED & needs:
        for name, source in sources.items():
            result[name] |= {"images": len(source.labels), "classes": len(set(source.labels.values()))}
            result[name] |= {"images_with_maps": len(classed[name])} if needs & {"maps", "latents"} else {}
            result[name] |= {"images_with_pixels": len(classed[name])} if "images" in needs else {}
        judged = {name: [sources[name].labels[number] for number in some] for name, some in classed.items()}
        result["warnings"] += doubts(sources, {} if "features" in needs else judged)
    if OF_SCENES & needs:
        _add_scenes(parts, found, result)
        result["warnings"] += doubts_of_masks(found, masked)
    held = sizes["patches"] * sum(len(one.keys) for one in found.values())
    held += sizes["maps"] * sum(map(len, classed.values()))
    if held:
        result["patch_memory_mb"] = round(held / 1e6, 1)
    if extractor.dual is not None:
        captions = [sources["test"].captions.get(number, ()) for number in numbers["test"]]
        parts["encoder"]["pairs"] = paired(found["test"], captions, extractor.dual)
        result["test"] |= {"images_with_texts": sum(map(bool, captions)), "texts": sum(map(len, captions))}
    return {kind: EvalData(**part) for kind, part in parts.items()}


class ReadMasks(Mapping[str, WordMasks]):
    """Masks by key; ``words`` are those of the masks that were read, in lower case, and whether any has pixels."""

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


def scores_of_masks(
    stage: Evaluate, run: Run, evaluators: Mapping[str, Evaluator], result: dict[str, Any]
) -> dict[str, Any]:
    """The scores of masks by those of the evaluators that judge them; what is doubtful goes into ``result``.

    Raises:
        ConfigError: see :func:`~synthgen.stages._eval_sources.masks_to_judge`.
    """
    predicted, truth = map(ReadMasks, masks_to_judge(stage, run, result))
    data = EvalData(predicted=predicted, truth=truth)
    judges = {name: one for name, one in evaluators.items() if one.needs == "masks"}
    found = {name: json_safe(evaluator.evaluate(data)) for name, evaluator in judges.items()}
    result["warnings"] += doubts_of_words(predicted.words, truth.words)
    return found


def telling(data: EvalData, describe: Callable[[str], None], what: str) -> EvalData:
    """The data for the evaluation ``what``, which is described now and, if it is a long one, on its way."""
    describe(what)
    return replace(data, describe=lambda text: describe(f"{what}: {text}"))


def _add_labelled(
    parts: Parts,
    sources: Mapping[str, Source],
    found: Mapping[str, Extracted],
    numbers: Mapping[str, tuple[int, ...]],
) -> None:
    classes = sorted(set(sources["train"].labels.values()))
    for name, source in sources.items():
        labels = [source.labels.get(number) for number in numbers[name]]
        keys = [source.samples.key(number) for number in numbers[name]]
        for kind, part in parts.items():
            if kind in found[name].features:
                part[name] = labelled(found[name], kind, labels, keys, classes)


def _add_mapped(
    parts: Parts,
    sources: Mapping[str, Source],
    found: Mapping[str, Extracted],
    classed: Mapping[str, tuple[int, ...]],
    extractor: Extractor,
) -> None:
    classes = sorted(set(sources["train"].labels.values()))
    for name, source in sources.items():
        numbers = class_numbers([source.labels[number] for number in classed[name]], classes)
        keys = [source.samples.key(number) for number in classed[name]]
        for kind, part in parts.items():
            part[f"{name}_maps"] = mapped(found[name], kind, numbers, keys)
            if kind in extractor.networks:
                part |= {
                    f"{name}_images": pictured(found[name].images, numbers, keys),
                    "encoder": extractor.networks[kind],
                    "pool": extractor.pool,
                }
            if kind in ("generator", "random generator"):
                part |= {
                    f"{name}_images": pictured(found[name].drawn, numbers, keys),
                    "reader": extractor.generator,
                    "random_init": kind == "random generator",
                }
        if "generator" in parts:
            parts["generator"][f"{name}_latents"] = as_latents(found[name], numbers, keys)


def _add_scenes(parts: Parts, found: Mapping[str, Extracted], result: dict[str, Any]) -> None:
    for name, names in zip(("train", "test"), joined_classes(found["train"], found["test"]), strict=True):
        for kind, split in scenes(found[name], names).items():
            if kind in parts:
                parts[kind][f"{name}_scenes"] = split
        boxed = found[name].boxed  # and nothing else
        result[name] |= {"images_with_masks": len(found[name].keys) - boxed, "mask_classes": len(found[name].names)}
        result[name] |= {"images_with_boxes_only": boxed} if boxed else {}
