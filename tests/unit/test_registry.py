"""Parts of other packages, found by their entry points."""

import sys

import numpy as np
import pytest

from synthgen.codecs import decode_masks
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingDependency, UnknownName
from synthgen.refiners import REFINERS
from synthgen.runner import run_stage
from synthgen.schema import listing
from synthgen.stages.masks import Masks
from tests.factories import make_run

MODULE = """
from dataclasses import dataclass
import numpy as np

@dataclass(frozen=True)
class LeftHalf:
    share: float = 0.5  # of the width

    def refine(self, image, maps):
        masks = np.zeros((len(maps.words), *image.shape[:2]), bool)
        masks[:1, :, : int(image.shape[1] * self.share)] = True
        return masks
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package that has a module ``left_half`` and these entry points."""

    def install(package, *points, module=MODULE):
        folder = tmp_path / package
        described = folder / f"{package}-1.0.dist-info"
        described.mkdir(parents=True)
        (folder / "left_half.py").write_text(module)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text("\n".join(["[synthgen.refiners]", *points]))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "left_half", raising=False)

    yield install
    sys.modules.pop("left_half", None)


def test_a_part_of_another_package_is_found_and_imported_only_when_asked_for(install):
    install("halves", "left-half = left_half:LeftHalf")
    assert "left-half" in REFINERS.names()
    assert "threshold" in REFINERS.names()
    assert REFINERS.load("threshold").__module__ == "synthgen.refiners.threshold"
    assert "left_half" not in sys.modules
    assert REFINERS.build(Choice("left-half", {"share": 0.25})).share == 0.25
    assert "left_half" in sys.modules
    with pytest.raises(ConfigError, match=r"did you mean 'share'\?; see: synthgen schema masks\.refine=left-half"):
        REFINERS.build(Choice("left-half", {"sharr": 0.25}))
    with pytest.raises(UnknownName, match="did you mean 'left-half'"):
        REFINERS.load("left-hall")
    assert "share   number  0.5      of the width" in listing("masks.refine=left-half")
    assert "left-half" in listing("masks.refine")


def test_workers_find_parts_of_other_packages(install, tmp_path):
    install("halves", "left-half = left_half:LeftHalf")
    run = make_run(tmp_path / "run", masks=False)
    stage = Masks(refine=Choice("left-half", {"share": 0.25}))
    assert run_stage(stage, run, Local(workers=2)).units == 2
    assert run.artifact("masks")["settings"]["refine"] == {"name": "left-half", "share": 0.25}
    for key, members in (sample for unit in run.units("masks") for sample in run.read("masks", unit)):
        first, *others = decode_masks(key, members).values
        assert np.array_equal(np.flatnonzero(first.any(0)), np.arange(first.shape[1] // 4))
        assert not np.any(others)


def test_a_name_in_two_packages_is_refused(install):
    install("halves", "threshold = left_half:LeftHalf")
    with pytest.raises(ConfigError, match=r"'threshold' is in several packages \(synthgen, halves\); keep one"):
        REFINERS.build("threshold")
    assert REFINERS.load("propagation")
    install("others", "left-half = left_half:LeftHalf")
    install("more", "left-half = left_half:LeftHalf")
    with pytest.raises(ConfigError, match="in several packages"):
        REFINERS.build("left-half")


@pytest.mark.parametrize(
    ("point", "module", "error", "says"),
    [
        ("half = left_half:RightHalf", MODULE, ConfigError, "the refiner 'half' of halves does not load:"),
        (
            "half = left_half:LeftHalf",
            "import no_such_library.inside",
            MissingDependency,
            "the refiner 'half' needs the library 'no_such_library'; install the package that provides it$",
        ),
        (
            "half = left_half.masks:LeftHalf",
            MODULE,
            ConfigError,
            "'half' of halves does not load: No module named 'left_",
        ),
        (
            "half = left_half:LeftHalf",
            "import left_half.more",
            ConfigError,
            "'half' of halves does not load: No module",
        ),
        (
            "half = left_half:LeftHalf",
            "import numpy.nothing",
            ConfigError,
            "does not load: No module named 'numpy.noth",
        ),
        (
            "half = left_half:LeftHalf",
            "import synthgen.nothing",
            ConfigError,
            "does not load: No module named 'synthge",
        ),
    ],
)
def test_a_part_that_does_not_load_names_its_package(install, point, module, error, says):
    install("halves", point, module=module)
    with pytest.raises(error, match=says):
        REFINERS.build("half")
