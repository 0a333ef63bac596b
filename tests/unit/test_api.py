"""The public names: all load, and whatever a public function returns or raises is one of them."""

import inspect
import subprocess
import sys
import typing

import pytest

import synthgen as sg
from synthgen import api
from synthgen.errors import SynthgenError


def classes(hint):
    """Those of synthgen that a type is made of."""
    inside = typing.get_args(hint)
    if inside:
        return {found for one in inside for found in classes(one)}
    return {hint} if getattr(hint, "__module__", "").startswith("synthgen") else set()


def test_every_public_name_loads():
    assert all(getattr(sg, name) is not None for name in sg.__all__)
    assert len(set(sg.__all__)) == len(sg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = sg.absent


def test_public_functions_return_public_classes():
    returned, unloaded = set(), {"Plan": sg.Plan, "Validation": sg.Validation}
    for name in api.__all__:
        assert getattr(sg, name) is getattr(api, name)
        returned |= classes(typing.get_type_hints(getattr(api, name), localns=unloaded)["return"])
    assert returned == {sg.Generation, sg.Plan, sg.Summary, sg.Validation, sg.WordMasks}
    assert classes(typing.get_type_hints(sg.Generation)["maps"]) == {sg.Maps}
    assert issubclass(sg.UnitsFailed, sg.SynthgenError)
    assert sg.SynthgenError is SynthgenError


@pytest.mark.parametrize("name", api.__all__)
def test_every_function_says_what_it_raises(name):
    said = inspect.getdoc(getattr(api, name))
    assert "Raises:" in said or "errors as in" in said or "see :func:" in said


def test_no_public_name_is_imported_before_it_is_used():
    code = "import sys, synthgen; assert not {'torch', 'numpy', 'synthgen.api'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
