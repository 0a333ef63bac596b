import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from synthgen.stores.tar import read_tar
from synthgen.tiny import compositor as composing
from synthgen.tiny import truth
from synthgen.tiny.compositor import Names
from tests.tiny_data import NAMES, make_data


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(composing, "IMAGE_SIZE", 32)
    monkeypatch.setattr(Names, "load", classmethod(lambda cls: NAMES))
    monkeypatch.setattr(truth, "BATCH_SIZE", 4)
    return make_data(tmp_path / "data")


def test_a_longer_set_starts_with_the_shorter_one(data):
    short, long = (list(truth.held_out(data, num)) for num in (6, 9))
    assert [len(batch.captions) for batch in short] == [4, 2]
    assert [len(batch.captions) for batch in long] == [4, 4, 1]
    assert torch.equal(short[1].images, long[1].images[:2])
    assert not torch.equal(long[0].images, long[1].images)


def test_the_tar_holds_captions_words_and_exact_masks(data, tmp_path):
    path = truth.write_truth(data, tmp_path / "truth", 6)
    (first, second) = truth.held_out(data, 6)
    samples = list(read_tar(path))
    assert [key for key, _ in samples] == [f"{row:09d}" for row in range(6)]
    for row, (_, members) in enumerate(samples):
        batch, i = (first, row) if row < 4 else (second, row - 4)
        assert members["txt"].decode() == batch.captions[i]
        assert json.loads(members["json"]) == {"words": list(batch.words[i]), "objects": list(batch.objects[i])}
        labels = np.asarray(Image.open(io.BytesIO(members["mask.png"])))
        for number, mask in enumerate(batch.masks[i].numpy(), start=1):
            assert np.array_equal(labels == number, mask)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["png"]))), batch.images[i].numpy())
    assert truth.write_truth(data, tmp_path / "again", 6).read_bytes() == path.read_bytes()
