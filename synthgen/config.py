"""Settings: the arguments of parts and stages, validated by pydantic in strict mode with unknown keys forbidden."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from synthgen.errors import ConfigError

if typing.TYPE_CHECKING:
    from pydantic import BaseModel

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A part by name, with its options: in YAML ``{name: attentioncut, smoothness: 4.0}`` or plain ``attentioncut``."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Choice | str | Mapping[str, Any]) -> Choice:
        """Read a choice from a name, a mapping with ``name``, or a choice."""
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], {key: option for key, option in value.items() if key != "name"})
        raise ConfigError(f"expected a part's name, or a mapping with 'name' and its options, not {value!r}")

    def dump(self) -> dict[str, Any]:
        """The mapping that :meth:`of` reads."""
        return {"name": self.name, **self.options}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def read(value: Any) -> Choice:
            try:
                return cls.of(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None

        return core_schema.no_info_plain_validator_function(read)

    @classmethod
    def __get_pydantic_json_schema__(cls, source: Any, handler: Any) -> dict[str, Any]:
        part = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
        return {"anyOf": [{"type": "string"}, part]}


def load_yaml(text: str) -> Any:
    """Parse YAML safely; ``1e-3`` is a number, as in YAML 1.2 (in YAML 1.1, and so in PyYAML, it is text).

    Raises:
        yaml.YAMLError: the text is not YAML, or too large for a settings file.
    """
    from synthgen.untrusted import SAFE_LOADER, read_yaml

    class Loader(SAFE_LOADER):  # type: ignore[misc]
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return read_yaml(text, Loader)


def run_folder(name: str | Path) -> Path:
    """The path of a run folder given by a user, with a leading ``~`` expanded as in a shell.

    Raises:
        ConfigError: the name is empty, or begins with a variable or home directory that only a shell would expand.
    """
    text = os.path.expanduser(name)  # noqa: PTH111 - it may be a URL
    if not text:
        raise ConfigError("the run folder has no name; give one, such as runs/latest, or . for this very folder")
    if re.match(r"\$\w|\$\{|~", text):
        raise ConfigError(
            f"the run folder {text!r} begins with a variable or home directory that only a shell expands; write it "
            f"out, or as ./{text}"
        )
    return Path(text)


def expand_home(value: Any) -> Any:
    """Plain data with the home directory expanded in every text such as ``~/prompts.txt``."""
    if isinstance(value, str):
        return os.path.expanduser(value) if re.match(r"~[\w.-]*/", value) else value  # noqa: PTH111 - as in run_folder
    if isinstance(value, Mapping):
        return {key: expand_home(item) for key, item in value.items()}
    return [expand_home(item) for item in value] if isinstance(value, list) else value


def settings_model(target: Callable[..., Any], *, given: frozenset[str] = frozenset()) -> type[BaseModel]:
    """A strict pydantic model of the arguments of ``target``, without those in ``given``."""
    from pydantic import ConfigDict, Field, create_model

    init = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    hints = typing.get_type_hints(init, vars(inspect.getmodule(target) or types))
    made = {item.name: item.default_factory for item in dataclasses.fields(target)} if is_dataclass(target) else {}
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in given or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        if repr(default) == "<factory>":  # how the signature of a dataclass shows a default_factory
            default = Field(default_factory=typing.cast("Callable[[], Any]", made[name]))
        fields[name] = (hints.get(name, Any), default)
    name = getattr(target, "__name__", "settings")
    return create_model(
        name,
        __config__=ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False),
        **fields,
    )


def check(
    target: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    where: str,
    given: frozenset[str] = frozenset(),
    listed: str = "",
) -> dict[str, Any]:
    """The arguments of ``target`` from ``options`` and defaults, validated against its signature.

    Args:
        target: a class or function.
        options: values by name.
        where: the name of ``target`` in errors.
        given: arguments that are not options.
        listed: the path at which ``synthgen schema`` lists the options, for errors.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type; names it, and the nearest known one.
    """
    from pydantic import ValidationError

    model = settings_model(target, given=given)
    values: dict[str, Any] = {}
    for key, value in options.items():
        known = model.model_fields.get(key)
        default = known.get_default(call_default_factory=True) if known else None
        if isinstance(default, Choice) and isinstance(value, Mapping) and "name" not in value:
            value = {"name": default.name, **value}  # options without a name are those of the default part
        values[key] = _convert_lists(value, known.annotation) if known else value
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        see = f"; see: synthgen schema {listed}" if listed else ""
        raise ConfigError(_explain(error, where, list(model.model_fields)) + see) from None
    return {name: getattr(checked, name) for name in model.model_fields}


def build(target: Callable[..., T], options: Mapping[str, Any], *, where: str, listed: str = "", **given: Any) -> T:
    """Check ``options`` against the signature of ``target`` (see :func:`check`) and call it.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type, or ``target`` refuses its value.
    """
    values = check(target, options, where=where, given=frozenset(given), listed=listed)
    try:
        return target(**values, **given)
    except ValueError as error:  # of the right type, but refused by the part
        raise ConfigError(f"{where}: {error}") from None


def check_range(
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **values: float,
) -> None:
    """Check that each of ``values``, given by name, is within the bounds: >= ``ge``, > ``gt``, <= ``le``, < ``lt``.

    Raises:
        ValueError: a value is outside, or NaN; names it and the bounds.
    """
    bounds = [
        (bound, compare, text)
        for bound, compare, text in (
            (ge, operator.ge, "at least"),
            (gt, operator.gt, "above"),
            (le, operator.le, "at most"),
            (lt, operator.lt, "below"),
        )
        if bound is not None
    ]
    for name, value in values.items():
        if not all(compare(value, bound) for bound, compare, _ in bounds):
            allowed = " and ".join(f"{text} {bound}" for bound, _, text in bounds)
            raise ValueError(f"{name} must be {allowed}, not {value}")


def _convert_lists(value: Any, hint: Any) -> Any:
    """``value`` with lists converted to tuples where the type hint says tuple: YAML has lists only."""
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        kinds = {typing.get_origin(one) or one: one for one in inside}
        likely = (dict, Mapping) if isinstance(value, Mapping) else (list, Sequence, tuple)
        return next((_convert_lists(value, kinds[one]) for one in likely if one in kinds), value)
    if isinstance(value, list | tuple) and kind in (list, tuple):
        several = kind is list or inside[1:] == (...,)
        hints = inside[:1] * len(value) if several else inside
        return kind(
            _convert_lists(item, one) for item, one in itertools.zip_longest(value, hints[: len(value)], fillvalue=Any)
        )
    if isinstance(value, Mapping) and kind in (dict, Mapping) and inside:
        return {key: _convert_lists(item, inside[1]) for key, item in value.items()}
    return value


def _explain(error: Any, where: str, known: list[str]) -> str:
    lines = []
    for detail in error.errors():
        path = ".".join([where, *(str(step) for step in detail["loc"])])
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
            lines.append(f"{path}: unknown setting; {hint}")
        elif detail["type"] == "missing":
            lines.append(f"{path}: this setting is required")
        elif detail["type"] == "tuple_type":  # YAML and the command line have lists only
            lines.append(f"{path}: Input should be a list, such as [A, B] (got {detail['input']!r:.200})")
        else:
            lines.append(f"{path}: {detail['msg'].removeprefix('Value error, ')} (got {detail['input']!r:.200})")
    return "; ".join(lines)


def dump(value: Any) -> Any:
    """Settings as plain values for YAML and JSON."""
    if isinstance(value, Choice):
        return {key: dump(option) for key, option in value.dump().items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: dump(getattr(value, item.name)) for item in dataclasses.fields(value) if item.init}
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
