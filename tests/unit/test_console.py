"""What the console says of progress where there is no terminal."""

from __future__ import annotations

import json
import sys

import pytest

from synthgen import console
from synthgen.console import ConsoleProgress, print_scores, step_printer, summary_line
from synthgen.run import Run
from synthgen.runner import Summary
from synthgen.text import columns, counted


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_loading_does_not_count_for_the_time_left(clock, capsys):
    bar = ConsoleProgress()
    bar.start("masks", 48, 0)
    clock[0] += 60  # a model is loaded
    bar.advance(1)
    clock[0] += 10
    bar.advance(5)
    bar.stop()
    assert capsys.readouterr().err == "masks: 6/48, 0.5/s, 1 min 24 s left\n"


def test_skipped_samples_do_not_count_for_the_rate(clock, capsys):
    bar = ConsoleProgress()
    bar.start("masks", 2000, 0)
    bar.skip(900)
    bar.advance(1)
    clock[0] += 20
    bar.advance(100)
    bar.skip(2)
    clock[0] += 10
    bar.advance(420)
    bar.stop()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("masks: 1001/2000, 5/s, ")
    assert last.startswith("masks: 1423/2000, 42/s, ")


@pytest.mark.parametrize(
    ("count", "many", "said"),
    [
        (1, "images", "1 image"),
        (0, "images", "0 images"),
        (1200, "images", "1,200 images"),
        (1, "failed samples", "1 failed sample"),
        (1, "samples with warnings", "1 sample with warnings"),
        (1, "words cut off", "1 word cut off"),
        (1, "dropped", "1 dropped"),
        (1, "evaluator left out (probes)", "1 evaluator left out (probes)"),
    ],
)
def test_counts_of_one_are_singular(count, many, said):
    assert counted(count, many) == said


def test_the_summary_of_one_sample_is_singular():
    summary = Summary("attend", units=1, samples=1, seconds=1.0, notes={"failed samples": 1, "masks": 2})
    assert summary_line(summary) == "attend: 1 sample in 1.0 s (1.0/s), 1 failed sample, 2 masks"


@pytest.mark.parametrize("terminal", [True, False])
def test_rows_of_scores_are_cut_only_on_a_terminal(tmp_path, monkeypatch, capsys, terminal):
    run = Run.create(tmp_path / "demo")
    run.folder("evaluate").mkdir()
    encoder, evaluator = "an-encoder-whose-name-has-39-characters", "linear_probe blocks=[up_blocks.1.attentions.0]"
    numbers = {"accuracy": 0.5, "low": 0.25, "high": 0.75, **{f"chance_r{rank}": 0.125 for rank in (1, 5, 10, 100)}}
    told = {"scores": {encoder: {evaluator: numbers}, "pixels": {"knn": numbers}}}
    (run.folder("evaluate") / "a.json").write_text(json.dumps(told))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_scores(run)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "evaluation"
    assert "0.250 to 0.750" in first
    assert "knn" in second
    assert ("…" in first) == terminal
    for part in (encoder, evaluator, "chance_r100 0.125"):
        assert (part in first) != terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_are_printed_to_standard_error_on_a_terminal(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    step_printer("doctor")("looking at \x1b[2J the disk")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "doctor: looking at  [2J the disk\n" * terminal)


def test_combining_marks_take_no_column() -> None:
    assert [columns(text) for text in ("dog", "e\u0301", "日本", "नमस्ते")] == [3, 1, 4, 4]
