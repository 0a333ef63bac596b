"""The benchmark of recording attention: its networks have the published sizes, and it runs for every family."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {"sd15": 0.86e9, "sdxl": 2.57e9, "sd3": 2.0e9, "flux": 11.9e9}  # as published


@pytest.fixture
def capture(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(importlib.import_module("_common"), "FOLDER", tmp_path)
    threads = torch.get_num_threads()
    yield importlib.import_module("capture")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", PARAMETERS)
def test_full_sizes_have_the_published_numbers_of_parameters(capture, size):
    models = importlib.import_module("_models")
    with torch.device("meta"):
        network = models.make_network(models.PRESETS[models.FULL[size], size])
    total = sum(weight.numel() for weight in network.parameters())
    assert total == pytest.approx(PARAMETERS[size], rel=0.02)


@pytest.mark.parametrize(
    "family", ["sd", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3"))]
)
def test_the_benchmark_runs_and_can_be_reported(capture, family, tmp_path):
    figures = capture.main(["--size", "tiny", "--family", family, "--steps", "1", "--repeat", "1"])
    record = json.loads((tmp_path / "results" / "capture-cpu.json").read_text(encoding="utf-8"))
    assert record["figures"] == figures
    assert record["date"]
    assert record["machine"]["torch"]
    assert {"device", "dtype", "batch", "threads", "repeat", "versions", "random"} <= figures.keys()
    (case,) = figures["cases"]
    assert (case["family"], case["steps"], case["resolution"]) == (family, 1, 64)
    assert [list(words) for words in case["positions"]] == [["dog", "umbrella", "grass"]]
    rows = case["contenders"]
    assert list(rows) == list(capture.CONTENDERS)
    for name in ("plain", "synthgen", "naive"):
        assert rows[name]["seconds_per_image"]["median"] > 0
        assert len(rows[name]["time_over_plain"]["quartiles"]) == 2
        assert rows[name]["latents"]["largest_difference"] < 1e-4
        assert rows[name]["peak_mib"] is None or rows[name]["extra_mib"] < 8
    assert rows["synthgen"]["latents"]["identical"]
    exact = rows["synthgen"]["against_float64"]
    assert exact["agree"]
    assert exact["largest_error"] < 1e-6 < exact["largest_error_as_stored"] < exact["largest_value"] / 100
    assert rows["naive"]["maps"]["largest_difference_to_synthgen"] < 1e-4
    text = "\n".join(importlib.import_module("report").capture(figures))
    assert "| synthgen | " in text
    assert "to the bit" in text


def test_contenders_can_be_left_out_with_a_reason(capture):
    options = ["--size", "tiny", "--steps", "1", "--repeat", "1", "--batch", "2", "--guidance", "1"]
    figures = capture.main([*options, "--contenders", "synthgen"])
    rows = figures["cases"][0]["contenders"]
    assert list(rows) == ["plain", "synthgen"]
    assert rows["synthgen"]["against_float64"]["agree"]
    assert list(figures["cases"][0]["positions"][1]) == ["cat", "umbrella", "park"]
    absent = capture.Contender(capture.CONTENDERS["plain"].run, same_latents=True, module="no_such_package")
    assert capture.reason_not_to_run(None, absent, 1) == "not installed"
    report = importlib.import_module("report")
    assert report.capture_cells({"not_run": "not installed"})[0] == "not run: not installed"


def test_a_contender_that_fails_restores_the_network(capture):
    args = capture.argparse.Namespace(dtype="float32", device="cpu", resolution=None, steps=1, guidance=None, batch=1)
    workload = capture.make_workload("sd", "tiny", args)

    def failing(workload):
        workload.network.set_attn_processor(dict.fromkeys(workload.network.attn_processors))
        raise ValueError("it does not\nrun")

    before = dict(workload.network.attn_processors)
    failed = capture.Contender(failing, same_latents=True)
    assert capture.reason_not_to_run(workload, failed, 1) == "ValueError: it does not run"
    assert workload.network.attn_processors == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [("sd", "small")]),
        (["--family", "sd3", "flux"], [("sd3", "small"), ("flux", "small")]),
        (["--size", "sd15", "flux"], [("sd", "sd15"), ("flux", "flux")]),
        (["--size", "tiny", "sdxl", "--family", "sdxl"], [("sdxl", "tiny"), ("sdxl", "sdxl")]),
    ],
)
def test_families_and_sizes(capture, monkeypatch, arguments, expected):
    seen = []
    monkeypatch.setattr(capture, "measure", lambda family, size, options: seen.append((family, size)))
    monkeypatch.setattr(capture, "show", lambda case: None)
    capture.main(arguments)
    assert seen == expected


@pytest.mark.parametrize("arguments", [["--size", "sd15", "--family", "flux"], ["--size", "huge"], ["--family", "x"]])
def test_impossible_combinations_are_refused(capture, arguments):
    with pytest.raises(SystemExit):
        capture.main(arguments)


def test_the_documented_command_for_a_gpu_is_accepted(capture, monkeypatch):
    """The command in the docstring of the module, with the measurement replaced."""
    (command,) = re.findall(r"--device cuda --dtype\s+float16 --size [a-z0-9 ]+", capture.__doc__)
    written, seen = [], []
    monkeypatch.setattr(capture, "device_name", lambda device: f"Some GPU ({device})")
    monkeypatch.setattr(capture, "write_result", lambda name, figures: written.append(name))
    monkeypatch.setattr(capture, "measure", lambda *case: seen.append((case[0], case[1], case[2].dtype)))
    monkeypatch.setattr(capture, "show", lambda case: None)
    monkeypatch.setattr(capture.torch.cuda, "empty_cache", lambda: None)
    capture.main(command.split())
    sizes = {"sd": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux"}
    assert seen == [(family, size, "float16") for family, size in sizes.items()]
    assert written == ["capture-some-gpu-cuda"]
