"""Evaluation of what blocks of a network give, each at its own size: who has it, what it costs, what is kept."""

from __future__ import annotations

import shutil

import pytest
import torch

from synthgen.augment import CenterCrop
from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.evaluators import EVALUATORS
from synthgen.evaluators._extraction import Extractor
from synthgen.runner import run_stage
from synthgen.stages import Worker
from synthgen.stages._eval_data import image_data, stratified_sample
from synthgen.stages._eval_rows import make_extractor
from synthgen.stages._eval_sources import Source
from synthgen.stages.evaluate import Evaluate
from tests.models import HALF, WIDTH
from tests.stages.test_evaluate import ONE, result, run, source  # noqa: F401

HEAD = {"width": 16, "num_heads": 2, "seeds": 1, "steps": 3}
BLOCKS = ("mid_block", "up_blocks.2.attentions.0")


def attentive(**options):
    return Choice("attentive_probe", {**HEAD, **options})


def test_an_attention_head_reads_encoders_and_the_generator(run, stable_diffusion):  # noqa: F811
    stage = Evaluate(
        generator=Choice(str(stable_diffusion)),
        generator_timesteps=(40, 80),
        generator_blocks=BLOCKS,
        evaluators=(attentive(), Choice("linear_probe")),
    )
    run_stage(stage, run, ONE)
    found = result(run, "mae-generator")
    assert {row: list(values) for row, values in found["scores"].items()} == {
        "mae": ["attentive_probe", "linear_probe"],
        "generator": ["attentive_probe", "linear_probe"],
        "random encoder": ["attentive_probe", "linear_probe"],
    }
    numbers = found["scores"]["generator"]["attentive_probe"]
    assert 0 <= numbers["low"] <= numbers["accuracy"] <= numbers["high"] <= 1
    images = found["train"]["images"] + found["test"]["images"]
    tokens = 2 * 64 * 32 + 2 * (4 * 4 * WIDTH + 16 * 16 * HALF)  # two encoders once, two blocks twice
    assert found["patch_memory_mb"] == round(images * 2 * tokens / 1e6, 1)


def test_maps_that_do_not_fit_use_fewer_images(run):  # noqa: F811
    """The other evaluators still have all of them."""
    each = 2 * 2 * 64 * 32
    stage = Evaluate(evaluators=(attentive(), Choice("knn")), patch_memory=20 * each / 1e9)
    run_stage(stage, run, ONE)
    found = result(run)
    assert any("maps of blocks are those of 14 of 28 train images" in told for told in found["warnings"])
    assert (found["train"]["images"], found["train"]["images_with_maps"]) == (28, 14)


def test_images_without_labels_have_no_maps(run):  # noqa: F811
    stage, probe = Evaluate(), EVALUATORS.build(attentive())
    extractor = make_extractor(stage, run, run.folder("pretrain") / "mae", Worker(), [probe])
    sources = {
        "train": Source("train", str(run.folder("shards") / "train")),
        "test": Source("test", str(run.folder("shards") / "val")),
    }
    del sources["train"].labels[3]
    data = image_data(sources, extractor, ("encoder", "random"), 1.0, lambda count: None, {"warnings": []})
    train, _ = data["encoder"].feature_maps()
    numbers = sorted(sources["train"].labels)
    assert train.keys == tuple(sources["train"].samples.key(number) for number in numbers)
    classes = sorted(set(sources["train"].labels.values()))
    assert train.labels.tolist() == [classes.index(sources["train"].labels[number]) for number in numbers]
    (block,) = train.maps
    assert block.shape == (len(numbers), 1, 32, 8, 8)
    network = extractor.networks["encoder"]
    view = CenterCrop(size=32)(sources["train"].samples[numbers[5]])
    config = network.config
    pixels = (torch.tensor(view.image).float() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    with torch.no_grad():
        tokens = network(pixels.permute(2, 0, 1)[None])[0, 1:]
    torch.testing.assert_close(block[5, 0].flatten(1).mT.float(), tokens, atol=5e-3, rtol=5e-3)


def test_latents_need_a_generator(run):  # noqa: F811
    diffeed = Choice("diffeed")
    with pytest.raises(ConfigError, match="diffeed needs a diffusion model, not an encoder; give --generator"):
        run_stage(Evaluate(evaluators=(diffeed,)), run, ONE)


def test_a_generator_without_feedback_is_refused_before_images_are_read(run, stable_diffusion, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Extractor, "extract", None)
    stage = Evaluate(
        generator=Choice(str(stable_diffusion)), generator_timesteps=(40, 80), evaluators=(Choice("diffeed"),)
    )
    with pytest.raises(ConfigError, match=r"DifFeed sees an image at one timestep, not at \[40, 80\]"):
        run_stage(stage, run, ONE)


def test_diffeed_has_scores_for_the_generator_alone(run, stable_diffusion):  # noqa: F811
    """Beside an encoder, of which it says nothing."""
    evaluators = (Choice("diffeed", HEAD), Choice("diffeed", {**HEAD, "feedback": False}), Choice("knn"))
    run_stage(Evaluate(generator=Choice(str(stable_diffusion)), evaluators=evaluators), run, ONE)
    found = result(run, "mae-generator")
    heads = {"diffeed feedback=True", "diffeed feedback=False"}
    assert {row: set(values) for row, values in found["scores"].items()} == {
        "mae": {"knn"},
        "generator": {"knn", *heads},
        "random encoder": {"knn"},
        "pixels": {"knn"},
    }
    images = found["train"]["images"] + found["test"]["images"]
    assert found["patch_memory_mb"] == round(images * 4 * 4 * 16 * 16 / 1e6, 1)


def test_feedback_needs_a_generator_also_without_an_encoder(run):  # noqa: F811
    shutil.rmtree(run.folder("pretrain"))
    with pytest.raises(ConfigError, match="diffeed needs a diffusion model, not an encoder; give --generator"):
        run_stage(Evaluate(evaluators=(Choice("diffeed"),)), run, ONE)


def test_a_stratified_sample_has_all_classes():
    """However the classes follow one another."""
    turns = tuple(range(5000))  # ten classes in turn
    kept = stratified_sample(turns, 500)
    assert len(kept) == len(set(kept)) == 500
    assert {number % 10 for number in kept} == set(range(10))
    assert all(10 * place <= number < 10 * place + 10 for place, number in enumerate(kept))
    assert stratified_sample(turns, 6000) == turns


def test_only_images_that_are_kept_are_processed(run):  # noqa: F811
    each = 2 * 64 * 32
    probe = EVALUATORS.build(attentive())
    extractor = make_extractor(Evaluate(baselines=False), run, run.folder("pretrain") / "mae", Worker(), [probe])
    seen, ticks, result = [], [], {"warnings": []}
    network = extractor.networks["encoder"]
    network.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    names = {"train": "train", "test": "val"}
    sources = {name: Source(name, str(run.folder("shards") / split)) for name, split in names.items()}
    image_data(sources, extractor, ("encoder",), 20 * each / 1e9, ticks.append, result)
    assert sum(seen) == 20
    assert sum(ticks) == 40
    assert "few test images (6)" in " ".join(result["warnings"])
