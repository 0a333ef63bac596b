"""The page of the learning experiment agrees with its figures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("learning_report", FOLDER / "learning_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["learning_report"] = module
    spec.loader.exec_module(module)
    return module


def scores(**arms):
    return {f"mae-{arm}": {"knn, composites": values} for arm, values in arms.items()}


def test_a_difference_is_bold_beyond_both_deviations_and_never_with_one_seed(report):
    assert report.beyond([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])  # 0.4 against 0.14
    assert not report.beyond([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])  # 0.1 against 0.14
    assert not report.beyond([0.1], [0.9])
    assert report.change([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]) == "**+0.400**"
    assert report.change([0.3, 0.4], [0.2, 0.4]) == "-0.050"


def test_verdicts_follow_the_scores(report, monkeypatch):
    monkeypatch.setattr(report, "FAMILIES", {"mae": "mae"})
    (better,) = report.verdicts(scores(plain=[0.1, 0.11], guided=[0.3, 0.31], elsewhere=[0.1, 0.12]))
    assert "better than plain on knn, composites, and worse on none" in better
    assert "also better than plain on none, and guided is better than elsewhere on knn, composites" in better
    (worse,) = report.verdicts(scores(plain=[0.3, 0.31], guided=[0.1, 0.11], elsewhere=[0.3, 0.31]))
    assert "better than plain on none, and worse on knn, composites" in worse
    (control,) = report.verdicts(scores(plain=[0.1, 0.11], guided=[0.3, 0.31], elsewhere=[0.3, 0.32]))
    assert "also better than plain on knn, composites, and guided is better than elsewhere on none" in control


def test_the_steps_to_a_score_are_interpolated(report):
    points = {"300": [0.5, 0.7], "100": [0.2, 0.2], "200": [0.4, 0.4]}
    assert report.reached(points, 0.3) == pytest.approx(150)
    assert report.reached(points, 0.1) == 100
    assert report.reached(points, 0.7) is None


def test_the_page_in_docs_is_up_to_date(report, tmp_path):
    if not (FOLDER / "results" / "learning.json").is_file():
        pytest.skip("the experiment has not been run")
    pytest.importorskip("matplotlib")
    root = FOLDER.parent
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    record = json.loads((FOLDER / "results" / "learning.json").read_text(encoding="utf-8"))
    (tmp_path / "benchmarks" / "results" / "learning.json").write_text(json.dumps(record), encoding="utf-8")
    report.write_report(tmp_path)
    written = (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "docs" / "results.png").stat().st_size > 10_000
