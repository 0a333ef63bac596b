"""The options that several commands have, and the settings that they stand for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthgen.errors import ConfigError

if TYPE_CHECKING:
    from synthgen.config import Choice
    from synthgen.plan import Plan
    from synthgen.run import Run

__all__ = [
    "LATEST",
    "AddressOption",
    "BackboneOption",
    "CaptionOption",
    "EngineOption",
    "MetadataOption",
    "ModelOption",
    "PathSetOption",
    "PlannedRunOption",
    "RunArgument",
    "RunOption",
    "RunsOption",
    "SetOption",
    "WorkersOption",
    "agree",
    "backbone_of",
    "chosen_of",
    "engine_of",
    "export_of",
    "method_of",
    "pairs_of",
    "part_of",
    "plan_of",
    "with_set",
]


def _folder(name: str | Path) -> Path:
    from synthgen.config import run_folder

    return run_folder(name)


RunOption = Annotated[Path, typer.Option("--run", parser=_folder, metavar="<path>", help="Run directory.")]
RunArgument = Annotated[Path, typer.Argument(parser=_folder, help="Run directory.")]
RunsOption = Annotated[
    Path, typer.Option("--run", parser=_folder, metavar="<path>", help="Where runs would be written.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, or PART.NAME=VALUE: see synthgen schema."),
]
PathSetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="e.g. stages.masks.min_area=0.01")
]
PlannedRunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        parser=_folder,
        metavar="<path>",
        help="Run directory; a pipeline file has its own (--set run=DIR).  [default: runs/latest]",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(help="local, accelerate, ray.  [default: local; accelerate under accelerate launch]"),
]
WorkersOption = Annotated[
    int, typer.Option(help="Processes, or actors of Ray; 0: one for every GPU, or core where there is none.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join, such as head:6379.  [default: RAY_ADDRESS, or one here]")
]
BackboneOption = Annotated[
    str | None, typer.Option(help="tiny (ships with synthgen), diffusers.  [default: tiny; diffusers with --model]")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Short name (sd15, sdxl, sd35, flux-dev, ...), folder or hub id of a diffusers model."),
]
MetadataOption = Annotated[
    str | None,
    typer.Option(
        help="Captions of the folder's images: .jsonl or .csv (file_name, text), or COCO's captions_*.json.  "
        "[default: metadata.jsonl or .csv in the folder, else the .txt beside each image]"
    ),
]
CaptionOption = Annotated[
    str | None, typer.Option(help="For images without one; {label} is their class, e.g. 'a photo of a {label}'.")
]
LATEST = Path("runs/latest")


_FLAGS = {  # of settings that are not called as their options are; other options of parts have none
    "backbone.name": "--backbone", "backbone.model": "--model", "backbone.num_steps": "--steps",
    "backbone.guidance_scale": "--guidance", "encoder.name": "--encoder", "engine.address": "--address",
    "engine.name": "--engine", "engine.workers": "--workers", "evaluators": "--evaluator",
    "generator.name": "--generator", "method.name": "--method", "refine.name": "--refine",
}  # fmt: skip


def method_of(name: str | None, guided: bool, label: str | None, extra: list[str] | None) -> dict[str, Any]:
    """A method and the folder of its training; guided, with what that means for it, in a folder of its own."""
    if not guided:
        return {"method": name, "label": label}
    from synthgen.methods import METHODS

    name = _named("method", name, extra) or "mae"
    label = with_set({"label": label}, extra).get("label") or f"{name}-guided"
    return {"method": {"name": name, **METHODS.load(name).guided}, "label": label}


def backbone_of(name: str | None, extra: list[str] | None, **options: Any) -> dict[str, Any] | None:
    """A backbone with the options that were given; a model is one of ``diffusers`` where none is named."""
    named = _named("backbone", name, extra)
    return part_of(named or ("diffusers" if options.get("model") else None), options)


def _named(part: str, name: str | None, extra: list[str] | None) -> str | None:
    """The name of a part by its own option or by ``--set``."""
    said = _as_part(with_set({part: part_of(name, {})}, extra).get(part)) or {}
    return str(said["name"]) if "name" in said else None


def part_of(part: str | None, options: dict[str, Any]) -> dict[str, Any] | None:
    """A part by its name, with the options that were given; options alone are those of the part that is there."""
    given = {"name": part, **options}
    return {key: value for key, value in given.items() if value is not None} or None


def pairs_of(settings: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` options as a mapping; values are YAML, so numbers are numbers."""
    import yaml

    from synthgen.config import load_yaml

    pairs = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, not {setting!r}")
        try:
            pairs[name] = load_yaml(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {name}: {value!r} is not a YAML value") from None
    return pairs


def engine_of(name: str | None, workers: int, address: str | None) -> dict[str, Any]:
    """The engine and its options as far as they were given."""
    given = {"name": name, "workers": workers, "address": address}
    return {key: value for key, value in given.items() if value}


def agree(given: Mapping[str, Any], extra: list[str] | None) -> None:
    """See that options and ``--set`` do not ask for two values of one setting.

    Raises:
        ConfigError: they do; names both.
    """
    for text in extra or []:
        ((dotted, value),) = pairs_of([text]).items()
        for name, was, now in _shared(given, dotted, value):
            flag = _FLAGS.get(name, "" if "." in name else f"--{name.replace('_', '-')}")
            if flag and was != now:
                told = ", ".join(map(str, was)) if isinstance(was, list) else was
                raise ConfigError(f"{flag} {told} and --set {text} ask for two values of {name}; give one of them")


def _shared(given: Mapping[str, Any], dotted: str, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is given and set: the dotted name, what is given, and what is set."""
    name, _, option = dotted.partition(".")
    was = given.get(name)
    if was in (None, "", {}):
        return
    if not option and not isinstance(was, dict) and not isinstance(value, dict):
        yield name, was, value
        return
    old, new = _as_part(was) or {}, {option: value} if option else _as_part(value) or {}
    yield from ((f"{name}.{key}", old[key], new[key]) for key in old if key in new)


def _as_part(value: Any) -> dict[str, Any] | None:
    """A part by its name or as a mapping; None where it is neither."""
    if isinstance(value, str) and value:
        return {"name": value}
    return value if isinstance(value, dict) else None


def with_set(given: dict[str, Any], extra: list[str] | None) -> dict[str, Any]:
    """The settings that were given, and beside them what ``--set`` says; of a part, option by option.

    Raises:
        ConfigError: they ask for two values of one setting, or for an option of what is no part.
    """
    agree(given, extra)
    settings = {key: value for key, value in given.items() if value is not None}
    for dotted, value in pairs_of(extra).items():
        name, _, option = dotted.partition(".")
        before = settings.get(name)
        if option:  # --set refine.smoothness=2 is an option of a part
            part = {} if before is None else _as_part(before)
            if part is None:
                raise ConfigError(f"--set {dotted}: {name} is no part with options, but {before!r}")
            settings[name] = {**part, option: value}
        elif isinstance(before, dict) or isinstance(value, dict):
            old, new = _as_part(before), _as_part(value)
            settings[name] = {**old, **new} if old and new else value
        else:
            settings[name] = value
    return settings


def chosen_of(
    run: Run | None, stage: str, given: dict[str, Any], extra: list[str] | None, engine: dict[str, Any] | None = None
) -> tuple[Choice, dict[str, Any]]:
    """The engine of a stage, and its settings, checked; of a run that is there see :func:`settings_to_go_on`.

    Raises:
        UnknownName, ConfigError: there is no such setting, or two values of one are asked for.
        MissingArtifact: a setting is needed that has no default, and the run has not been begun.
    """
    from synthgen.api import make_stage, settings_to_go_on
    from synthgen.config import Choice
    from synthgen.engines import default_engine

    settings = with_set({**given, "engine": engine or {}}, extra)
    chosen = settings.pop("engine")
    chosen = Choice.of({"name": default_engine(), **chosen} if isinstance(chosen, dict) else chosen)
    settings = settings_to_go_on(run, stage, settings) if run else settings
    make_stage(stage, settings)  # before they become arguments: an unknown one may be called as another argument is
    return chosen, settings


def plan_of(
    file: Path | None,
    run: Path | None,
    *,
    prompts: str | None,
    images: str | None,
    metadata: str | None,
    caption: str | None,
    model: str | None,
    engine: str | None,
    extra: list[str] | None,
    workers: int,
    measure: bool,
    sample: int,
    describe: Callable[[str], None],
) -> Plan:
    """What a pipeline file will cost, or ``generate`` of prompts, or ``attend`` of images.

    Raises:
        ConfigError: it is not one of the three that is asked for.
    """
    from synthgen import api

    agree({"engine": engine_of(engine, workers, None)}, extra)
    how: dict[str, Any] = {"workers": workers, "measure": measure, "sample": sample, "describe": describe}
    given: dict[str, Any] = {"backbone": backbone_of(None, extra, model=model)}
    if file and run:
        own = shlex.quote(f"run={run}")
        raise ConfigError(f"{file} names the run that it is for; leave --run out, or give --set {own}")
    if file and not any((prompts, images, metadata, caption, model)):
        return api.plan_pipeline(file, overrides=tuple(pairs_of(extra).items()), engine=engine, **how)
    if prompts and not any((file, images, metadata, caption)):
        given |= {"prompts": prompts, "template": ""}
        return api.plan_stage("generate", **how, **_planned(run, "generate", given, extra, engine))
    if images and not any((file, prompts)):
        given |= {"images": images, "metadata": metadata, "caption": caption}
        return api.plan_stage("attend", **how, **_planned(run, "attend", given, extra, engine))
    raise ConfigError("give a pipeline file, or --prompts or --images with what generate or attend take beside it")


def _planned(
    path: Path | None, stage: str, given: dict[str, Any], extra: list[str] | None, engine: str | None
) -> dict[str, Any]:
    """The run, the engine and the settings with which that stage would go on with it, or begin it."""
    from synthgen.errors import MissingArtifact
    from synthgen.run import Run

    path = path or LATEST
    try:
        run = Run.open(path)
    except MissingArtifact:
        run = None
    chosen, settings = chosen_of(run, stage, given, extra, engine_of(engine, 0, None))
    return {"run": path, "engine": chosen, **settings}


def export_of(format: str, image_format: str | None, extra: list[str] | None) -> dict[str, Any]:
    """The settings of an export but for its format, checked.

    Raises:
        ConfigError: one is unknown or of the wrong kind, or two values of one are asked for.
    """
    from synthgen.config import check
    from synthgen.interchange import Export

    settings = with_set({"format": format, "image_format": image_format}, extra)
    check(Export, settings, where="export")
    return {name: value for name, value in settings.items() if name != "format"}
