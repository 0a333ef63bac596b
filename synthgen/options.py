"""The options that several commands have, and the settings that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthgen.errors import ConfigError

if TYPE_CHECKING:
    from synthgen.config import Choice
    from synthgen.run import Run

__all__ = [
    "LATEST",
    "AddressOption",
    "BackboneOption",
    "CaptionOption",
    "EngineOption",
    "MetadataOption",
    "ModelOption",
    "RunOption",
    "SetOption",
    "WorkersOption",
    "chosen_of",
    "engine_of",
    "method_of",
    "pairs_of",
    "part_of",
    "with_set",
]

RunOption = Annotated[Path, typer.Option("--run", help="Run directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of this stage, e.g. min_area=0.01."),
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


def method_of(name: str | None, guided: bool, label: str | None) -> dict[str, Any]:
    """A method and the folder of its training; guided, with what that means for it, in a folder of its own."""
    if not guided:
        return {"method": name, "label": label}
    from synthgen.methods import METHODS

    name = name or "mae"
    return {"method": {"name": name, **METHODS.load(name).guided}, "label": label or f"{name}-guided"}


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


def with_set(given: dict[str, Any], extra: list[str] | None) -> dict[str, Any]:
    """The settings that were given, and on top of them what ``--set`` says."""
    settings = {key: value for key, value in given.items() if value is not None}
    for dotted, value in pairs_of(extra).items():
        part, _, option = dotted.partition(".")
        if option:  # --set refine.smoothness=2 is an option of a part
            before = settings.get(part, {})
            if not isinstance(before, str | dict):
                raise ConfigError(f"--set {dotted}: {part} is no part with options, but {before!r}")
            settings[part] = {**({"name": before} if isinstance(before, str) else before), option: value}
        else:
            settings[part] = value
    return settings


def chosen_of(
    run: Run, stage: str, given: dict[str, Any], extra: list[str] | None, engine: dict[str, Any] | None = None
) -> tuple[Choice, dict[str, Any]]:
    """The engine of a stage, and its settings: see :func:`synthgen.api.settings_to_go_on`."""
    from synthgen.api import settings_to_go_on
    from synthgen.config import Choice
    from synthgen.engines import default_engine

    settings = with_set({**given, "engine": {"name": default_engine(), **(engine or {})}}, extra)
    chosen = Choice.of(settings.pop("engine"))
    return chosen, settings_to_go_on(run, stage, settings)
