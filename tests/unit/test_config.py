import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from synthgen.config import Choice, build, check_range, dump, expand_home, load_yaml, run_folder
from synthgen.errors import ConfigError, MissingDependency, PipelineError, UnknownName
from synthgen.pipeline import read_pipeline
from synthgen.registry import Registry
from synthgen.stages import STAGES


@dataclass(frozen=True)
class Part:
    size: int
    ratio: float = 0.5
    refine: Choice = Choice("threshold")
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.ratio > 1:
            raise ValueError(f"ratio must be at most 1, not {self.ratio}")


def test_settings_are_arguments():
    part = build(
        Part, {"size": 3, "refine": {"name": "attentioncut", "smoothness": 2.0}, "names": ["a"]}, where="stages.part"
    )
    assert part == Part(3, 0.5, Choice("attentioncut", {"smoothness": 2.0}), ("a",))
    assert dump(part) == {
        "size": 3,
        "ratio": 0.5,
        "refine": {"name": "attentioncut", "smoothness": 2.0},
        "names": ["a"],
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 3, "ratoi": 1}, "stages.part.ratoi: unknown setting; did you mean 'ratio'?"),
        ({}, "stages.part.size: this setting is required"),
        ({"size": "3"}, "stages.part.size: Input should be a valid integer (got '3')"),
        ({"size": 3, "refine": 4}, "stages.part.refine: expected a part's name"),
        ({"size": 3, "ratio": 2.0}, "stages.part: ratio must be at most 1, not 2.0"),
    ],
)
def test_wrong_settings_say_where_and_what(options, says):
    with pytest.raises(ConfigError) as caught:
        build(Part, options, where="stages.part")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_registry_lists_its_files_and_loads_one():
    assert {"generate", "masks"} <= set(STAGES.names())
    assert STAGES.load("masks").__name__ == "Masks"
    with pytest.raises(UnknownName, match="unknown stage 'mask'; did you mean 'masks'"):
        STAGES.load("mask")


def test_a_missing_library_names_what_to_install(tmp_path, monkeypatch):
    package = tmp_path / "someparts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cloud.py").write_text("import no_such_library\n__all__ = ['Cloud']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="pip install no_such_library"):
        Registry("someparts").load("cloud")


def test_options_alone_are_those_of_the_default_part():
    part = build(Part, {"size": 3, "refine": {"level": 0.4}}, where="stages.part")
    assert part.refine == Choice("threshold", {"level": 0.4})


def test_exponents_are_numbers():
    assert load_yaml("[1e-3, -2.5E+4, .5e1, 1.5, 3, 1e, x1e3]") == [1e-3, -2.5e4, 5.0, 1.5, 3, "1e", "x1e3"]


@dataclass(frozen=True)
class Listy:
    layers: list[int] | None = None
    names: tuple[str, ...] | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    either: tuple[str, ...] | str = "a"
    whatever: Any = None
    part: Choice = field(default_factory=lambda: Choice("threshold"))


@pytest.mark.parametrize(
    ("given", "become"),
    [
        ({"layers": [1, 2]}, {"layers": [1, 2]}),
        ({"layers": (1, 2)}, {"layers": [1, 2]}),
        ({"layers": None}, {}),
        ({"names": ["a"]}, {"names": ("a",)}),
        ({"sizes": [[1, 2], [3, 4]]}, {"sizes": ((1, 2), (3, 4))}),
        ({"ranges": {"a": [1, 2]}}, {"ranges": {"a": (1, 2)}}),
        ({"either": ["b"]}, {"either": ("b",)}),
        ({"whatever": [1]}, {"whatever": [1]}),
        ({"part": {"level": 0.4}}, {"part": Choice("threshold", {"level": 0.4})}),
        ({}, {}),
    ],
)
def test_lists_become_tuples_only_where_the_type_is_a_tuple(given, become):
    assert build(Listy, given, where="part") == Listy(**become)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": [1, "b"]}, "part.layers.1: Input should be a valid integer"),
        ({"layers": 3}, "part.layers: Input should be a valid list"),
        ({"sizes": [[1, 2, 3]]}, "part.sizes.0"),
        ({"sizes": [[1]]}, "part.sizes.0.1"),
        ({"either": 3}, "part.either"),
    ],
)
def test_lists_with_wrong_items_are_refused(given, says):
    with pytest.raises(ConfigError) as caught:
        build(Listy, given, where="part")
    assert says in str(caught.value)


def test_every_part_has_its_own_default_from_a_factory():
    one, other = build(Listy, {}, where="part"), build(Listy, {}, where="part")
    assert one.ranges == {}
    assert one.ranges is not other.ranges


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "allowed"),
    [
        ({"ge": 1}, (1, 2), (0, math.nan), "at least 1"),
        ({"gt": 0}, (0.1, math.inf), (0, -1), "above 0"),
        ({"ge": 0, "lt": 1}, (0, 0.99), (-0.1, 1), "at least 0 and below 1"),
        ({"gt": 0, "le": 0.5}, (0.5,), (0, 0.6), "above 0 and at most 0.5"),
        ({"ge": 0, "lt": math.inf}, (0, 1e300), (math.inf, math.nan), "at least 0 and below inf"),
    ],
)
def test_numbers_outside_their_range_are_refused_by_name(bounds, good, bad, allowed):
    for value in good:
        check_range(**bounds, steps=value)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^share must be {allowed}, not {value}$"):
            check_range(**bounds, steps=good[0], share=value)


def test_run_folders_expand_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert run_folder("~/runs/x") == Path("/home/me/runs/x")
    assert run_folder("./~/x") == Path("~/x")
    assert run_folder("s3://bucket/run") == Path("s3:/bucket/run")
    assert run_folder(Path("runs/price-5$")) == Path("runs/price-5$")
    with pytest.raises(ConfigError, match="has no name; give one"):
        run_folder("")
    for name in ("$HOME/x", "${HOME}/x", "~nobody-at-all/x"):
        with pytest.raises(ConfigError, match="begins with a variable or home directory that"):
            run_folder(name)


def test_only_paths_in_the_home_directory_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"a": "~/p.txt", "b": ["~/x.tar", "~ two cats"], "c": {"d": "~"}, "e": 1, "f": "x/~/y", "g": "~5/6 full"}
    assert expand_home(given) == given | {"a": "/home/me/p.txt", "b": ["/home/me/x.tar", "~ two cats"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages:\n  masks: {}\n  pretrain: {label: a}\n  pretrain: {label: b}\n",
         "'pretrain' stands twice, in lines 3 and 4; give it a list"),
        ("run: a\nseed: 1\nrun: b\n", "'run' stands twice, in lines 1 and 3; keep one"),
        ("stages: {masks: {refine: {name: x, name: y}}}", "'name' stands twice, in lines 1 and 1; keep one"),
        ("stages:\n  pretrain:\n  - {label: a,\n     label: b}\n", "'label' stands twice, in lines 3 and 4; keep one"),
        ("a: 1\n'a': 2", "'a' stands twice"), ("1: a\n0x1: b", "'0x1' stands twice"),
        ("yes: a\ntrue: b", "'true' stands twice"), ("=: a\n'=': b", "'=' stands twice"),
        ("a: &x {b: 1, b: 2}\nc: *x", "'b' stands twice"), (f"{'k' * 900}: 1\n{'k' * 900}: 2", r"k{200}\.\.\.' stands"),
    ],
)  # fmt: skip
def test_repeated_keys_of_yaml_are_refused(text, says):
    with pytest.raises(yaml.YAMLError, match=says):
        load_yaml(text)


def test_merged_keys_of_yaml_may_be_overridden():
    merged = load_yaml("a: &a {x: 1}\nb: &b {y: 1}\nc: {<<: *a, <<: *b, x: 2}\nd: {1: 0, '1': 0, 1.5: 0}")
    assert merged["c"] == {"x": 2, "y": 1}
    assert merged["d"] == {1: 0, "1": 0, 1.5: 0}


def test_a_pipeline_with_two_stages_of_a_name_says_how_to_write_it(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("stages:\n  masks: {}\n  masks: {}\n")
    with pytest.raises(PipelineError, match=r"p\.yaml.*'masks' stands twice, in lines 2 and 3; give it a list"):
        read_pipeline(path)
