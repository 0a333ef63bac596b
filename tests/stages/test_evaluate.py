"""Evaluation: scores beside their baselines, masks beside the truth, and clear words where something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from synthgen import codecs
from synthgen.config import Choice
from synthgen.datasets import open_dataset
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact
from synthgen.evaluators import EVALUATORS
from synthgen.image import encode_png, resize
from synthgen.models.dual import DualEncoder, save_dual_encoder
from synthgen.models.text import TextConfig, TextEncoder, TextTokenizer
from synthgen.models.vit import load_encoder
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Worker, _eval_data, make_stage
from synthgen.stages._eval_data import mask_scores
from synthgen.stages._eval_rows import make_extractor, source_label, table_rows
from synthgen.stages._eval_sources import Source
from synthgen.stages._eval_warnings import interval_warnings, word_warnings
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.pretrain import Pretrain
from synthgen.stages.shards import Shards
from synthgen.status import status
from synthgen.stores import parse_location
from synthgen.stores.tar import TarWriter, write_bytes
from tests.factories import make_generation, make_run

ONE = Local(workers=1)
KNN = {"evaluators": (Choice("knn"),), "baselines": False}
SHORT = {"width": 16, "num_heads": 2, "seeds": 2, "steps": 4}


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


def test_baselines_have_rows(run):
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
    assert any("few test images (" in warning for warning in result(run)["warnings"])
    assert result(run)["train"]["classes"] == 2


def test_a_second_command_does_nothing_and_scores_are_reproducible(run):
    run_stage(Evaluate(), run, ONE)
    first = result(run)
    assert run_stage(Evaluate(), run, ONE).done_before == 1
    (run.folder("evaluate") / "mae.json").unlink()
    run_stage(Evaluate(batch_size=7, num_workers=1), run, ONE)
    assert result(run)["fingerprint"] == first["fingerprint"]
    for row, values in first["scores"].items():
        assert result(run)["scores"][row]["knn"] == values["knn"]


def test_training_images_among_the_test_images_are_a_warning(run):
    shards = run.folder("shards")
    run_stage(Evaluate(test=str(shards / "*/*.tar"), label="all", **KNN), run, ONE)
    (warning,) = (text for text in result(run, "all")["warnings"] if "also training images" in text)
    assert "train/000000.tar" in warning
    assert "val" not in warning
    run_stage(Evaluate(label="own", **KNN), run, ONE)
    assert not any("also training images" in text for text in result(run, "own")["warnings"])


def test_other_settings_need_another_label(run):
    run_stage(Evaluate(), run, ONE)
    other = Evaluate(evaluators=(Choice("knn", {"k": 3}),))
    with pytest.raises(StaleArtifact, match=r"changed: evaluators.*another name with --label NAME"):
        run_stage(other, run, ONE)
    run_stage(make_stage("evaluate", {"evaluators": [{"name": "knn", "k": 3}], "label": "three"}), run, ONE)
    assert set(result(run, "three")["scores"]["mae"]) == {"knn"}


def test_labelled_image_folders(run, tmp_path):
    train = write_images(tmp_path / "train", {"red": 12, "green": 12})
    test = write_images(tmp_path / "test", {"red": 6, "green": 6, "blue": 2})
    (test / "loose.png").write_bytes((test / "red" / "0.png").read_bytes())
    run_stage(Evaluate(train=str(train), test=str(test)), run, ONE)
    found = result(run, "mae-test")
    assert found["test"] == {"images": 14, "classes": 3}
    told = " ".join(found["warnings"])
    assert "1 of 15 test images have no label" in told
    assert "classes that training lacks: blue; their test images (2) count wrong" in told
    assert found["scores"]["pixels"]["knn"]["accuracy"] == pytest.approx(12 / 14)


def test_mask_iou_with_truth(run, tmp_path):
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


def test_one_image_has_no_interval(run, tmp_path):
    generation, truth = make_generation("0", ("disc",), 32, seed=1)
    with TarWriter(tmp_path / "one.tar") as tar:
        about = {"words": ["disc"], "label": "disc"}
        members = {"png": encode_png(generation.image), "mask.png": encode_png(codecs.masks_to_labels(truth))}
        tar.add("0", members | {"json": json.dumps(about).encode()})
    one = str(tmp_path / "one.tar")
    run_stage(Evaluate(test=one, truth=one, predicted=one, label="one"), run, ONE)
    found = result(run, "one")
    for numbers in [
        *(values["knn"] for name, values in found["scores"].items() if name != "masks"),
        found["scores"]["masks"]["mask_iou"],
    ]:
        assert numbers["low"] is numbers["high"] is None
    assert found["scores"]["masks"]["mask_iou"]["mean_iou"] == 1
    assert {"1 test image: there is no interval", "1 image with masks: there is no interval"} <= {*found["warnings"]}
    assert not any("single point" in warning for warning in found["warnings"])


def test_an_interval_that_is_a_point_is_named(run):
    """All discs are red and all squares blue, so kNN on pixels has every test image right, whichever are drawn."""
    run_stage(Evaluate(evaluators=(Choice("knn", {"k": 1}), Choice("attentive_probe", SHORT))), run, ONE)
    found = result(run)
    numbers = found["scores"]["pixels"]["knn"]
    assert (numbers["low"], numbers["high"]) == (1.0, 1.0)
    (warning,) = (warning for warning in found["warnings"] if "single point" in warning)
    points = [
        f"{name} of {row}"
        for row, values in found["scores"].items()
        for name, numbers in values.items()
        if numbers["low"] == numbers["high"]
    ]
    assert warning.endswith(f"says nothing about other images: {', '.join(points)}")
    assert len(points) < sum(map(len, found["scores"].values()))
    third = 1 / 3  # mean and bounds of equal values differ by rounding alone
    assert interval_warnings({"masks": {"mask_iou": {"low": third, "high": third + 1e-16}}})
    assert interval_warnings({"masks": {"mask_iou": {"low": None, "high": None}}}) == []


def test_a_set_given_by_a_pattern_gets_a_plain_file_name(run):
    for split in ("train", "val"):
        run_stage(Evaluate(test=str(run.folder("shards") / split / "*.tar"), **KNN), run, ONE)
    names = sorted(path.name for path in run.folder("evaluate").glob("*.json"))
    assert len(names) == 2
    assert re.fullmatch(r"mae-train-[0-9a-f]{8}\.json mae-val-[0-9a-f]{8}\.json", " ".join(names))
    assert run_stage(Evaluate(test=str(run.folder("shards") / "val" / "*.tar"), **KNN), run, ONE).done_before == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/photos.tar", "photos"),
        ("s3://bucket/run/photos_2.tar", "photos_2"),
        ("photos/part-*.tar", r"part-[0-9a-f]{8}"),
        ("runs/*/shards/val/*.tar", r"val-[0-9a-f]{8}"),
        ("my photos?", r"my-photos-[0-9a-f]{8}"),
        ("*.tar", r"[0-9a-f]{8}"),
        ("..", r"[0-9a-f]{8}"),
        (".", r"[0-9a-f]{8}"),
    ],
)
def test_names_of_sources_are_plain(source, name):
    assert re.fullmatch(name, source_label(source))


def test_another_normalisation_makes_the_scores_stale(run):
    asked = Evaluate(**KNN).complete()
    run_stage(asked, run, ONE)
    described = run.folder("pretrain") / "mae" / "config.json"
    config = json.loads(described.read_text())
    described.write_text(json.dumps({**config, "mean": [0.5, 0.5, 0.5]}))
    assert not asked.done(run, 0)
    with pytest.raises(StaleArtifact, match=r"changed: its input encoder\)"):
        run_stage(asked, run, ONE)


def test_masks_alone_need_no_encoder(run, tmp_path):
    shutil.rmtree(run.folder("pretrain"))
    run_stage(Evaluate(truth=str(run.path / "shards" / "train")), run, ONE)
    assert result(run, "masks")["scores"]["masks"]["mask_iou"]["mean_iou"] == 1.0


def test_more_masks_make_the_scores_stale(run, tmp_path):
    stage = Evaluate(truth=str(run.path / "shards" / "train"), evaluators=(Choice("mask_iou"),))
    made = [run.tar("masks", 1).with_suffix(suffix) for suffix in (".tar", ".json")]
    for path in made:
        path.rename(tmp_path / path.name)
    run_stage(stage, run, ONE)
    judged = result(run, "masks")["scores"]["masks"]["mask_iou"]
    assert judged["mean_iou"] == 1.0  # images that have no prediction at all do not count
    assert any("true masks have no prediction beside them" in warning for warning in result(run, "masks")["warnings"])
    assert stage.complete().done(run, 0)
    for path in made:
        (tmp_path / path.name).rename(path)
    with pytest.raises(StaleArtifact, match="changed: its input predicted"):
        run_stage(stage, run, ONE)
    (run.folder("evaluate") / "masks.json").unlink()
    run_stage(stage, run, ONE)
    assert result(run, "masks")["scores"]["masks"]["mask_iou"]["images"] > judged["images"]


def test_masks_that_change_meanwhile_make_the_scores_stale(run, monkeypatch):
    stage = Evaluate(truth=str(run.path / "shards" / "train"), evaluators=(Choice("mask_iou"),)).complete()

    def score_and_lose(*given):
        scores = mask_scores(*given)
        run.tar("masks", 1).with_suffix(".json").unlink()
        return scores

    monkeypatch.setattr(_eval_data, "mask_scores", score_and_lose)
    with stage.open(run, Worker()) as work:
        work(0)
    assert result(run, "masks")["inputs"] != stage.inputs(run)
    assert not stage.done(run, 0)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """The same file with other bytes, as long as before; changed a moment later, on any file system."""
    before, whole = path.stat(), path.read_bytes()
    assert len(old) == len(new)
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def test_a_corrected_label_makes_the_scores_stale(run, tmp_path):
    path = write_scenes(tmp_path / "test.tar", ("disc",), label="disc")
    asked = Evaluate(test=str(path), truth=str(path), **KNN).complete()
    run_stage(asked, run, ONE)
    assert asked.done(run, 0)
    rewrite(path, b'"label": "disc"', b'"label": "ball"')
    with pytest.raises(ConfigError, match=r"share no class: disc, square against ball; their"):
        run_stage(asked, run, ONE)  # labels that were read before are not those of now
    rewrite(path, b'"label": "ball"', b'"label": "disc"')
    with pytest.raises(StaleArtifact, match="changed: its input test, its input truth"):
        run_stage(asked, run, ONE)


def test_an_image_moved_to_another_class_folder_makes_the_scores_stale(run, tmp_path):
    """Though all files have the names, the sizes, the dates and the order that they had."""
    train = write_images(tmp_path / "train", {"disc": 4, "square": 4})
    (train / "disc" / "3.png").rename(train / "disc" / "z.png")
    for number in range(4):
        (train / "square" / f"{number}.png").rename(train / "square" / f"z{number}.png")
    asked = Evaluate(train=str(train), **KNN).complete()
    run_stage(asked, run, ONE)
    assert asked.done(run, 0)
    (train / "disc" / "z.png").rename(train / "square" / "z.png")
    assert not asked.done(run, 0)


@pytest.mark.parametrize("place", [100, 600])  # in a header, and in what it is of
def test_a_damaged_shard_is_named_with_its_remedy(run, place):
    tar = run.folder("shards") / "val" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[place] ^= 255
    tar.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"val/000000\.tar .*sha256.*; delete it and run: synthgen shards --run"):
        run_stage(Evaluate(**KNN), run, ONE)


def test_shards_of_the_run_are_identified_by_their_listed_sha256(run):
    asked = Evaluate(**KNN).complete()
    run_stage(asked, run, ONE)
    tar = run.folder("shards") / "val" / "000000.tar"
    os.utime(tar, ns=(0, 0))
    assert asked.done(run, 0)
    noted = run.folder("shards") / "dataset.json"
    (sha256,) = (row["sha256"] for row in json.loads(noted.read_text())["shards"] if row["file"] == "val/000000.tar")
    rewrite(noted, sha256.encode(), sha256[::-1].encode())  # as of other bytes of the same length
    with pytest.raises(StaleArtifact, match=r"changed: its input test\)"):
        run_stage(asked, run, ONE)
    noted.write_text("{")
    with pytest.raises(CorruptFile, match=r"dataset.json cannot be read; delete it and run: synthgen shards"):
        run_stage(asked, run, ONE)


def test_an_added_shard_makes_the_scores_stale(run):
    asked = Evaluate(**KNN).complete()
    run_stage(asked, run, ONE)
    tar = run.folder("shards") / "val" / "000000.tar"
    shutil.copy(tar, tar.with_name("000009.tar"))
    assert not asked.done(run, 0)


def test_scores_stay_valid_in_a_store(run, tmp_path):
    asked = Evaluate(**KNN).complete()
    run_stage(asked, run, ONE)
    there = parse_location(f"memory://{tmp_path.name}/run")
    for file in sorted(file for file in run.path.rglob("*") if file.is_file()):
        write_bytes(there / file.relative_to(run.path).as_posix(), file.read_bytes())
    assert run_stage(asked, Run.open(there), ONE).done_before == 1


def test_many_thousand_shards(run):
    noted = run.folder("shards") / "dataset.json"
    told = json.loads(noted.read_text())
    row = next(row for row in told["shards"] if row["split"] == "val")
    many = [{**row, "split": "other", "file": f"other/{number:06d}.tar"} for number in range(120_000)]
    noted.write_text(json.dumps({**told, "shards": told["shards"] + many}))
    assert noted.stat().st_size > 2**24
    run_stage(Evaluate(**KNN), run, ONE)
    assert status(run).shards.num_shards == len(told["shards"]) + len(many)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_shard_is_named(source, tmp_path, verify):
    run = Run.open(shutil.copytree(source, tmp_path / "run"))
    shutil.rmtree(run.folder("shards"))
    run_stage(Shards(val_ratio=0.3, samples_per_shard=5), run, ONE)
    gone = run.folder("shards") / "val" / "000001.tar"
    gone.unlink()
    told = rf"^1 of the shards in {gone.parent} are gone \(first: 000001.tar\); run: synthgen shards --run {run.path}$"
    with pytest.raises(MissingArtifact, match=told):
        run_stage(Evaluate(verify=verify, **KNN), run, ONE)
    run_stage(Shards(val_ratio=0.3, samples_per_shard=5), run, ONE)
    run_stage(Evaluate(verify=verify, **KNN), run, ONE)


def test_the_encoder_by_default_and_by_name(run, monkeypatch):
    run_stage(Evaluate(**KNN), run, ONE)
    folder = run.folder("pretrain") / "mae"
    assert run_stage(Evaluate(encoder=str(folder), **KNN), run, ONE).done_before == 1
    monkeypatch.chdir(run.path)
    assert run_stage(Evaluate(encoder="pretrain/mae", **KNN), run, ONE).done_before == 1
    assert result(run)["encoder"] == str(folder)
    other = Path(shutil.copytree(folder, run.path / "other" / "mae"))
    (other / "done.json").unlink()
    weights = other / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StaleArtifact, match=r"changed: its input encoder\)"):
        run_stage(Evaluate(encoder=str(other), **KNN), run, ONE)


def test_settings_that_are_left_out_are_named(run, tmp_path):
    run_stage(Evaluate(truth=str(run.path / "shards" / "train"), label="x", **KNN), run, ONE)
    with pytest.raises(StaleArtifact, match=r"changed: truth, its input truth, its input predicted\)"):
        run_stage(Evaluate(label="x", **KNN), run, ONE)


def test_missing_inputs_are_named(run, tmp_path):
    with pytest.raises(MissingArtifact, match="no encoder in"):
        run_stage(Evaluate(encoder=str(tmp_path)), run, ONE)
    with pytest.raises(ConfigError, match="mask_iou needs true masks"):
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
    with pytest.raises(
        MissingArtifact, match=r"has no shards/val; first run: synthgen shards --run .*, or give --test"
    ):
        run_stage(Evaluate(), run, ONE)
    shutil.rmtree(run.folder("pretrain"))
    with pytest.raises(MissingArtifact, match="first run: synthgen pretrain"):
        run_stage(Evaluate(), run, ONE)


def test_an_empty_val_split_is_named_with_its_remedy(run, caplog):
    again = f"delete {run.path}/shards and run: synthgen shards --val-ratio 0.3 --run {run.path}"
    for ratio, why in (
        (0.001, "got none of the 40 images (val_ratio 0.001); make more images, or "),
        (0.0, "is empty (val_ratio 0), or "),
    ):
        shutil.rmtree(run.folder("shards"))
        caplog.clear()
        run_stage(Shards(val_ratio=ratio), run, ONE)
        warned = f"none of the 40 samples of {run.path} is in the val split (val_ratio 0.001), so evaluate has no test "
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            f"{warned}images; make more images, or {again}"
        ] * bool(ratio)
        with pytest.raises(MissingArtifact) as told:
            run_stage(Evaluate(), run, ONE)
        assert str(told.value) == f"the val split of {run.path} {why}{again}, or give --test"


def test_classes_of_one_image_and_differing_names_have_their_own_messages(run, tmp_path):
    for name, classes in (("first", {"cat": 1, "dog": 1}), ("second", {"cow": 1})):
        write_images(tmp_path / name, classes)
    with pytest.raises(ConfigError, match=r"each of the 3 classes has 1 image; .*--images-per-prompt"):
        run_stage(Evaluate(train=str(tmp_path / "first"), test=str(tmp_path / "second")), run, ONE)
    found = {split: Source(split, str(tmp_path / split)) for split in ("first", "second")}
    write_images(tmp_path / "third", {"cat": 2, "dog": 1})
    with pytest.raises(ConfigError, match=r"each of the 3 classes has at most 2 images; "):
        found["second"].require_shared_class(Source("train", str(tmp_path / "third")), same_run=True)
    with pytest.raises(ConfigError, match="their names must agree"):
        found["second"].require_shared_class(Source("train", str(tmp_path / "third")), same_run=False)


def test_unknown_true_words_are_a_warning(run, tmp_path):
    truth = tmp_path / "truth.tar"
    with TarWriter(truth) as tar:
        for number, (key, members) in enumerate(run.read("masks", 0)):
            masks = codecs.decode_masks(key, members)
            words = ["circle" if word == "disc" and number else word.upper() for word in masks.words]
            labels = codecs.masks_to_labels(masks.values)
            tar.add(key, {"mask.png": encode_png(labels), "json": json.dumps({"words": words}).encode()})
    evaluated = run_stage(Evaluate(truth=str(truth), evaluators=(Choice("mask_iou"),)), run, ONE)
    found = result(run, "masks")
    assert "1 of the 3 true words is not a predicted word and counts 0 (names must agree): circle" in found["warnings"]
    assert (evaluated.samples, found["masks"]) == (20, {"images": 20})
    assert word_warnings({"a": False}, {"a": True, "b": True, "c": True, "d": False}) == [
        "2 of the 3 true words are not among the predicted words and count 0 (names must agree): b, c"
    ]
    assert word_warnings({"a": True}, {"a": True, "b": False}) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "max"}, "pool must be mean or cls"),
        ({"evaluators": ["nkn"]}, "did you mean 'knn'"),
        ({"evaluators": [{"name": "knn", "kk": 3}]}, "unknown setting; did you mean 'k'"),
        ({"evaluators": [{"name": "knn", "k": 0}]}, "k must be 1 or more"),
        ({"label": "a/b"}, "plain file name"),
        ({"mask_classes": "both"}, "mask_classes must be words or label"),
        ({"patch_memory": 0.0}, "patch_memory must be above 0"),
        ({"evaluators": [{"name": "segmentation", "seeds": 0}]}, "must be 1 or more"),
        ({"evaluators": [{"name": "detection", "nms": 0.0}]}, "nms above 0"),
        ({"evaluators": [{"name": "retrieval", "ranks": [0]}]}, "ranks must be"),
    ],
)
def test_bad_settings_are_refused(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_stage(make_stage("evaluate", settings), run, ONE)


# -- segmentation and detection

HEADS = {"seeds": 2, "steps": 40, "batch_size": 8, "width": 16}
DENSE = (
    Choice("segmentation", {**HEADS, "decoder_learning_rate": 0.02}),
    Choice("detection", {**HEADS, "learning_rate": 0.02}),
)


def write_scenes(path: Path, words: tuple[str, ...], count: int = 6, **meta: object) -> Path:
    """A tar of drawn scenes, with masks, whose objects are called ``words``."""
    with TarWriter(path) as tar:
        for row in range(count):
            generation, truth = make_generation("0", ("disc", "square")[: len(words)], 32, seed=100 + row)
            about = {"words": list(words), **meta}
            members = {"png": encode_png(generation.image), "mask.png": encode_png(codecs.masks_to_labels(truth))}
            tar.add(f"{row:04d}", {**members, "json": json.dumps(about).encode()})
    return path


def test_patch_features_and_baselines(run):
    run_stage(Evaluate(evaluators=DENSE, label="dense"), run, ONE)
    found = result(run, "dense")
    assert list(found["scores"]) == ["mae", "random encoder", "pixels"]
    for values in found["scores"].values():
        segmentation, detection = values["segmentation"], values["detection"]
        assert 0 <= segmentation["low"] <= segmentation["miou"] <= segmentation["high"] <= 1
        assert 0 <= detection["low"] <= detection["ap"] <= detection["high"] <= 1
        assert {"spread", "decoder_miou", "decoder_spread", "seeds"} <= segmentation.keys()
        assert detection["boxes"] >= found["test"]["images_with_masks"]
    pixels = found["scores"]["pixels"]  # red discs and blue squares on grey
    assert pixels["segmentation"]["miou"] > 0.6
    assert pixels["detection"]["ap50"] > 0.3
    assert found["train"]["mask_classes"] == 2
    # 36 images: 8 x 8 patches of 32 numbers from two networks and 48 of colour, 32 x 32 pixels; 2 bytes each
    images = found["train"]["images_with_masks"] + found["test"]["images_with_masks"]
    assert found["patch_memory_mb"] == round(images * 2 * (64 * (2 * 32 + 48) + 32 * 32) / 1e6, 1)


def test_images_without_labels_have_patches(run, tmp_path):
    """Neither labels nor texts: only what needs masks can be asked."""
    train, test = (write_scenes(tmp_path / f"{name}.tar", ("Disc", "square")) for name in ("one", "two"))
    run_stage(Evaluate(train=str(train), test=str(test), evaluators=DENSE[:1], label="dense"), run, ONE)
    assert result(run, "dense")["test"] == {"images": 6, "images_with_masks": 6, "mask_classes": 2}
    with pytest.raises(ConfigError, match=r"no image of .*one.tar has a label"):
        run_stage(Evaluate(train=str(train), test=str(test)), run, ONE)


def test_words_that_training_lacks_are_a_warning_and_count(run, tmp_path):
    train = write_scenes(tmp_path / "train.tar", ("disc", "square"), 8)
    test = write_scenes(tmp_path / "test.tar", ("disc", "zebra"))
    run_stage(Evaluate(train=str(train), test=str(test), evaluators=DENSE, label="dense"), run, ONE)
    found = result(run, "dense")
    warning = (
        "classes that training lacks (1): zebra; their masks in test images (6) count as missed (not for saliency)"
    )
    assert warning in found["warnings"]
    pixels = found["scores"]["pixels"]
    assert pixels["segmentation"]["classes"] == 3
    assert pixels["segmentation"]["miou"] <= 2 / 3  # the third is never found
    assert pixels["detection"]["ap"] <= 1 / 2


def test_detection_uses_given_boxes(run, tmp_path):
    """Boxes in json count instead of those round masks, cut to the middle square and scaled with it."""
    boxes = [["disc", 0.0, 0.0, 8.0, 8.0], ["disc", 16.0, 16.0, 8.0, 8.0], ["square", -20.0, 0.0, 8.0, 8.0]]
    for name in ("train", "test"):
        write_scenes(tmp_path / f"{name}.tar", ("disc", "square"), boxes=boxes)
    stage = Evaluate(
        train=str(tmp_path / "train.tar"), test=str(tmp_path / "test.tar"), evaluators=DENSE[1:], label="b"
    )
    run_stage(stage, run, ONE)
    assert result(run, "b")["scores"]["mae"]["detection"]["boxes"] == 12  # the third lies outside


def test_classes_may_be_labels(run, tmp_path):
    train = write_scenes(tmp_path / "train.tar", ("disc",), label="round thing")
    test = write_scenes(tmp_path / "test.tar", ("ball",), label="round thing")
    stage = Evaluate(train=str(train), test=str(test), evaluators=DENSE[:1], mask_classes="label", label="dense")
    run_stage(stage, run, ONE)
    found = result(run, "dense")
    assert found["scores"]["mae"]["segmentation"]["classes"] == 2
    assert not any("training lacks" in warning for warning in found["warnings"])


def test_patch_features_fit_into_patch_memory(run):
    run_stage(Evaluate(evaluators=DENSE[:1], patch_memory=2e-4, label="dense"), run, ONE)
    found = result(run, "dense")
    assert found["patch_memory_mb"] <= 0.2
    assert any(f"those of {found['train']['images_with_masks']} of " in warning for warning in found["warnings"])


def test_images_without_masks_are_refused(run, tmp_path):
    images = write_images(tmp_path / "images", {"disc": 2, "square": 2})
    with pytest.raises(ConfigError, match=r"no image of .*images has masks; give --test"):
        run_stage(Evaluate(test=str(images), evaluators=DENSE), run, ONE)


def test_an_evaluator_may_be_listed_twice(run):
    twice = (Choice("knn"), Choice("knn", {"k": 3}))
    run_stage(Evaluate(evaluators=twice, label="twice"), run, ONE)
    assert set(result(run, "twice")["scores"]["mae"]) == {"knn k=20", "knn k=3"}
    with pytest.raises(ConfigError, match="knn is listed twice"):
        run_stage(Evaluate(evaluators=(Choice("knn"), Choice("knn")), label="same"), run, ONE)


# -- retrieval


def add_text_tower(folder: Path) -> None:
    """A text tower of random weights beside the encoder: it finds no more than chance."""
    encoder, tokenizer = load_encoder(folder), TextTokenizer(max_tokens=16)
    config = TextConfig(
        vocab_size=tokenizer.vocab_size, max_tokens=16, dim=32, depth=1, num_heads=2, embed_dim=16, max_words=8
    )
    torch.manual_seed(0)
    heads = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
    save_dual_encoder(DualEncoder(encoder, TextEncoder(config), *heads, tokenizer), folder)


def test_retrieval_needs_a_text_tower(run):
    summary = run_stage(Evaluate(), run, ONE)
    assert summary.notes == {"evaluators left out (retrieval)": 1}
    assert "has none; train one with: synthgen pretrain --method vlp" in result(run)["skipped"]["retrieval"]
    with pytest.raises(ConfigError, match="retrieval needs a text tower"):
        run_stage(Evaluate(evaluators=(Choice("retrieval"),), label="asked"), run, ONE)


def test_retrieval_with_a_text_tower(run, tmp_path):
    """With a text tower retrieval is done by default; several captions an image; labels are not needed for it."""
    add_text_tower(run.folder("pretrain") / "mae")
    run_stage(Evaluate(), run, ONE)
    numbers = result(run)["scores"]["mae"]["retrieval"]
    assert 0 <= numbers["low"] <= numbers["mean_recall"] <= numbers["high"] <= 1
    assert result(run)["skipped"] == {}
    assert "text tower" in result(run)["inputs"]
    texts = ["a red disc", "something round"]
    test = write_scenes(tmp_path / "captions.tar", ("disc",), captions=texts)
    run_stage(Evaluate(test=str(test)), run, ONE)
    found = result(run, "mae-captions")
    assert set(found["skipped"]) == {"knn", "linear_probe"}
    numbers = found["scores"]["mae"]["retrieval"]
    assert (numbers["images"], numbers["texts"], numbers["image_to_text_r5"]) == (6, 2, 1)
    assert found["test"] == {"images": 6, "images_with_texts": 6, "texts": 12}


def test_retrieval_on_a_folder_with_text_files(run, tmp_path):
    add_text_tower(run.folder("pretrain") / "mae")
    images = write_images(tmp_path / "captioned", {"disc": 3})
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"disc number {number}")
    run_stage(Evaluate(test=str(images), evaluators=(Choice("retrieval"),)), run, ONE)
    numbers = result(run, "mae-captioned")["scores"]["mae"]["retrieval"]
    assert (numbers["images"], numbers["texts"]) == (3, 3)


# -- a diffusion model's own activations


def test_a_generator_and_an_encoder(run, stable_diffusion):
    generator = Choice(str(stable_diffusion))
    run_stage(Evaluate(generator=generator, generator_timesteps=(40, 80)), run, ONE)
    found = result(run, "mae-generator")
    assert {row: set(values) for row, values in found["scores"].items()} == {
        "mae": {"knn", "linear_probe"},
        "generator": {"knn", "linear_probe"},
        "random encoder": {"knn", "linear_probe"},
        "pixels": {"knn"},
    }
    numbers = found["scores"]["generator"]["knn"]
    assert 0 <= numbers["low"] <= numbers["accuracy"] <= numbers["high"] <= 1
    read = {"timesteps": [40, 80], "blocks": ["up_blocks.1.attentions.0"], "image_size": 32}
    assert found["generator"] == read
    settings = found["settings"]["generator"]
    assert (settings["name"], settings["model"]) == ("diffusers", str(stable_diffusion))
    assert run_stage(Evaluate(generator=generator, generator_timesteps=(40, 80)), run, ONE).done_before == 1
    other = Evaluate(generator=generator, generator_timesteps=(40, 80), generator_blocks=("mid_block",))
    with pytest.raises(StaleArtifact, match=r"changed: generator_blocks\)"):
        run_stage(other, run, ONE)
    run_stage(Evaluate(), run, ONE)
    assert result(run)["scores"]["mae"] == found["scores"]["mae"]
    assert not any(name.startswith("generator") for name in result(run)["settings"])  # as before there were generators


def test_the_generator_gets_images_at_its_own_size_and_by_key(run, stable_diffusion):
    """Also where loader processes read it, in batches, beside an encoder of another size."""
    stage = Evaluate(generator=Choice(str(stable_diffusion), {"height": 64, "width": 48}), batch_size=2, num_workers=1)
    asked = [EVALUATORS.build("knn"), EVALUATORS.build("segmentation")]
    extractor = make_extractor(stage, run, run.folder("pretrain") / "mae", Worker(), asked)
    samples, numbers = open_dataset(str(run.folder("shards") / "train"), masks=True), (4, 0, 7)
    found = extractor.extract(samples, numbers, (4, 7), (), lambda count: None)
    images = np.stack([resize(samples[number].image, (48, 48)) for number in numbers])
    reader = extractor.generator
    assert reader is not None
    read = reader.read(torch.from_numpy(images), [samples.key(number) for number in numbers], 8)
    torch.testing.assert_close(found.features["generator"], read.pooled, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.patches["generator"], read.patches[[0, 2]], atol=1e-2, rtol=1e-2)


def test_a_generator_needs_no_encoder(run, stable_diffusion):
    """The grid is then that of its finest block: 16 x 16 of 32 pixels."""
    shutil.rmtree(run.folder("pretrain"))
    asked = {"generator": str(stable_diffusion), "generator_blocks": ["mid_block", "up_blocks.2.attentions.0"]}
    run_stage(make_stage("evaluate", asked), run, ONE)
    found = result(run, "generator")
    assert set(found["scores"]) == {"generator", "pixels"}
    assert "there is only the generator" in found["skipped"]["retrieval"]
    assert "encoder" not in found["inputs"]
    run_stage(make_stage("evaluate", {**asked, "evaluators": DENSE[:1], "label": "dense"}), run, ONE)
    dense = result(run, "dense")
    assert 0 <= dense["scores"]["generator"]["segmentation"]["miou"] <= 1
    images = dense["train"]["images_with_masks"] + dense["test"]["images_with_masks"]
    assert dense["patch_memory_mb"] == round(images * 2 * (256 * (32 + 16 + 3 * 2 * 2) + 32 * 32) / 1e6, 1)
    with pytest.raises(ConfigError, match="needs an encoder with a text tower"):
        run_stage(make_stage("evaluate", {**asked, "evaluators": ["retrieval"], "label": "texts"}), run, ONE)


def test_generator_patches_are_on_the_grid_of_the_encoder(run, stable_diffusion):
    add_text_tower(run.folder("pretrain") / "mae")
    asked = {"generator": {"name": "diffusers", "model": str(stable_diffusion)}, "label": "dense"}
    run_stage(make_stage("evaluate", {**asked, "evaluators": [*DENSE[:1], "retrieval"]}), run, ONE)
    found = result(run, "dense")
    assert {row: set(values) for row, values in found["scores"].items()} == {
        "mae": {"segmentation", "retrieval"},
        **{row: {"segmentation"} for row in ("generator", "random encoder", "pixels")},
    }
    images = found["train"]["images_with_masks"] + found["test"]["images_with_masks"]
    assert found["patch_memory_mb"] == round(images * 2 * (64 * (2 * 32 + 16 + 48) + 32 * 32) / 1e6, 1)
    run_stage(make_stage("evaluate", {**asked, "evaluators": ["retrieval"], "label": "texts"}), run, ONE)
    assert set(result(run, "texts")["scores"]) == {"mae"}
    assert "the generator has no row: retrieval cannot evaluate it" in result(run, "texts")["warnings"]


def test_another_generator_in_the_same_folder_makes_the_scores_stale(run, stable_diffusion, tmp_path):
    model = Path(shutil.copytree(stable_diffusion, tmp_path / "model"))
    stage = Evaluate(generator=Choice(str(model)), **KNN)
    run_stage(stage, run, ONE)
    assert run_stage(stage, run, ONE).done_before == 1
    (weights,) = (model / "unet").glob("*.safetensors")
    save_file({name: weight + 0.5 for name, weight in load_file(weights).items()}, weights)
    with pytest.raises(StaleArtifact, match=r"changed: its input generator's model"):
        run_stage(stage, run, ONE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": "tiny", "generator_blocks": ["up_block"]}, r"unknown block of UNet2DConditionModel 'up_block'"),
        ({"generator": "tiny", "generator_timesteps": []}, "generator_timesteps must be one or more of 0 to 999"),
        ({"generator": "tiny", "generator_timesteps": [1000]}, "generator_timesteps must be one or more of 0 to 999"),
        ({"generator": "tinny"}, "unknown model 'tinny'; .*a folder or a hub id will do too"),
        ({"generator": {"name": "tiny", "dtype": "float16"}}, "backbone tiny.dtype: unknown setting"),
    ],
)
def test_bad_generator_settings_are_refused(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_stage(make_stage("evaluate", settings), run, ONE)


def test_an_encoder_with_the_name_of_another_row_is_refused(tmp_path):
    for name, stage in (("pixels", Evaluate()), ("generator", Evaluate(generator=Choice("tiny")))):
        with pytest.raises(ConfigError, match="has the name of another row"):
            table_rows(stage, tmp_path / name, ())
    assert table_rows(Evaluate(), tmp_path / "generator", [EVALUATORS.build("knn")])["generator"] == "encoder"
