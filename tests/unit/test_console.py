"""What the console says of progress where there is no terminal."""

from __future__ import annotations

import pytest

from synthgen import console
from synthgen.console import ConsoleProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_does_not_count_what_was_loaded_before_the_first_samples(clock, capsys):
    bar = ConsoleProgress()
    bar.start("masks", 48, 0)
    clock[0] += 60  # a model is loaded
    bar.advance(1)
    clock[0] += 10
    bar.advance(5)
    bar.stop()
    assert capsys.readouterr().err == "masks: 6/48, 0.5/s, 1 min 24 s left\n"


def test_samples_of_an_earlier_call_say_nothing_of_the_rate(clock, capsys):
    bar = ConsoleProgress()
    bar.start("masks", 2000, 0)
    bar.skip(900)
    bar.advance(1)
    clock[0] += 20
    bar.skip(2)
    clock[0] += 10
    bar.advance(420)
    bar.stop()
    assert capsys.readouterr().err.startswith("masks: 1323/2000, 42/s, ")
