"""What every filter must do."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.filters import FILTERS, Candidate
from synthgen.records import SAFETY_WARNING, WordMasks
from tests.factories import make_generation
from tests.models import make_clip

NAMES = FILTERS.names()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return {"clip": {"model": str(make_clip(tmp_path_factory.mktemp("clip")))}}


def candidates(count=5):
    """Different drawn images; the last one is grey, flagged and without masks."""
    found = []
    for row in range(count):
        generation, truth = make_generation(f"{row:010d}", words=("disc", "square")[: 1 + row % 2], seed=row)
        image, warnings = generation.image, ()
        if row == count - 1:
            image, truth, warnings = np.full_like(image, 128), np.zeros_like(truth), (SAFETY_WARNING,)
        masks = WordMasks(generation.request.prompt.words, truth, np.ones(len(truth), np.float32))
        found.append(Candidate(generation.request, image, warnings, masks))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_plain_and_do_not_depend_on_the_batch(name, options):
    part = FILTERS.build(Choice(name, options.get(name, {})))
    measure, seen = part.open("cpu"), candidates()
    figures = measure(seen)
    assert len(figures) == len(seen)
    assert json.loads(json.dumps(figures)) == figures
    alone = [figure for one in seen for figure in part.open("cpu")([one])]
    if name == "clip":
        assert alone == pytest.approx(figures, abs=1e-3)
    else:
        assert alone == figures


@pytest.mark.parametrize("name", NAMES)
def test_only_given_samples_are_rejected_each_with_a_reason(name, options):
    part = FILTERS.build(Choice(name, options.get(name, {})))
    seen = candidates()
    figures = dict(zip([one.request.key for one in seen], part.open("cpu")(seen), strict=True))
    rejected = part.reject(iter(figures.items()))
    assert rejected.keys() <= figures.keys()
    assert all(reason and "\n" not in reason for reason in rejected.values())
    assert part.reject([]) == {}
    if name in ("blank", "unsafe", "unmasked"):
        assert list(rejected) == [seen[-1].request.key]


@pytest.mark.parametrize("name", NAMES)
def test_filters_travel_to_workers(name, options):
    part = FILTERS.build(Choice(name, options.get(name, {})))
    assert pickle.loads(pickle.dumps(part)) == part


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("blank", {"min_std": -1.0}),
        ("blank", {"min_std": 200.0}),
        ("duplicate", {"max_distance": 8}),
        ("unmasked", {"min_masks": -1}),
        ("unmasked", {"every_words": True}),
        ("clip", {}),
        ("clip", {"model": "x", "min_similarity": 2.0}),
    ],
)
def test_wrong_options_are_refused(name, wrong):
    with pytest.raises(ConfigError, match=name):
        FILTERS.build(Choice(name, wrong))
