from dataclasses import dataclass

import pytest

from synthgen.config import Choice, build, dump, load_yaml
from synthgen.errors import ConfigError, MissingDependency, UnknownName
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


def test_a_family_lists_its_files_and_loads_one():
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
