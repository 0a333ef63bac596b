"""A few hundred mutated inputs over all readers; ``make fuzz`` runs ten thousand."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from synthgen.errors import PromptError
from tests.fuzz import campaign as module
from tests.fuzz.campaign import Outcome, campaign
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import READERS, Reader, prepare


def test_every_input_is_read_or_refused_and_nothing_else_is_touched(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path / "box", inputs=10 * len(READERS), seed=2, keep=tmp_path / "kept")
    assert [line for one in outcomes for line in one.wrong] == []
    assert not (tmp_path / "kept").exists()
    assert sum(one.read for one in outcomes) > len(READERS)
    assert sum(one.refused.total() for one in outcomes) > len(READERS)
    assert all(one.read + one.refused.total() == 10 for one in outcomes)


@pytest.mark.slow
def test_ten_thousand_inputs(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path / "box", inputs=10_000, keep=tmp_path / "kept")
    assert [line for one in outcomes for line in one.wrong] == []


def test_the_same_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    prepare(tmp_path / "box")
    for reader in READERS:
        one, two = (mutate(reader.valid[0], reader.valid, reader.kind, Random("7")) for _ in range(2))
        assert one == two


def test_a_campaign_sees_what_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of wrong is found: another error, two lines, too long, a file elsewhere, a program begun."""
    (tmp_path / "box").mkdir()

    def crash(path: Path) -> None:
        raise KeyError("bare")

    def write(path: Path) -> None:
        (tmp_path / "elsewhere").write_text("x")

    def two_lines(path: Path) -> None:
        raise PromptError("one\ntwo")

    def begin(path: Path) -> None:
        os.system("true")

    def wait(path: Path) -> None:
        monkeypatch.setattr(module, "SLOWEST", -1.0)

    (tmp_path / "box" / "a").write_text("x")
    box = tmp_path / "box"
    found = [module._try(read, box / "a", box, Outcome("x")) for read in (crash, write, two_lines, begin, wait)]
    assert found[0] == "KeyError: 'bare'"
    assert "touched what is not its own: open" in found[1]
    assert "more than one line" in found[2]
    assert "os.system" in found[3]
    assert found[4].startswith("took")


def test_a_file_that_goes_wrong_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_later(path: Path) -> None:
        calls.append(path)
        if len(calls) > 1:  # the valid input is read first
            raise KeyError("bare")

    monkeypatch.setattr(module, "READERS", (Reader("x", "in/a.txt", "text", fail_later, [b"abc"]),))
    monkeypatch.setattr(module, "prepare", lambda box: (box / "in").mkdir(parents=True))
    (outcome,) = campaign(tmp_path / "box", inputs=1, seed=3, keep=tmp_path / "kept")
    assert outcome.wrong == ["x 0: KeyError: 'bare'"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["x-3-0.txt"]
