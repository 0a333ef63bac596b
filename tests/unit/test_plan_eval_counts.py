"""What a plan says of images that exist, and of those that an evaluation will look at."""

import csv
import json
import tracemalloc
from dataclasses import dataclass, replace

import pytest
import torch
from typer.testing import CliRunner

from synthgen.api import plan_stage
from synthgen.cli import app
from synthgen.datasets import open_captioned, open_dataset
from synthgen.errors import ConfigError, MissingArtifact, PromptError
from synthgen.evaluators import EVALUATORS
from synthgen.image import encode_png
from synthgen.pipeline import read_pipeline
from synthgen.plan import evaluate, plan
from synthgen.plan.count import count
from synthgen.plan.evaluate import enlarged, estimate_seconds
from synthgen.plan.source import survey_images
from synthgen.prompts import survey_prompts
from synthgen.run import Run
from synthgen.stages import make_stage
from synthgen.stages._layout import split_of
from synthgen.stores.tar import TarWriter
from tests.evaluation import make_data, make_labelled
from tests.factories import make_generation

PICTURE = encode_png(make_generation(size=16, grid=4)[0].image)


def write_tars(folder, *counts, label="disc", masks=False):
    """Tars of captioned images; every third has no label."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, images in enumerate(counts):
        with TarWriter(folder / f"{number:06d}.tar") as tar:
            for row in range(images):
                told = {"words": ["disc"], **({} if row % 3 == 2 else {"label": f"{label}{row % 2}"})}
                members = {"png": PICTURE, "txt": f"a disc {row % 5}".encode(), "json": json.dumps(told).encode()}
                if masks:
                    members["mask.png"] = encode_png((make_generation(size=16, grid=4)[1][0] * 1).astype("uint8"))
                tar.add(f"{number}-{row:05d}", members)
    return folder


def write_images(folder, names, text="a [disc] here"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)
        (folder / name).with_suffix(".txt").write_text(text)
    return folder


def seen(pictures, folder):
    """What ``attend`` would read of the few."""
    pictures.write(folder)
    samples = open_dataset(folder, masks=False)
    return {
        samples.key(i): (samples.captions(i), samples.words(i), samples.label(i), samples[i].image.shape)
        for i in range(len(samples))
    }


# -- images that exist


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/000001.tar"])
def test_tars_are_counted_and_examples_are_evenly_spaced(tmp_path, pattern):
    source = str(write_tars(tmp_path / "tars", 30, 50, 1)) + pattern
    samples = open_captioned(source)
    found = survey_images(source, most=8)
    assert found.count == len(samples)
    places = [next(i for i in range(len(samples)) if samples.key(i) == key) for key, _ in found.few]
    assert len(places) == 8
    assert max(b - a for a, b in zip([0, *places], [*places, len(samples)], strict=True)) <= len(samples) / 4
    wanted = {samples.key(i): (samples.captions(i), samples.words(i), samples.label(i), (16, 16, 3)) for i in places}
    assert seen(found, tmp_path / "few") == wanted


def test_a_limit_reads_no_further(tmp_path):
    source = write_tars(tmp_path / "tars", 30, 50)
    (source / "000002.tar").write_bytes(b"damaged")
    found = survey_images(str(source), limit=40, most=5)
    assert found.count == 40
    assert {key[0] for key, _ in found.few} == {"0", "1"}, "of both tars that are read"


def test_equal_keys_of_two_tars_are_two_images(tmp_path):
    for name in "ab":
        write_tars(tmp_path / name, 2)
        (tmp_path / name / "000000.tar").rename(tmp_path / f"{name}.tar")
    found = survey_images(str(tmp_path / "?.tar"))
    assert found.count == 4
    found.write(tmp_path / "few")
    assert len(open_dataset(tmp_path / "few")) == 4


NAMES = (
    "cat/1.png",
    "cat/2.PNG",
    "dog/3.jpg",
    "dog/deep/4.webp",
    "5.bmp",
    "6.GIF",
    ".hidden/7.png",
    "dog/.8.png",
    "9.md",
)


def test_examples_of_folders_keep_captions_words_and_labels(tmp_path):
    folder = write_images(tmp_path / "images", NAMES)
    (folder / "dog" / "metadata.jsonl").write_text('{"file_name": "3.jpg", "text": "a fox", "words": ["fox"]}\n')
    samples = open_captioned(folder)
    found = survey_images(str(folder))
    assert found.count == len(samples) == 6
    wanted = {}
    for i in range(6):
        wanted[samples.key(i)] = (samples.captions(i), samples.words(i), samples.label(i), (16, 16, 3))
    assert seen(found, tmp_path / "few") == wanted
    assert [len(survey_images(str(folder), most=2).few), survey_images(str(folder), limit=3).count] == [2, 3]


def test_metadata_selects_the_counted_images(tmp_path):
    folder = write_images(tmp_path / "images", NAMES)
    with open(tmp_path / "some.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["file_name", "text", "label"])
        rows.writeheader()
        rows.writerows({"file_name": name, "text": "a cat", "label": "x"} for name in (*NAMES[:3], "absent.png"))
    found = survey_images(str(folder), str(tmp_path / "some.csv"))
    assert found.count == len(open_captioned(folder, tmp_path / "some.csv")) == 3
    assert {(one[0], one[2]) for one in seen(found, tmp_path / "few").values()} == {(("a cat",), "x")}


def test_a_plan_refuses_what_attend_refuses(tmp_path):
    folder = write_images(tmp_path / "images", NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingArtifact, match="neither tars nor images"):
        survey_images(str(tmp_path / "empty"))
    with pytest.raises(MissingArtifact, match="give a tar, a pattern"):
        survey_images(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="leave --metadata out"):
        survey_images(str(write_tars(tmp_path / "tars", 1)), "some.csv")
    (folder / "metadata.jsonl").write_text('{"file_name": "absent.png", "text": "a cat"}\n')
    with pytest.raises(PromptError, match=r"absent\.png"):
        survey_images(str(folder))


def test_counting_tars_keeps_no_names(tmp_path):
    source = str(write_tars(tmp_path / "tars", 2_000))
    survey_images(source, most=4)  # imports what it needs
    tracemalloc.start()
    found = survey_images(source, most=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.count == 2_000
    assert peak < 3e5


def test_a_limit_restricts_the_examples_of_a_folder(tmp_path):
    folder = write_images(tmp_path / "images", [f"{number}.png" for number in range(9)])
    found = survey_images(str(folder), limit=3)
    assert [key for key, _ in found.few] == ["0", "1", "2"]


def test_units_and_images_are_those_of_attend(tmp_path):
    source = write_tars(tmp_path / "tars", 30, 50)
    for settings in ({}, {"unit_size": 7}, {"limit": 33, "unit_size": 10}):
        found = plan_stage("attend", tmp_path / "run", measure=False, images=str(source), **settings)
        stage = make_stage("attend", {"images": str(source), **settings})
        run = Run(tmp_path / "run")
        units = stage.plan(run)
        assert (found.stages[0].units, found.images) == (len(units), sum(stage.size(run, unit) for unit in units))
        assert found.prompts == 0


def test_the_command_plans_existing_images(tmp_path):
    folder = str(write_images(tmp_path / "images", NAMES))
    given = ["plan", "--images", folder, "--run", str(tmp_path / "run"), "--no-measure", "--json"]
    told = CliRunner().invoke(app, [*given, "--caption", "a {label}", "--set", "unit_size=2"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert (found["images"], found["stages"][0]["stage"], found["stages"][0]["units"]) == (6, "attend", 3)
    assert not (tmp_path / "run").exists()
    both = CliRunner().invoke(app, [*given, "--prompts", "p.txt"])
    assert isinstance(both.exception, ConfigError)


# -- what an evaluation looks at

LINES = "a [dog] here\na [cat] and a [hat]\na [car]\na [cow]\n"


def write_line(tmp_path, evaluate, **stages):
    (tmp_path / "p.txt").write_text(LINES)
    first = {"generate": {"prompts": str(tmp_path / "p.txt"), "images_per_prompt": 25, "unit_size": 7}}
    stages = {**first, "masks": {}, "shards": {"val_ratio": 0.3}, "pretrain": {}, **stages, "evaluate": evaluate}
    (tmp_path / "line.yaml").write_text(json.dumps({"run": str(tmp_path / "run"), "stages": stages}))
    return read_pipeline(tmp_path / "line.yaml")


def line(tmp_path, evaluate, **stages):
    return plan(write_line(tmp_path, evaluate, **stages), measure=False).stages[-1]


def split_sizes(tmp_path):
    keys = [f"{number // 7:06d}{number % 7:04d}" for number in range(100)]
    train = sum(split_of(Run(tmp_path / "run"), key, 0.3) == "train" for key in keys)
    return train, 100 - train


def test_images_of_the_run_are_counted_before_they_exist(tmp_path):
    found = line(tmp_path, {})
    train, test = split_sizes(tmp_path)
    assert (found.units, found.images, found.images_left) == (1, 100, 100)
    assert found.basis == f"at most {train:,} to learn from, {test} to test on"
    assert line(tmp_path, {"evaluators": ["retrieval"]}, pretrain={"method": "vlp"}).images == test


def test_images_of_other_sources_are_counted(tmp_path):
    train, test = write_tars(tmp_path / "train", 30, 20), write_tars(tmp_path / "test", 12, masks=True)
    found = line(tmp_path, {"evaluators": ["knn"], "train": str(train), "test": str(test)})
    assert found.images == 20 + 14 + 8  # two of three have a label
    assert found.basis == "at most 34 to learn from, 8 to test on"
    both = line(tmp_path, {"test": str(test), "truth": str(test)})
    assert both.basis == f"at most {split_sizes(tmp_path)[0]} to learn from, 12 to test on; 12 with true masks"
    masks = line(tmp_path, {"truth": str(test), "evaluators": ["mask_iou"]})
    assert (masks.images, masks.unknown) == (12, "not measured, because masks are compared in milliseconds")


@pytest.mark.parametrize(("settings", "classes"), [({}, 3), ({"train": "tars"}, 2)])
def test_classes_are_those_of_the_training_images(tmp_path, settings, classes):
    """The second of the four prompts marks two words, and so it has no label."""
    write_tars(tmp_path / "tars", 9)
    settings = {name: str(tmp_path / value) for name, value in settings.items()}
    pipeline = write_line(tmp_path, settings)
    counts = count(pipeline, survey_prompts(tmp_path / "p.txt"), [])
    assert counts[-1].evaluation.classes == classes


@pytest.mark.parametrize(
    ("evaluate", "stages", "error", "says"),
    [
        ({"test": "absent.tar"}, {}, MissingArtifact, "absent.tar"),
        ({}, {"shards": {"val_ratio": 0.0}}, ConfigError, "will have no image in shards/val"),
        ({"truth": "absent"}, {}, MissingArtifact, "absent"),
    ],
)
def test_a_plan_refuses_what_an_evaluation_refuses(tmp_path, evaluate, stages, error, says):
    with pytest.raises(error, match=says):
        line(tmp_path, evaluate, **stages)


# -- how time grows


@dataclass(frozen=True)
class Fake:
    """An evaluator whose seconds are known: so many a pair of images, a test image, and a step of a training image."""

    needs = "features"
    baselines = ()
    max_steps: int = 500
    pair: float = 1e-6
    test: float = 1e-3
    step: float = 1e-5

    def seconds(self, data):
        train, test = len(data.train.labels), len(data.test.labels)
        return self.pair * train * test + self.test * test + self.step * train * self.max_steps


@pytest.mark.parametrize("sizes", [(300, 200), (40_000, 900), (50_000, 30_000)])
@pytest.mark.parametrize("fake", [Fake(step=0), Fake(pair=0, test=0), Fake(pair=0, step=0), Fake(max_steps=7)])
def test_time_is_extrapolated_by_steps_and_images(monkeypatch, sizes, fake):
    monkeypatch.setattr(evaluate, "_timed", lambda evaluator, data: evaluator.seconds(data))
    data = replace(make_data(known=True), train_scenes=None, test_scenes=None, pairs=None)
    seconds, basis = estimate_seconds(fake, data, sizes, 3)
    whole = fake.seconds(enlarged(data, sizes, 3))
    mixed = fake == Fake(max_steps=7) and max(sizes) > 4096  # both kinds at once: between what either would give
    assert seconds == pytest.approx(whole, rel=0.5 if mixed else 1e-9)
    assert ("10 of at most 500 steps" in basis) == (fake.max_steps == 500)


@pytest.mark.parametrize("name", ["knn", "linear_probe", "segmentation", "detection", "retrieval", "fine_tune"])
def test_every_evaluator_accepts_enlarged_data(name):
    if name == "detection":
        pytest.importorskip("pycocotools")
    options = {"steps": 2} if name in ("segmentation", "detection", "fine_tune") else {}
    evaluator = EVALUATORS.build(name, **options)
    given = enlarged(make_data(known=True, train=6, test=4), (20, 14), 5)
    assert {len(given.train.labels), len(given.train_scenes), len(given.train_images.keys)} == {20}
    assert {len(given.test.labels), len(given.test_scenes), len(given.test_images.pixels)} == {14}
    assert (len(given.pairs.texts), len(given.pairs.images)) == (20, 14)
    assert given.train.labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert len(given.train_scenes.classes) == 6
    own = make_labelled(6, 1, known=True).features
    torch.testing.assert_close(given.train.features[6:12], own, rtol=0.05, atol=0)
    assert len(given.train.features.unique(dim=0)) == 20  # of equal ones kNN would look at all
    assert evaluator.evaluate(given)
