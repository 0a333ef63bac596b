"""What ``synthgen schema`` says: every setting of every stage and part, from the code that takes it."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field

import pytest

from synthgen.config import Choice
from synthgen.errors import ConfigError, MissingDependency, UnknownName
from synthgen.refiners import REFINERS
from synthgen.schema import _PARTS, _setting_lines, listing, setting_comments, settings_schema
from synthgen.stages import STAGES, make_stage

PARTS = [f"{setting}={name}" for setting, (family, _) in _PARTS.items() for name in family.names()]


@dataclass(frozen=True)
class Base:
    kept: int = 1  # of ``both``
    said: str = "a"  # of the parent


@dataclass(frozen=True)
class Child(Base):
    """A part.

    More of :class:`it`.
    """

    said: str = "b"  # of the child
    long: tuple[
        str,
        int,
    ] = ("", 0)  # behind the last line
    bare: float = 0.5
    tool: int = 0  # fmt: skip


class Built:
    """A part with a constructor."""

    def __init__(
        self,
        *,
        first: int,
        second: str = "x",  # by its comment
        device: str = "cpu",  # no option
    ) -> None:
        third: int = 0  # no argument
        self.all = first, second, device, third


def test_comments_of_settings_include_those_of_parent_classes():
    assert setting_comments(Child) == {"kept": "of both", "said": "of the child", "long": "behind the last line"}
    assert setting_comments(Built) == {"second": "by its comment", "device": "no option"}
    assert setting_comments(type("Made", (), {"__init__": lambda self, x=1: None})) == {}


def test_a_schema_has_defaults_kinds_and_descriptions():
    schema = settings_schema(Built, given=("device",))
    assert schema["required"] == ["first"]
    assert schema["properties"]["second"] == {
        "default": "x", "title": "Second", "type": "string", "description": "by its comment",
    }  # fmt: skip
    assert "device" not in schema["properties"]
    assert settings_schema(Child)["description"] == "A part.\n\nMore of it."


@dataclass(frozen=True)
class Several:
    """A part."""

    weights: dict[str, float] = field(default_factory=lambda: {"dog": 2.0})  # by word
    layers: list[int] = field(default_factory=list)  # that count


def test_defaults_from_factories_are_listed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = settings_schema(Several)["properties"]
    assert (found["weights"]["default"], found["layers"]["default"]) == ({"dog": 2.0}, [])
    told = "\n".join(_setting_lines("part", Several))
    assert 'weights  mapping of text to number  {"dog": 2.0}  by word' in told
    assert "layers   list of whole number       []            that count" in told


@pytest.mark.parametrize("path", [*STAGES.names(), *PARTS])
def test_every_stage_and_part_is_listed_with_all_of_its_settings(path):
    try:
        schema = json.loads(listing(path, as_json=True))
    except MissingDependency as error:
        pytest.skip(str(error))
    told = listing(path)
    assert told.startswith(f"{path}: ")
    first = [line.split(" ")[0] for line in told.splitlines()]
    for name, found in schema["properties"].items():
        assert name in first
        assert all(word in told for word in found.get("description", "").split())
        assert "=" not in path or "description" in found, f"{path}: no comment behind {name} says what it is"
    assert "device" not in schema["properties"]


def test_an_option_of_a_part_has_its_default_and_what_it_is():
    remark = "otsu: Otsu's threshold of each word's map; fixed: level"
    assert f"\nmethod  otsu, fixed  otsu     {remark}\n" in listing("masks.refine=threshold")
    found = json.loads(listing("masks.refine=threshold", as_json=True))["properties"]["method"]
    assert found == {
        "default": "otsu", "description": remark, "enum": ["otsu", "fixed"], "title": "Method", "type": "string",
    }  # fmt: skip


def test_without_a_name_all_parts_are_listed():
    names = REFINERS.names()
    listed = json.loads(listing("masks.refine", as_json=True))["oneOf"]
    assert [part["const"] for part in listed] == names
    assert {"const": "threshold", "description": "Cross-attention above a threshold."} in listed
    told = listing("masks.refine").splitlines()
    assert told[-1] == f"options of one: synthgen schema masks.refine={names[0]}"
    assert any(line.split() == ["threshold", "Cross-attention", "above", "a", "threshold."] for line in told)
    assert json.loads(listing("masks", as_json=True))["properties"]["refine"]["anyOf"][0]["enum"] == names
    evaluators = json.loads(listing("evaluate", as_json=True))["properties"]["evaluators"]["items"]
    assert "knn" in evaluators["anyOf"][1]["properties"]["name"]["enum"]


def test_without_a_path_stages_and_parts_are_listed():
    told = listing()
    assert all(f"\n{name} " in told for name in (*STAGES.names(), *_PARTS))
    assert json.loads(listing(as_json=True)) == {
        "stages": STAGES.names(),
        "parts": {setting: family.names() for setting, (family, _) in _PARTS.items()},
    }


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("mask", "unknown stage 'mask'; did you mean 'masks'?"),
        ("masks.refin", "did you mean 'masks.refine'?"),
        ("masks.min_area", "unknown setting that names a part 'masks.min_area'"),
        ("masks=threshold", "unknown setting that names a part 'masks'"),
        ("masks.refine=treshold", "unknown refiner 'treshold'; did you mean 'threshold'?"),
    ],
)
def test_unknown_names_suggest_known_ones(path, says):
    with pytest.raises(UnknownName) as caught:
        listing(path)
    assert says in str(caught.value)


def test_errors_in_settings_name_an_existing_listing():
    with pytest.raises(ConfigError, match=r"did you mean 'level'\?; see: synthgen schema masks\.refine=threshold$"):
        REFINERS.build(Choice("threshold", {"levle": 0.5}))
    with pytest.raises(ConfigError, match=r"see: synthgen schema masks\.refine=threshold$"):
        REFINERS.complete(Choice("threshold", {"level": "high"}))
    with pytest.raises(ConfigError, match=r"did you mean 'min_area'\?; see: synthgen schema masks$"):
        make_stage("masks", {"min_aera": 0.1})


@pytest.mark.parametrize(
    ("stage", "settings", "path"),
    [
        ("pretrain", {"mask_ratio": 0.5}, "method.mask_ratio"),  # and not warmup_ratio
        ("pretrain", {"warmup_rato": 0.5}, "warmup_ratio"),
        ("generate", {"prompts": "p.txt", "guidence_scale": 3.0}, "backbone.guidance_scale"),
        ("masks", {"refine": "attentioncut", "smoothness": 2.0}, "refine.smoothness"),
    ],
)
def test_an_option_of_a_part_given_to_the_stage_is_suggested_with_its_path(stage, settings, path):
    with pytest.raises(ConfigError, match=rf"unknown setting; did you mean '{re.escape(path)}'\?; see: "):
        make_stage(stage, settings)
    with pytest.raises(ConfigError, match="unknown setting; there are: refine, min_area"):
        make_stage("masks", {"smoothness": 2.0})  # which the default refiner does not have


def test_every_registry_names_its_setting():
    from synthgen.backbones import BACKBONES
    from synthgen.engines import ENGINES
    from synthgen.evaluators import EVALUATORS
    from synthgen.methods import METHODS

    for family in (BACKBONES, REFINERS, METHODS, EVALUATORS, ENGINES):
        assert _PARTS[family.setting][0].package == family.package
