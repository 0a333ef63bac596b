import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from synthgen.prompts import sample_seed
from synthgen.records import AFFINITY_OFFSETS, Generation, Maps, Request
from synthgen.stages.attend import Attend
from synthgen.tiny import compositor as composing
from synthgen.tiny import score
from synthgen.tiny.classifier import Classifier
from synthgen.tiny.compositor import LAYOUTS, Compositor, preprocess
from tests.tiny_data import NAMES, make_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def batches(data, monkeypatch):
    """Two batches of six composites of 32 px."""
    monkeypatch.setattr(composing, "IMAGE_SIZE", 32)
    compositor = Compositor(data, NAMES, held_out=True)
    return [compositor.sample(6, torch.Generator().manual_seed(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return score.backbone(stable_diffusion)


def generation(weights, *, words=("apple", "ball"), key="000000000", image=None):
    """A generation with the maps ``weights`` (words, h, w)."""
    affinity = np.ones((len(AFFINITY_OFFSETS), *weights.shape[1:]), np.float16)
    prompt = score.photo_prompt(*words)
    size = 32
    image = np.zeros((size, size, 3), np.uint8) if image is None else image
    return Generation(Request(key, prompt, 0), image, Maps(words, weights.astype(np.float16), affinity))


def halves(size=32):
    """Masks of the left and the right half, within the middle rows."""
    masks = np.zeros((2, size, size), bool)
    masks[0, size // 4 : -size // 4, 2 : size // 2 - 2] = True
    masks[1, size // 4 : -size // 4, size // 2 + 2 : -2] = True
    return masks


class Oracle(Classifier):
    """Classifies by the strongest channel: red is an apple, green a ball, blue a car."""

    def forward(self, x):
        return torch.nn.functional.pad(x.mean(dim=(2, 3)), (0, len(self.names) - 3), value=-2)


@pytest.fixture(scope="module")
def oracle():
    return Oracle(NAMES.own).eval()


def test_prompts_mark_the_objects():
    one, two = score.photo_prompt("apple"), score.photo_prompt("car", "owl")
    assert (one.text, one.words, one.label) == ("a photo of an apple", ("apple",), "apple")
    assert (two.text, two.label) == ("a photo of a car and an owl", None)
    assert [two.text[start:stop] for start, stop in two.spans] == ["car", "owl"]


def test_preprocessed_images_are_in_minus_one_to_one():
    images = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert preprocess(images).shape == (1, 3, 1, 1)
    assert preprocess(images).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_the_size_of_a_folder_includes_subfolders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(1_500_000))
    (tmp_path / "c").write_bytes(bytes(250_000))
    assert score.size_mb(tmp_path) == 1.75


def test_psnr_is_the_mean_over_images():
    class Dimming:
        """Every pixel of the first image is off by 0.1 of white, of the second by 0.01."""

        def encode(self, x):
            off = torch.tensor([0.2, 0.02])[:, None, None, None]
            self.latents = x + off * (1 - 2 * (x > 0))
            return self

        def decode(self, latents):
            self.sample = latents
            return self

    class Batch:
        images = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)

    assert score.vae_psnr(Dimming(), [Batch]) == pytest.approx(30, abs=0.01)


def test_the_backbone_has_the_size_of_its_weights(model):
    assert model.size == (32, 32)
    (drawn,) = model.generate([Request("0000000000", score.photo_prompt("cat"), 1)])
    assert drawn.image.shape == (32, 32, 3)
    assert drawn.maps.weights.shape == (1, 16, 16)


def test_whole_images_are_classified(oracle):
    images = np.zeros((20, 32, 32, 3), np.uint8)
    images[:7, ..., 0] = images[7:12, ..., 1] = images[12:, ..., 2] = 255
    expected = ["apple"] * 7 + ["ball"] * 5 + ["car"] * 8
    assert score.classify(oracle, list(images)) == expected
    assert score.classify(oracle, torch.from_numpy(images)) == expected


def test_a_mask_is_right_if_the_crop_around_it_shows_the_object(oracle):
    masks = halves()
    image = np.zeros((32, 32, 3), np.uint8)
    image[masks[0], 0] = image[masks[1], 1] = 255
    tensors = torch.from_numpy(image), torch.from_numpy(masks.copy())
    assert score.check_masks(oracle, tensors[0], ("apple", "ball"), tensors[1]) == [True, True]
    assert score.check_masks(oracle, tensors[0], ("ball", "apple"), tensors[1]) == [False, False]
    tensors[1][1] = False
    assert score.check_masks(oracle, tensors[0], ("apple", "ball"), tensors[1]) == [True, False]
    weights = masks.reshape(2, 16, 2, 16, 2).mean(axis=(2, 4))
    assert score.find_words(oracle, generation(weights, image=image)) == [True, True]
    assert score.find_words(oracle, generation(weights[::-1], image=image)) == [False, False]
    assert score.find_words(oracle, generation(weights * np.array([1, 0])[:, None, None], image=image)) == [True, False]


def test_attend_records_what_the_stage_records(model, batches):
    got = list(score.attend(model, batches))
    assert [one.request.key for one, _ in got] == [f"{row:09d}" for row in range(12)]
    truth = [words for batch in batches for words in batch.words]
    assert [exact.words for _, exact in got] == truth
    assert [len(exact.values) for _, exact in got] == [len(words) for words in truth]
    request = Request("000000007", got[7][0].request.prompt, sample_seed(0, "000000007"))
    (again,) = model.attend(batches[1].images[1:2].numpy(), [request], Attend.timesteps)
    np.testing.assert_allclose(again.maps.weights, got[7][0].maps.weights, atol=2e-3)


def test_images_of_another_size_are_resized_for_the_model(model, data, monkeypatch):
    monkeypatch.setattr(composing, "IMAGE_SIZE", 48)
    batch = Compositor(data, NAMES).sample(2, torch.Generator().manual_seed(0), LAYOUTS[:1])
    for one, exact in score.attend(model, [batch]):
        assert one.image.shape == (32, 32, 3)
        assert exact.values.shape == (1, 48, 48)


def test_the_iou_is_high_for_exact_maps_and_low_for_exchanged_ones(batches):
    exact = score.word_masks(("apple", "ball"), halves())
    weights = halves().reshape(2, 16, 2, 16, 2).mean(axis=(2, 4))
    good = [(generation(weights, key=f"{row:09d}"), exact) for row in range(6)]
    bad = [(generation(weights[::-1], key=f"{row:09d}"), exact) for row in range(6)]
    for samples, low, high in ((good, 0.8, 1), (bad, 0, 0.2)):
        figures = score.mask_ious(samples)
        assert figures["images"] == 6
        assert set(figures["mean_iou"]) == {"level", "level in hindsight", "threshold", "attentioncut"}
        for rows in figures["mean_iou"].values():
            assert set(rows) == {"all", "2"}
            assert low <= rows["all"]["mean_iou"] <= high
            assert rows["all"]["words"] == 12
        assert figures["dropped"] == 0


def test_the_level_is_chosen_on_the_other_half_of_the_images():
    """The best level is high for even images and low for odd ones; in hindsight there is a compromise."""
    peak = np.zeros((1, 16, 16))
    peak[0, 4:12, 4:12] = 0.4
    peak[0, 6:10, 6:10] = 1
    wide, narrow = peak[0] > 0, peak[0] == 1
    samples = []
    for row in range(8):
        truth = (narrow if row % 2 == 0 else wide).repeat(2, 0).repeat(2, 1)[None]
        samples.append((generation(peak, words=("apple",), key=f"{row:09d}"), score.word_masks(("apple",), truth)))
    figures = score.mask_ious(samples)
    even, odd = figures["levels"]["halves"]
    assert even < 0.4 < odd  # each half uses the other's
    assert figures["mean_iou"]["level"]["all"]["mean_iou"] < 0.4
    assert figures["mean_iou"]["level in hindsight"]["all"]["mean_iou"] > 0.5


def test_a_word_that_was_not_recorded_has_an_iou_of_0():
    exact = score.word_masks(("apple", "ball"), halves())
    weights = halves().reshape(2, 16, 2, 16, 2).mean(axis=(2, 4))[1:]
    samples = [(generation(weights, words=("ball",), key=f"{row:09d}"), exact) for row in range(2)]
    for rows in score.mask_ious(samples)["mean_iou"].values():
        assert rows["all"]["words"] == 4
        assert 0.4 < rows["all"]["mean_iou"] <= 0.5


def test_the_metrics_that_training_logs(stable_diffusion, batches):
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    figures = score.attention_iou(pipeline, batches)
    counts = sorted({len(words) for batch in batches for words in batch.words})
    assert list(figures) == [f"attention_{kind}_{count}" for count in counts for kind in ("iou", "level")]
    for name, value in figures.items():
        assert (0.1 <= value <= 0.9) if "level" in name else (0 <= value <= 1)


def test_the_benchmark_runs_and_can_be_reported(data, stable_diffusion, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = composing.Names(NAMES.own, ((),) * len(NAMES.own))
    monkeypatch.setattr(composing, "IMAGE_SIZE", 32)
    monkeypatch.setattr(composing.Names, "load", classmethod(lambda cls: names))
    torch.manual_seed(0)
    Classifier(NAMES.own).eval().save(tmp_path / "c.safetensors")
    bench, report = importlib.import_module("tiny"), importlib.import_module("report")
    arguments = ["--classifier", tmp_path / "c.safetensors", "--weights", stable_diffusion, "--num", 8, "--workers", 1]
    figures = bench.main([*map(str, ["--data", data, *arguments]), "--quick"])
    assert json.loads(json.dumps(figures)) == figures
    assert figures["one_object"]["images"] == figures["two_objects"]["images"] == 4
    assert figures["size_mb"] == score.size_mb(stable_diffusion)
    assert [(row["steps"], row["guidance"]) for row in figures["samplers"]] == [(4, 2.0), (4, 3.0)]
    figures["speed"] = {"images_per_second": 4.5, "with_start": 3.5, "images": 4, "workers": 2}
    text = "\n".join(report.tiny_model(figures))
    assert "| 4 |" in text
    assert "4.5" in text
