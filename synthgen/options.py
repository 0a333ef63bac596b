"""Turn the options of a command into settings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from synthgen.errors import ConfigError
from synthgen.flags import LATEST

if TYPE_CHECKING:
    from synthgen.config import Choice
    from synthgen.plan import Plan
    from synthgen.run import Run

__all__ = [
    "apply_set",
    "backbone_settings",
    "check_conflicts",
    "engine_settings",
    "export_settings",
    "make_part",
    "make_plan",
    "method_settings",
    "parse_pairs",
    "pipeline_overrides",
    "resolve_settings",
    "resume_settings",
]


_FLAGS = {  # settings whose option has another name; other options of parts have no flag
    "backbone.name": "--backbone", "backbone.model": "--model", "backbone.num_steps": "--steps",
    "backbone.guidance_scale": "--guidance", "encoder.name": "--encoder", "engine.address": "--address",
    "engine.name": "--engine", "engine.workers": "--workers", "evaluators": "--evaluator",
    "generator.name": "--generator", "method.name": "--method", "refine.name": "--refine",
}  # fmt: skip


def method_settings(name: str | None, guided: bool, label: str | None, extra: list[str] | None) -> dict[str, Any]:
    """The method and output folder of a training; guided, with the method's guided options and a folder of its own."""
    if not guided:
        return {"method": name, "label": label}
    from synthgen.methods import METHODS

    name = _part_name("method", name, extra) or "mae"
    label = apply_set({"label": label}, extra).get("label") or f"{name}-guided"
    return {"method": {"name": name, **METHODS.load(name).guided}, "label": label}


def backbone_settings(name: str | None, extra: list[str] | None, **options: Any) -> dict[str, Any] | None:
    """A backbone with the given options; a model without a named backbone means ``diffusers``."""
    named = _part_name("backbone", name, extra)
    return make_part(named or ("diffusers" if options.get("model") else None), options)


def _part_name(part: str, name: str | None, extra: list[str] | None) -> str | None:
    """The name of a part, from its own option or from ``--set``."""
    found = _as_part(apply_set({part: make_part(name, {})}, extra).get(part)) or {}
    return str(found["name"]) if "name" in found else None


def make_part(part: str | None, options: dict[str, Any]) -> dict[str, Any] | None:
    """A part by name, with the given options; options without a name apply to the part that is already set."""
    given = {"name": part, **options}
    return {key: value for key, value in given.items() if value is not None} or None


def parse_pairs(settings: list[str] | None) -> dict[str, Any]:
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


def engine_settings(name: str | None, workers: int, address: str | None) -> dict[str, Any]:
    """The engine and those of its options that were given."""
    given = {"name": name, "workers": workers, "address": address}
    return {key: value for key, value in given.items() if value}


def check_conflicts(given: Mapping[str, Any], extra: list[str] | None) -> None:
    """Check that options and ``--set`` do not ask for two values of one setting.

    Raises:
        ConfigError: they do; the message names both.
    """
    for text in extra or []:
        ((dotted, value),) = parse_pairs([text]).items()
        for name, was, now in _given_twice(given, dotted, value):
            flag = _FLAGS.get(name, "" if "." in name else f"--{name.replace('_', '-')}")
            if flag and was != now:
                text_of = ", ".join(map(str, was)) if isinstance(was, list) else was
                raise ConfigError(f"{flag} {text_of} and --set {text} ask for two values of {name}; give one of them")


def _given_twice(given: Mapping[str, Any], dotted: str, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Settings given both by an option and by ``--set``: dotted name, value of the option, value of ``--set``."""
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
    """A part as a mapping, from its name or a mapping; None for anything else."""
    if isinstance(value, str) and value:
        return {"name": value}
    return value if isinstance(value, dict) else None


def apply_set(given: dict[str, Any], extra: list[str] | None) -> dict[str, Any]:
    """The given settings merged with ``--set``; parts are merged option by option.

    Raises:
        ConfigError: two values of one setting are asked for, or an option of a setting that is not a part.
    """
    check_conflicts(given, extra)
    settings = {key: value for key, value in given.items() if value is not None}
    for dotted, value in parse_pairs(extra).items():
        name, _, option = dotted.partition(".")
        before = settings.get(name)
        if option:  # --set refine.smoothness=2 is an option of a part
            part = {} if before is None else _as_part(before)
            if part is None:
                raise ConfigError(f"--set {dotted}: {name} is not a part with options, but {before!r}")
            settings[name] = {**part, option: value}
        elif isinstance(before, dict) or isinstance(value, dict):
            old, new = _as_part(before), _as_part(value)
            settings[name] = {**old, **new} if old and new else value
        else:
            settings[name] = value
    return settings


def resolve_settings(
    run: Run | None, stage: str, given: dict[str, Any], extra: list[str] | None, engine: dict[str, Any] | None = None
) -> tuple[Choice, dict[str, Any]]:
    """The engine of a stage and its checked settings; for an existing run see :func:`resume_settings`.

    Raises:
        UnknownName, ConfigError: a setting does not exist, or two values of one are asked for.
        MissingArtifact: a required setting is missing, and there is no run to take it from.
    """
    from synthgen.config import Choice
    from synthgen.engines import default_engine
    from synthgen.stages import make_stage

    settings = apply_set({**given, "engine": engine or {}}, extra)
    chosen = settings.pop("engine")
    chosen = Choice.of({"name": default_engine(), **chosen} if isinstance(chosen, dict) else chosen)
    settings = resume_settings(run, stage, settings) if run else settings
    make_stage(stage, settings)  # check them first: an unknown setting might have the name of another argument
    return chosen, settings


def resume_settings(run: Run, stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command: those recorded in the folder of its stage, replaced by the ``given`` ones.

    A folder without units is ignored if any setting is given. Pipeline files and functions of the API do not use this:
    they state all settings.

    Raises:
        MissingArtifact: a required setting is missing, and the folder has no settings yet.
    """
    from synthgen.entries import merge_settings
    from synthgen.errors import MissingArtifact
    from synthgen.stages import STAGES

    kind = STAGES.load(stage)
    folder = kind.folder_of(given)
    entry = run.find_artifact(folder)
    asked = any(value not in ("", None) for value in given.values())
    known = {item.name: item for item in dataclasses.fields(kind) if item.init}
    if entry is None or entry["stage"] != stage or (asked and not run.is_nonempty(folder)):
        for name, item in known.items():
            if item.default is dataclasses.MISSING and name not in given:
                raise MissingArtifact(
                    f"{run.path} has no {name} of {stage} yet; give some with: "
                    f"synthgen {stage} --{name} PATH --run {shlex.quote(str(run.path))}"
                )
        return dict(given)
    before = {name: value for name, value in entry["settings"].items() if name in known}
    settings = merge_settings(before, given)
    if "label" in given and kind.folder_of(settings | {"label": before.get("label", "")}) == folder:
        settings["label"] = before.get("label", "")  # which names the same folder
    return settings


def pipeline_overrides(run: Path | None, extra: list[str] | None, engine: dict[str, Any]) -> dict[str, Any]:
    """The settings that replace those of a pipeline file, by dotted paths: those of ``--set``, and ``--run``.

    Raises:
        ConfigError: ``--set`` asks for another run or ``engine`` than the options do.
    """
    own = {} if run is None else {"run": str(run)}
    check_conflicts({"engine": engine, **own}, extra)
    return {**parse_pairs(extra), **own}


def make_plan(
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
    """The estimated cost of a pipeline file, of ``generate`` on prompts, or of ``attend`` on images.

    Raises:
        ConfigError: not exactly one of the three is asked for.
    """
    from synthgen import api

    overrides = pipeline_overrides(run if file else None, extra, engine_settings(engine, workers, None))
    how: dict[str, Any] = {"workers": workers, "measure": measure, "sample": sample, "describe": describe}
    given: dict[str, Any] = {"backbone": backbone_settings(None, extra, model=model)}
    if file and not any((prompts, images, metadata, caption, model)):
        return api.plan_pipeline(file, overrides=overrides, engine=engine, **how)
    if prompts and not any((file, images, metadata, caption)):
        given |= {"prompts": prompts, "template": ""}
        return _plan_stage(run, "generate", given, extra, engine, how)
    if images and not any((file, prompts)):
        given |= {"images": images, "metadata": metadata, "caption": caption}
        return _plan_stage(run, "attend", given, extra, engine, how)
    raise ConfigError("give a pipeline file, or --prompts or --images with the options of generate or attend")


def _plan_stage(
    path: Path | None,
    stage: Literal["generate", "attend"],
    given: dict[str, Any],
    extra: list[str] | None,
    engine: str | None,
    how: dict[str, Any],
) -> Plan:
    """The plan of one stage on the run at ``path``; without one on the default run, or a new run if that does not fit.

    Raises:
        StaleArtifact: the run at ``path`` was made with other settings or inputs.
    """
    from synthgen import api
    from synthgen.errors import MissingArtifact, StaleArtifact
    from synthgen.run import Run

    def plan_on(folder: Path) -> Plan:
        try:
            run = Run.open(folder)
        except MissingArtifact:
            run = None
        chosen, settings = resolve_settings(run, stage, given, extra, engine_settings(engine, 0, None))
        return api.plan_stage(stage, folder, engine=chosen, **how, **settings)

    try:
        return plan_on(path or LATEST)
    except StaleArtifact:
        if path:
            raise
    new = next(one for number in count(1) if not (one := LATEST.with_name(f"new-{number}")).exists())
    found = plan_on(new)
    note = f"{LATEST} was made with other settings or inputs, so this plan is for a new run; give {stage} a --run too"
    return dataclasses.replace(found, notes=(note, *found.notes))


def export_settings(format: str, image_format: str | None, extra: list[str] | None) -> dict[str, Any]:
    """The checked settings of an export, without its format.

    Raises:
        ConfigError: a setting is unknown or has the wrong type, or two values of one are asked for.
    """
    from synthgen.config import check
    from synthgen.export import Export

    settings = apply_set({"format": format, "image_format": image_format}, extra)
    check(Export, settings, where="export")
    return {name: value for name, value in settings.items() if name != "format"}
