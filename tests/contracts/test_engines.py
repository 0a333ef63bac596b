"""What every engine keeps; that their bytes are the same is in tests/unit/test_engine.py and tests/ray."""

import dataclasses
import pickle

import pytest

from synthgen.config import Choice
from synthgen.engines import ENGINES
from synthgen.errors import ConfigError, MissingDependency


@pytest.fixture(params=ENGINES.names())
def name(request):
    try:
        ENGINES.load(request.param)
    except MissingDependency as error:
        pytest.skip(str(error))
    return request.param


def test_it_is_a_frozen_dataclass_that_travels(name):
    engine = ENGINES.build(name)
    assert dataclasses.is_dataclass(engine)
    assert pickle.loads(pickle.dumps(engine)) == engine
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.workers = 3


def test_it_says_whether_it_can_run_what_is_one_piece_of_work(name):
    assert isinstance(ENGINES.load(name).collective, bool)


def test_unknown_settings_are_refused(name):
    with pytest.raises(ConfigError, match=f"engine {name}.wrokers: unknown setting"):
        ENGINES.build(Choice(name, {"wrokers": 2}))
