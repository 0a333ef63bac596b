"""Whether models are on this machine, complete and in safetensors; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthgen.errors import UnknownName, one_line
from synthgen.untrusted import read_file, read_json

__all__ = ["HostedModel", "ShippedModel", "hosted_model", "shipped_model"]

_WITHOUT_WEIGHTS = re.compile(r"(Scheduler|Tokenizer|TokenizerFast|Processor|Extractor)$")  # classes of a pipeline
_WEIGHTS = re.compile(  # with shard number and count, and a variant before or after them
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<early>\w+))?(?:-\d{5}-of-(?P<of>\d{5}))?(?:\.(?P<late>\w+))?\.safetensors"
)


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """The model that ships with synthgen."""

    path: str
    bytes: int  # of its weights
    loads: bool


@dataclass(frozen=True, slots=True)
class HostedModel:
    """The requested ``diffusers`` model."""

    name: str
    model: str  # folder or hub id
    folder: str = ""  # its folder on this machine; empty: not found
    pipeline: str = ""  # the class that its index names
    family: str = ""
    bytes: int = 0  # of the weights that would be loaded
    variant: str = ""  # of these weights
    missing: tuple[str, ...] = ()  # parts without weights


def shipped_model(problems: list[str]) -> ShippedModel:
    """The model that ships with synthgen."""
    from synthgen import tiny
    from synthgen.backbones import BACKBONES

    loads = False
    try:
        BACKBONES.build("tiny", device="cpu")
        loads = True
    except Exception as error:  # any fault of files or libraries
        problems.append(f"the shipped model does not load ({one_line(error)}); install synthgen again")
    size = sum(path.stat().st_size for path in tiny.WEIGHTS.rglob("*.safetensors"))
    return ShippedModel(str(tiny.WEIGHTS), size, loads)


def hosted_model(name: str, problems: list[str], notes: list[str]) -> HostedModel:
    """A model of ``diffusers``, by its short name, folder or hub id."""
    from synthgen.diffusion import FAMILIES, SHORT_NAMES

    model = SHORT_NAMES.get(name, name)
    folder = _on_this_machine(model)
    if folder is None:
        if "/" in model:
            problems.append(f"the model {model!r} is not on this machine; download it first with: hf download {model}")
        else:
            problems.append(f"{UnknownName.among('model', name, SHORT_NAMES)}; a folder or a hub id will do too")
        return HostedModel(name, model)
    try:
        index = dict(read_json(read_file(folder / "model_index.json")))
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"{folder}/model_index.json cannot be read ({one_line(error)}); download {model} again")
        return HostedModel(name, model, str(folder))
    pipeline = str(index.get("_class_name", "model without a class"))
    family = FAMILIES.get(pipeline)
    if family is None:
        known = ", ".join(FAMILIES)
        problems.append(f"{model!r} is a {pipeline}, whose attention synthgen does not know; known: {known}")
    found = {part: _weights(folder / part) for part in _parts_with_weights(index)}
    common = set.intersection(*(set(variants) for variants in found.values())) if found else set()
    variant = min(common, default="")  # "" is the one without a variant
    missing = tuple(part for part, variants in found.items() if variant not in variants)
    if missing:
        problems.append(
            f"{model!r} has no safetensors weights for {', '.join(missing)} on this machine; "
            f"download all of it, for example with: hf download {model}"
        )
    if variant:
        notes.append(f"{model} has only weights of a variant; load them with: --set backbone.variant={variant}")
    total = sum(variants.get(variant, 0) for variants in found.values())
    return HostedModel(name, model, str(folder), pipeline, family.__name__ if family else "", total, variant, missing)


def _on_this_machine(model: str) -> Path | None:
    """The folder of a model: the given one, or that of the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a hub id
        return None


def _parts_with_weights(index: dict[str, Any]) -> Iterable[str]:
    for part, value in index.items():
        described = isinstance(value, list) and len(value) == 2 and all(value)  # [None, None]: saved without this part
        if described and part != "safety_checker" and not _WITHOUT_WEIGHTS.search(str(value[1])):
            yield part


def _weights(folder: Path) -> dict[str, int]:
    """The size in bytes of each complete variant of a part's weights."""
    shards: dict[tuple[str, int], list[int]] = {}
    for path in folder.glob("*.safetensors"):
        name = _WEIGHTS.fullmatch(path.name)
        if name and path.is_file():  # links of the cache may be broken
            kind = (name["early"] or name["late"] or "", int(name["of"] or 1))
            shards.setdefault(kind, []).append(path.stat().st_size)
    return {variant: sum(sizes) for (variant, of), sizes in shards.items() if len(sizes) == of}
