"""List the settings of stages and parts, as text for users and as JSON schema for editors."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from synthgen.config import Choice, dump, settings_model
from synthgen.errors import UnknownName
from synthgen.registry import Registry
from synthgen.stages import STAGES
from synthgen.text import WIDTH, columns, table, wrap

__all__ = ["listing", "setting_comments", "settings_schema"]

#: For each setting that names a part: the part's registry, and the arguments that the stage supplies.
_PARTS: dict[str, tuple[Registry[Any], tuple[str, ...]]] = {
    "attend.backbone": (Registry("synthgen.backbones"), ("device",)),
    "generate.backbone": (Registry("synthgen.backbones"), ("device",)),
    "masks.refine": (Registry("synthgen.refiners"), ()),
    "filter.filters": (Registry("synthgen.filters"), ()),
    "pretrain.method": (Registry("synthgen.methods"), ("encoder",)),
    "evaluate.evaluators": (Registry("synthgen.evaluators"), ()),
    "engine": (Registry("synthgen.engines"), ()),
}
_TOOL_COMMENT = re.compile(r"(type|noqa|fmt|pragma|mypy)\b")  # comments for tools


def listing(path: str = "", *, as_json: bool = False) -> str:
    """The settings at a path, as text or as JSON schema.

    Args:
        path: a stage (``masks``); a setting that names a part (``masks.refine``; ``engine`` is one of all stages), for
            the available parts; a setting with a part (``masks.refine=attentioncut``), for its options; or empty, for
            an overview.

    Raises:
        UnknownName: the stage, setting or part does not exist.
        MissingDependency: the part needs a library that is not installed.
    """
    place, equals, part = path.partition("=")
    if not path:
        found, lines = _overview(), _overview_lines()
    elif place in _PARTS and not equals:
        found, lines = _part_schema(_PARTS[place][0]), _part_lines(place)
    elif equals or "." in place:
        if place not in _PARTS:
            raise UnknownName.among("setting that names a part", place, _PARTS)
        family, given = _PARTS[place]
        target = family.load(part)
        found, lines = settings_schema(target, given=given), _setting_lines(path, target, given)
    else:
        stage = STAGES.load(place)
        found, lines = settings_schema(stage, stage=place), _setting_lines(place, stage)
    return json.dumps(found, indent=2) if as_json else "\n".join(lines)


def settings_schema(target: Callable[..., Any], *, given: Sequence[str] = (), stage: str = "") -> dict[str, Any]:
    """The JSON schema of the arguments of ``target``, without those in ``given``."""
    model = settings_model(target, given=frozenset(given))
    schema = model.model_json_schema()
    schema["description"] = _readable(inspect.getdoc(target) or "")
    comments = setting_comments(target)
    for name, found in schema["properties"].items():
        if not model.model_fields[name].is_required():
            found["default"] = dump(model.model_fields[name].get_default(call_default_factory=True))
        if names := _part_names(f"{stage}.{name}"):
            word, mapping = found.get("items", found)["anyOf"]
            word["enum"] = mapping["properties"]["name"]["enum"] = names
        if name in comments:
            found["description"] = comments[name]
    return schema


def setting_comments(target: Callable[..., Any]) -> dict[str, str]:
    """The comment at the end of the line of each argument of ``target`` in its source.

    For a class, arguments are the fields of a dataclass or the parameters of its constructor, including those of its
    parents. Without source code (a build that ships none) there are no comments.
    """
    found: dict[str, str] = {}
    for part in reversed(inspect.getmro(target)) if isinstance(target, type) else (target,):
        if part.__module__.partition(".")[0] not in ("builtins", "torch"):
            try:
                source = textwrap.dedent(inspect.getsource(part))
            except (OSError, TypeError):
                continue
            found |= _comments(source)
    return {name: found[name] for name in inspect.signature(target).parameters if name in found}


def _comments(source: str) -> dict[str, str]:
    """The comment at the end of the line of each field or argument, by name."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (top,) = ast.parse(source).body
    ends: dict[str, int | None] = {}
    for node in [top, *getattr(top, "body", [])]:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            ends[node.target.id] = node.end_lineno
        elif isinstance(node, ast.FunctionDef) and (node is top or node.name == "__init__"):
            ends |= {arg.arg: arg.end_lineno for arg in (*node.args.args, *node.args.kwonlyargs)}
    found = {name: comments.get(line or 0, "") for name, line in ends.items()}
    return {name: _readable(remark) for name, remark in found.items() if remark and not _TOOL_COMMENT.match(remark)}


def _readable(text: str) -> str:
    """A comment or docstring without its markup."""
    return re.sub(r":\w+:`~?([^`]+)`|``([^`]+)``", lambda found: found[1] or found[2], text)


# -- stages and parts


def _part_names(path: str) -> list[str]:
    """The parts that a setting accepts; empty for other settings."""
    return _PARTS[path][0].names() if path in _PARTS else []


def _overview() -> dict[str, Any]:
    return {"stages": STAGES.names(), "parts": {path: _part_names(path) for path in _PARTS}}


def _part_schema(family: Registry[Any]) -> dict[str, Any]:
    """The JSON schema of the name of a part."""
    parts = [{"const": name, "description": _summary(family, name)} for name in family.names()]
    return {"title": family.kind, "type": "string", "oneOf": parts}


def _summary(family: Registry[Any], name: str) -> str:
    """The first line of a part's module, without importing it."""
    spec = importlib.util.find_spec(f"{family.package}.{name}")
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return ""
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return _readable(doc.partition("\n\n")[0].replace("\n", " "))


# -- as text


def _overview_lines() -> Iterator[str]:
    yield from _table(("stage", "description"), [(name, _summary(STAGES, name)) for name in STAGES.names()])
    yield ""
    yield from _table(("setting that names a part", "parts"), [(path, ", ".join(_part_names(path))) for path in _PARTS])
    yield ""
    yield "see: synthgen schema STAGE, SETTING or SETTING=PART, such as masks, masks.refine, masks.refine=threshold"


def _part_lines(path: str) -> Iterator[str]:
    family = _PARTS[path][0]
    yield from _table((path, "description"), [(name, _summary(family, name)) for name in family.names()])
    yield ""
    yield f"options of one: synthgen schema {path}={family.names()[0]}"


def _setting_lines(path: str, target: Callable[..., Any], given: Sequence[str] = ()) -> Iterator[str]:
    summary, _, more = _readable(inspect.getdoc(target) or "").partition("\n\n")
    yield from wrap(f"{path}: {summary}")
    yield ""
    signed = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    comments, hints = setting_comments(target), typing.get_type_hints(signed, vars(inspect.getmodule(target) or types))
    rows = []
    for name, field in settings_model(target, given=frozenset(given)).model_fields.items():
        note = comments.get(name, "")
        if names := _part_names(f"{path}.{name}"):
            note = "; ".join([*filter(None, [note]), ", ".join(names)])
        default = "required" if field.is_required() else _default_text(field.get_default(call_default_factory=True))
        rows.append((name, _type_text(hints.get(name, Any)), default, note))
    if rows:
        yield from _table(("setting" if "=" not in path else "option", "type", "default", "description"), rows)
    else:
        yield "It has no options."
    for name in (name for name, *_ in rows if _part_names(f"{path}.{name}")):
        yield ""
        yield f"options of a part: synthgen schema {path}.{name}={_part_names(f'{path}.{name}')[0]}"
    if more:
        yield ""
        yield from more.splitlines()


def _default_text(value: Any) -> str:
    """A default as written in YAML."""
    if isinstance(value, Choice):
        return value.name if not value.options else json.dumps(value.dump())
    return value if isinstance(value, str) and value else json.dumps(dump(value))


def _type_text(hint: Any) -> str:
    """A type in a few words."""
    if hint is Choice:
        return "part"
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(str(value) for value in inside)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if one is types.NoneType else _type_text(one) for one in inside)
    if origin in (list, tuple):
        return f"list of {_type_text(inside[0])}"
    if origin is dict:
        return f"mapping of {_type_text(inside[0])} to {_type_text(inside[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}.get(hint, str(hint))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose last column wraps if it is too wide for the page."""
    used = sum(min(28, max(columns(row[index]) for row in (head, *rows))) + 2 for index in range(len(head) - 1))
    lines: list[tuple[str, ...]] = []
    for *cells, last in rows:
        first, *others = textwrap.wrap(last, WIDTH - used, break_on_hyphens=False) or [""]
        lines += [(*cells, first), *(("",) * len(cells) + (other,) for other in others)]
    return table(head, lines)
