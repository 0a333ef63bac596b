"""Fine-tuning in evaluate: who has it, what is kept for it, and that nobody else notices."""

from __future__ import annotations

import shutil

import pytest
import torch

from synthgen.augment import CenterCrop
from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.evaluators import EVALUATORS
from synthgen.progress import Progress
from synthgen.runner import run_stage
from synthgen.stages import Worker
from synthgen.stages._eval_data import image_data
from synthgen.stages._eval_rows import make_extractor
from synthgen.stages._eval_sources import Source
from synthgen.stages.evaluate import Evaluate
from tests.stages.test_evaluate import ONE, result, run, source  # noqa: F401

QUICK = Choice("fine_tune", {"seeds": 2, "steps": 3, "batch_size": 8})
IMAGE = 3 * 32 * 32  # bytes


def gather(run, stage, memory, told):  # noqa: F811
    """The data of fine-tuning alone, and how many images the encoder saw for it."""
    folder, seen = run.folder("pretrain") / "mae", list[int]()
    extractor = make_extractor(stage, run, folder, Worker(), [EVALUATORS.build(QUICK)])
    for network in extractor.networks.values():
        network.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    names = {"train": "train", "test": "val"}
    sources = {name: Source(name, str(run.folder("shards") / split)) for name, split in names.items()}
    data = image_data(sources, extractor, ("encoder", "random"), memory, lambda count: None, told)
    return data, extractor, sources, seen


def test_the_encoder_and_a_random_one_are_fine_tuned(run):  # noqa: F811
    """Beside an evaluator that sees the frozen ones, as it does alone."""
    run_stage(Evaluate(evaluators=(QUICK, Choice("knn"))), run, ONE)
    run_stage(Evaluate(evaluators=(Choice("knn"),), label="alone"), run, ONE)
    found, alone = result(run), result(run, "alone")
    assert {row: list(values) for row, values in found["scores"].items()} == {
        "mae": ["fine_tune", "knn"],
        "random encoder": ["fine_tune", "knn"],
        "pixels": ["knn"],
    }
    for row in ("mae", "random encoder"):
        numbers = found["scores"][row]["fine_tune"]
        assert list(numbers) == ["accuracy", "low", "high", "spread", "train_accuracy", "seeds"]
        assert 0 <= numbers["low"] <= numbers["accuracy"] <= numbers["high"] <= 1
    assert {row: values["knn"] for row, values in found["scores"].items()} == {
        row: values["knn"] for row, values in alone["scores"].items()
    }
    assert (found["train"]["images_with_pixels"], found["test"]["images_with_pixels"]) == (28, 12)
    assert "images_with_maps" not in found["train"]
    assert found["patch_memory_mb"] == round(40 * IMAGE / 1e6, 1)
    assert found["settings"]["evaluators"][0]["layer_decay"] == 0.75


def test_a_long_training_learns_colours(run):  # noqa: F811
    """Red discs and blue squares."""
    options = {"seeds": 1, "steps": 60, "batch_size": 14, "learning_rate": 1e-2, "layer_decay": 1.0}
    run_stage(Evaluate(evaluators=(Choice("fine_tune", options),)), run, ONE)
    scores = result(run)["scores"]
    assert list(scores) == ["mae", "random encoder"]
    assert scores["mae"]["fine_tune"]["accuracy"] > 0.8


def test_images_are_kept_and_no_network_runs(run):  # noqa: F811
    told = {"warnings": []}
    data, extractor, sources, seen = gather(run, Evaluate(pool="cls"), 1.0, told)
    assert seen == []
    train, test, encoder = data["encoder"].images()
    assert encoder is extractor.networks["encoder"]
    assert data["random"].encoder is extractor.networks["random"]
    assert data["random"].train_images.pixels is train.pixels
    assert {data[row].pool for row in data} == {"cls"}
    assert (data["encoder"].train, data["encoder"].train_maps) == (None, None)
    classes = sorted(set(sources["train"].labels.values()))
    for side, of in ((train, sources["train"]), (test, sources["test"])):
        assert side.pixels.dtype == torch.uint8
        for number in range(len(of.samples)):
            assert side.keys[number] == of.samples.key(number)
            assert classes[side.labels[number]] == of.labels[number]
            view = CenterCrop(size=32)(of.samples[number])
            assert torch.equal(side.pixels[number], torch.tensor(view.image))


def test_images_that_do_not_fit_are_left_out(run):  # noqa: F811
    told = {"warnings": []}
    data, *_ = gather(run, Evaluate(), 20.5 * IMAGE / 1e9, told)
    train, test, _ = data["encoder"].images()
    assert (len(train.keys), len(test.keys)) == (14, 6)
    assert any("pixels are those of 14 of 28 train images" in warning for warning in told["warnings"])
    assert any("few test images (6)" in warning for warning in told["warnings"])
    assert told["patch_memory_mb"] == round(20 * IMAGE / 1e6, 1)


def test_progress_names_evaluator_and_row(run):  # noqa: F811
    told = []

    class Remarks(Progress):
        def describe(self, text):
            told.append(text)

    stage = Evaluate(evaluators=(QUICK, Choice("knn")), baselines=False).complete()
    with stage.open(run, Worker(progress=Remarks())) as work:
        work(0)
    assert told[0] == "fine_tune of mae"
    assert told[1].startswith("fine_tune of mae: training 1 of 2, step 0 of 3, loss ")
    assert told[2].startswith("fine_tune of mae: training 2 of 2, step 0 of 3, loss ")
    assert told[3:] == ["knn of mae"]


def test_a_generator_and_a_random_one_are_fine_tuned(run, stable_diffusion):  # noqa: F811
    """And beside encoders, of which each has its own pixels; knn says nothing of the fresh one."""
    stage = Evaluate(generator=Choice(str(stable_diffusion)), evaluators=(QUICK, Choice("knn")))
    run_stage(stage, run, ONE)
    found = result(run, "mae-generator")
    side = found["generator"]["image_size"]
    assert {row: list(values) for row, values in found["scores"].items()} == {
        "mae": ["fine_tune", "knn"],
        "generator": ["fine_tune", "knn"],
        "random encoder": ["fine_tune", "knn"],
        "random generator": ["fine_tune"],
        "pixels": ["knn"],
    }
    for row in ("generator", "random generator"):
        numbers = found["scores"][row]["fine_tune"]
        assert 0 <= numbers["low"] <= numbers["accuracy"] <= numbers["high"] <= 1
    assert found["generator"]["timesteps"] == [50]
    assert found["patch_memory_mb"] == round(40 * (IMAGE + 3 * side**2) / 1e6, 1)
    assert found["settings"]["evaluators"][0]["generator_learning_rate"] == 1e-4
    shutil.rmtree(run.folder("pretrain"))
    run_stage(Evaluate(generator=Choice(str(stable_diffusion)), evaluators=(QUICK,), baselines=False), run, ONE)
    alone = result(run, "generator")
    assert list(alone["scores"]) == ["generator"]
    assert alone["scores"]["generator"]["fine_tune"] == found["scores"]["generator"]["fine_tune"]
    assert alone["patch_memory_mb"] == round(40 * 3 * side**2 / 1e6, 1)


def test_a_generator_does_not_change_the_scores_of_the_encoder(run, stable_diffusion):  # noqa: F811
    run_stage(Evaluate(evaluators=(QUICK,)), run, ONE)
    run_stage(Evaluate(generator=Choice(str(stable_diffusion)), evaluators=(QUICK,)), run, ONE)
    alone, beside = (result(run, name)["scores"] for name in ("mae", "mae-generator"))
    assert {row: beside[row] for row in alone} == alone


def test_a_generator_gets_images_at_its_own_size(run, stable_diffusion):  # noqa: F811
    told = {"warnings": []}
    stage = Evaluate(generator=Choice(str(stable_diffusion)))
    names, folder = {"train": "train", "test": "val"}, run.folder("pretrain") / "mae"
    extractor = make_extractor(stage, run, folder, Worker(), [EVALUATORS.build(QUICK)])
    sources = {name: Source(name, str(run.folder("shards") / split)) for name, split in names.items()}
    kinds = ("encoder", "generator", "random generator")
    data = image_data(sources, extractor, kinds, 1.0, lambda count: None, told)
    train, _, reader = data["generator"].images()
    assert reader is extractor.generator
    assert (data["generator"].random_init, data["random generator"].random_init) == (False, True)
    assert data["random generator"].train_images.pixels is train.pixels
    assert data["encoder"].train_images.pixels.shape[1:] == (32, 32, 3)
    assert train.keys == data["encoder"].train_images.keys
    for number in range(3):
        view = CenterCrop(size=reader.image_size)(sources["train"].samples[number])
        assert torch.equal(train.pixels[number], torch.tensor(view.image))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"generator_timesteps": (50, 150)}, "at one timestep"),
        ({"generator_blocks": ("mid_block", "up_blocks.0.attentions.0")}, "up to one block"),
        ({"generator_inversion_steps": 5}, "on noised images"),
    ],
)
def test_untrainable_settings_are_refused_before_images_are_read(run, stable_diffusion, monkeypatch, how, message):  # noqa: F811
    monkeypatch.setattr("synthgen.evaluators._extraction.Extractor.extract", None)
    stage = Evaluate(generator=Choice(str(stable_diffusion)), evaluators=(QUICK,), **how)
    with pytest.raises(ConfigError, match=f"a generator is fine-tuned {message}"), stage.open(run, Worker()) as work:
        work(0)


def test_pixels_and_latents_need_no_activations(run, stable_diffusion, monkeypatch):  # noqa: F811
    """Pixels and latents need no activations."""
    from synthgen.diffusion.features import FeatureReader

    monkeypatch.setattr(FeatureReader, "read", None)
    diffeed = Choice("diffeed", {"width": 16, "num_heads": 2, "seeds": 1, "steps": 2})
    run_stage(Evaluate(generator=Choice(str(stable_diffusion)), evaluators=(QUICK, diffeed)), run, ONE)
    found = result(run, "mae-generator")
    assert {row: list(values) for row, values in found["scores"].items()} == {
        "mae": ["fine_tune"],
        "generator": ["fine_tune", "diffeed"],
        "random encoder": ["fine_tune"],
        "random generator": ["fine_tune"],
    }
    assert found["train"]["images_with_maps"] == found["train"]["images_with_pixels"] == 28
