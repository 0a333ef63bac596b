"""The controls: masks that keep their area and lose their place."""

import numpy as np
import pytest

from synthgen.datasets import open_dataset
from synthgen.mask_controls import CONTROLS, WithChangedMasks, moved, scattered
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.shards import Shards
from tests.factories import make_run


def test_areas_stay_and_places_change() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[4:14, 6:26], labels[10:16, 20:30] = 1, 2
    for key in ("0000000001", "0000000002", "0000070003"):
        there = moved(labels, key)
        assert np.array_equal(np.bincount(there.ravel()), np.bincount(labels.ravel()))
        assert not ((labels > 0) & (there > 0)).any()  # a quarter of either side is more than their height
        assert np.array_equal(there, moved(labels, key))
    assert not np.array_equal(moved(labels, "0000000001"), moved(labels, "0000000002"))


def test_scattered_pixels_have_no_place() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:32, :32], labels[40:56, 8:24] = 1, 2
    there = scattered(labels, "0000000001")
    assert np.array_equal(np.bincount(there.ravel()), np.bincount(labels.ravel()))
    quarters = (there == 1).reshape(2, 32, 2, 32).mean(axis=(1, 3))
    assert np.abs(quarters - 0.25).max() < 0.06  # one in four everywhere: three standard deviations are 0.04
    assert np.array_equal(there, scattered(labels, "0000000001"))
    assert not np.array_equal(there, scattered(labels, "0000000002"))


@pytest.mark.parametrize("masks", sorted(CONTROLS))
def test_samples_are_the_same_but_for_their_masks(tmp_path, masks) -> None:
    run: Run = make_run(tmp_path / "run", units=1, unit_size=6, image_size=32)
    run_stage(Shards(val_ratio=0.0), run, "local")
    samples = open_dataset(run.folder("shards") / "train")
    control = WithChangedMasks(samples, CONTROLS[masks])
    assert len(control) == len(samples)
    assert control.has_masks()
    for number in range(len(samples)):
        own, other = samples[number], control[number]
        assert (own.key, own.text, own.words, own.label) == (other.key, other.text, other.words, other.label)
        assert (own.key, own.label) == (control.key(number), control.label(number))
        assert samples.captions(number) == control.captions(number)
        assert np.array_equal(own.image, other.image)
        assert np.array_equal(
            np.bincount(own.label_map.ravel(), minlength=4), np.bincount(other.label_map.ravel(), minlength=4)
        )
        assert not np.array_equal(own.label_map, other.label_map)
    bare = open_dataset(run.folder("shards") / "train", masks=False)
    assert WithChangedMasks(bare, CONTROLS[masks])[0].label_map is None
