import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from synthgen.tiny import classifier as module
from synthgen.tiny import compositor as composing
from synthgen.tiny.classifier import SIZE, Buffer, Classifier, accuracy, boxes, crop, train, whole
from synthgen.tiny.compositor import Compositor
from synthgen.tiny.loop import Budget
from tests.tiny_data import NAMES, make_data


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small(monkeypatch):
    """Composites of 32 px, which are fast."""
    monkeypatch.setattr(composing, "IMAGE_SIZE", 32)


def gradient(height, width):
    """An image whose red is the column and whose green is the row."""
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[..., 0], image[..., 1] = torch.arange(width), torch.arange(height)[:, None]
    return image[None]


def pixel(value):
    return value / 127.5 - 1


def test_boxes_bound_their_masks():
    masks = torch.zeros(3, 8, 12, dtype=torch.bool)
    masks[0, 2:5, 3:11] = True
    masks[1, 7, 0] = True
    masks[1, 3, 4] = True
    assert boxes(masks).tolist() == [[3, 2, 11, 5], [0, 3, 5, 8], [0, 0, 0, 0]]


def test_a_box_of_the_input_size_is_cropped_without_resampling():
    image = gradient(128, 128)
    cut = crop(image, torch.tensor([[20.0, 40, 20 + SIZE, 40 + SIZE]]), 0)
    expected = pixel(image[0, 40 : 40 + SIZE, 20 : 20 + SIZE].permute(2, 0, 1).float())
    torch.testing.assert_close(cut[0], expected, atol=1e-4, rtol=0)


def test_the_crop_is_a_square_around_the_box_with_a_margin():
    cut = crop(gradient(128, 128), torch.tensor([[40.0, 60, 80, 70]]), 0.1)  # longer side 40, so 48 with both margins
    first, last = (((cut[0, :2, k, k] + 1) * 127.5).tolist() for k in (0, -1))
    inset = 48 / SIZE / 2 - 0.5  # from the edge to the centre of the first pixel; values count from 0
    assert first == pytest.approx([60 - 24 + inset, 65 - 24 + inset], abs=0.01)
    assert last == pytest.approx([60 + 24 - 1 - inset, 65 + 24 - 1 - inset], abs=0.01)


def test_crops_stay_inside_the_image():
    near_corner = torch.tensor([[100.0, 0, 128, 20], [0, 0, 128, 128], [2, 120, 2, 120]])
    cut = (crop(gradient(128, 128).expand(3, -1, -1, -1), near_corner, torch.tensor([0.5, 0.3, 0.0])) + 1) * 127.5
    side = 56 / SIZE
    assert cut[0, 0, 0, 0] == pytest.approx(128 - 56 + side / 2 - 0.5, abs=0.01)
    assert cut[0, 1, 0, 0] == pytest.approx(0, abs=0.1)
    torch.testing.assert_close(cut[1], (whole(gradient(128, 128))[0] + 1) * 127.5)
    assert cut[2, 0].max() - cut[2, 0].min() < 4


def test_whole_images_are_downsampled_by_averaging():
    torch.manual_seed(0)
    images = torch.randint(256, (2, 2 * SIZE, 2 * SIZE, 3), dtype=torch.uint8)
    expected = torch.nn.functional.avg_pool2d(pixel(images.permute(0, 3, 1, 2).float()), 2)
    torch.testing.assert_close(whole(images), expected, atol=1e-4, rtol=0)


def test_half_of_a_batch_is_whole_images_of_one_object(data, small):
    buffer = Buffer(NAMES.own)
    batch = Compositor(data, NAMES).sample(32, generator())
    buffer.add(batch)
    x, y = buffer.sample(40, generator())
    assert x.shape == (40, 3, SIZE, SIZE)
    assert x.abs().max() <= 1
    assert y.shape == (40,)
    alone = {NAMES.own.index(objects[0]) for objects in batch.objects if len(objects) == 1}
    assert set(y[:20].tolist()) <= alone
    again = buffer.sample(40, generator())
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])


def test_the_buffer_drops_the_oldest_chunk(data, small, monkeypatch):
    monkeypatch.setattr(module, "CHUNKS", 2)
    buffer, compositor = Buffer(NAMES.own), Compositor(data, NAMES)
    chunks = [compositor.sample(8, generator(k)) for k in range(3)]
    for chunk in chunks:
        buffer.add(chunk)
    assert [kept[0] is chunk.images for kept, chunk in zip(buffer.chunks, chunks[1:], strict=True)] == [True, True]


def test_saving_and_loading_keeps_the_classifier(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(NAMES.own).eval()
    classifier.save(tmp_path / "c.safetensors")
    loaded = Classifier.load(tmp_path / "c.safetensors")
    x = torch.randn(70, 3, SIZE, SIZE).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), loaded(x))
    assert loaded.names == NAMES.own
    assert not loaded.training
    assert len(loaded.classify(x)) == 70
    assert set(loaded.classify(x)) <= set(NAMES.own)


def test_training_learns_and_resumes(data, small, tmp_path):
    out = tmp_path / "c.safetensors"
    settings = dataclasses.replace(module.SETTINGS, batch_size=16, warmup_steps=5, ema_decay=0.9)
    train(data, out, Budget(steps=4), names=NAMES, settings=settings, num_eval=16)
    _, figures = train(data, out, Budget(steps=60), names=NAMES, settings=settings, num_eval=96)
    rows = [json.loads(line) for line in (tmp_path / "c-training" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row][:2] == [4, 20]
    chairs = 1 / 6  # their held-out views have a colour that training never shows
    assert figures["whole"] > 0.95 - 1.5 * chairs
    assert figures["crops"] > 0.9 - 1.5 * chairs
    assert accuracy(Classifier.load(out), Compositor(data, NAMES, held_out=True), 96) == figures
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["names"]) == list(NAMES.own)
