"""Evaluation: scores beside their baselines, masks beside the truth, and clear words where something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthgen import codecs
from synthgen.api import make_stage
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingArtifact, StaleArtifact
from synthgen.image import encode_png
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.pretrain import Pretrain
from synthgen.stages.shards import Shards
from synthgen.stores.tar import TarWriter
from tests.factories import make_generation, make_run

ONE = Local(workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an encoder; tests take copies."""
    path = tmp_path_factory.mktemp("source") / "run"
    run = make_run(path, units=2, unit_size=20, image_size=32)
    run_stage(Shards(val_ratio=0.3), run, ONE)
    encoder = Choice("micro", {"dim": 32, "depth": 1, "num_heads": 2})
    run_stage(Pretrain(encoder=encoder, epochs=1, batch_size=8, export=False, num_workers=0), run, ONE)
    return path


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(source, tmp_path / "run"))


def result(run: Run, name: str = "mae") -> dict:
    return json.loads((run.folder("evaluate") / f"{name}.json").read_text())


def write_images(folder: Path, classes: dict[str, int]) -> Path:
    """An image folder: discs of one colour for each class."""
    for number, (name, count) in enumerate(classes.items()):
        for row in range(count):
            generation, _ = make_generation("0", ("disc",), 32, seed=row)
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(generation.image, number, axis=2)).save(folder / name / f"{row}.png")
    return folder


def test_scores_stand_beside_baselines(run):
    run_stage(Evaluate(), run, ONE)
    scores = result(run)["scores"]
    assert {row: set(values) for row, values in scores.items()} == {
        "mae": {"knn", "linear_probe"},
        "random encoder": {"knn", "linear_probe"},
        "pixels": {"knn"},
    }
    for values in scores.values():
        for numbers in values.values():
            assert 0 <= numbers["low"] <= numbers["accuracy"] <= numbers["high"] <= 1
    assert scores["pixels"]["knn"]["accuracy"] > 0.8  # red discs and blue squares
    assert any("are few" in warning for warning in result(run)["warnings"])
    assert result(run)["train"]["classes"] == 2


def test_again_is_nothing_to_do_and_repeats(run):
    run_stage(Evaluate(), run, ONE)
    first = result(run)
    assert run_stage(Evaluate(), run, ONE).done_before == 1
    (run.folder("evaluate") / "mae.json").unlink()
    run_stage(Evaluate(batch_size=7, num_workers=1), run, ONE)
    assert result(run)["fingerprint"] == first["fingerprint"]
    for row, values in first["scores"].items():
        assert result(run)["scores"][row]["knn"] == values["knn"]


def test_other_settings_want_another_name(run):
    run_stage(Evaluate(), run, ONE)
    other = Evaluate(evaluators=(Choice("knn", {"k": 3}),))
    with pytest.raises(StaleArtifact, match=r"changed: evaluators.*label=NAME"):
        run_stage(other, run, ONE)
    run_stage(make_stage("evaluate", {"evaluators": [{"name": "knn", "k": 3}], "label": "three"}), run, ONE)
    assert set(result(run, "three")["scores"]["mae"]) == {"knn"}


def test_any_labelled_images_do(run, tmp_path):
    train = write_images(tmp_path / "train", {"red": 12, "green": 12})
    test = write_images(tmp_path / "test", {"red": 6, "green": 6, "blue": 2})
    (test / "loose.png").write_bytes((test / "red" / "0.png").read_bytes())
    run_stage(Evaluate(train=str(train), test=str(test)), run, ONE)
    found = result(run, "mae-test")
    assert found["test"] == {"images": 14, "classes": 3}
    told = " ".join(found["warnings"])
    assert "1 of 15 test images have no label" in told
    assert "2 test images are of classes that training lacks: blue" in told
    assert found["scores"]["pixels"]["knn"]["accuracy"] == pytest.approx(12 / 14)


def test_masks_beside_the_truth(run, tmp_path):
    truth = tmp_path / "truth.tar"
    keys = [key for unit in run.units("masks") for key, _ in run.read("masks", unit)]
    with TarWriter(truth) as tar:
        for key, members in ((key, members) for unit in run.units("masks") for key, members in run.read("masks", unit)):
            masks = codecs.decode_masks(key, members)
            labels = codecs.masks_to_labels(masks.values)
            labels[:, :16] = 0  # the right half of what was predicted
            tar.add(key, {"mask.png": encode_png(labels), "json": json.dumps({"words": list(masks.words)}).encode()})
        tar.add("9999999999", {"mask.png": encode_png(labels), "json": b'{"words": ["disc"]}'})
    run_stage(Evaluate(truth=str(truth), label="both"), run, ONE)
    found = result(run, "both")
    assert set(found["scores"]) == {"mae", "random encoder", "pixels", "masks"}
    numbers = found["scores"]["masks"]["mask_iou"]
    assert 0.3 < numbers["mean_iou"] < 0.8
    assert numbers["images"] <= len(keys)
    assert any("1 of 41 true masks" in warning for warning in found["warnings"])
    run_stage(Evaluate(truth=str(truth), predicted=str(truth), evaluators=(Choice("mask_iou"),)), run, ONE)
    assert result(run, "masks")["scores"]["masks"]["mask_iou"]["mean_iou"] == 1.0


def test_masks_alone_need_no_encoder(run, tmp_path):
    shutil.rmtree(run.folder("pretrain"))
    run_stage(Evaluate(truth=str(run.path / "shards" / "train")), run, ONE)
    assert result(run, "masks")["scores"]["masks"]["mask_iou"]["mean_iou"] == 1.0


def test_what_is_missing_is_told(run, tmp_path):
    with pytest.raises(MissingArtifact, match="no encoder in"):
        run_stage(Evaluate(encoder=str(tmp_path)), run, ONE)
    with pytest.raises(ConfigError, match="mask_iou needs the true masks"):
        run_stage(Evaluate(evaluators=(Choice("mask_iou"),)), run, ONE)
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(plain / "a.png")
    with pytest.raises(ConfigError, match=r"no image of .*plain has a label"):
        run_stage(Evaluate(test=str(plain)), run, ONE)
    others = write_images(tmp_path / "others", {"cat": 2, "dog": 2})
    with pytest.raises(ConfigError, match="share no class: disc, square"):
        run_stage(Evaluate(test=str(others)), run, ONE)
    with pytest.raises(MissingArtifact, match="there is no nowhere"):
        run_stage(Evaluate(test="nowhere.tar"), run, ONE)
    shutil.rmtree(run.path / "shards" / "val")
    with pytest.raises(MissingArtifact, match="val_ratio above 0, or give --test"):
        run_stage(Evaluate(), run, ONE)
    shutil.rmtree(run.folder("pretrain"))
    with pytest.raises(MissingArtifact, match="first run: synthgen pretrain"):
        run_stage(Evaluate(), run, ONE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "max"}, "pool must be mean or cls"),
        ({"evaluators": ["nkn"]}, "did you mean 'knn'"),
        ({"evaluators": [{"name": "knn", "kk": 3}]}, "unknown setting; did you mean 'k'"),
        ({"evaluators": [{"name": "knn", "k": 0}]}, "k must be 1 or more"),
        ({"label": "a/b"}, "plain file name"),
    ],
)
def test_bad_settings_are_told(run, settings, said):
    with pytest.raises(ConfigError, match=said):
        run_stage(make_stage("evaluate", settings), run, ONE)
