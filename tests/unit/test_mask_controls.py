"""Controls: masks keep their area and lose their location."""

import numpy as np
import pytest

from synthgen.datasets import open_dataset
from synthgen.mask_controls import CONTROLS, WithChangedMasks, shift_masks, shuffle_pixels
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.shards import Shards
from tests.factories import make_run


def test_shifted_masks_keep_their_area_and_change_location() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[4:14, 6:26], labels[10:16, 20:30] = 1, 2
    for key in ("0000000001", "0000000002", "0000070003"):
        there = shift_masks(labels, key)
        assert np.array_equal(np.bincount(there.ravel()), np.bincount(labels.ravel()))
        assert not ((labels > 0) & (there > 0)).any()  # a quarter of either side is more than their height
        assert np.array_equal(there, shift_masks(labels, key))
    assert not np.array_equal(shift_masks(labels, "0000000001"), shift_masks(labels, "0000000002"))


def test_shuffled_pixels_are_spread_evenly() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:32, :32], labels[40:56, 8:24] = 1, 2
    there = shuffle_pixels(labels, "0000000001")
    assert np.array_equal(np.bincount(there.ravel()), np.bincount(labels.ravel()))
    quarters = (there == 1).reshape(2, 32, 2, 32).mean(axis=(1, 3))
    assert np.abs(quarters - 0.25).max() < 0.06  # one in four everywhere: three standard deviations are 0.04
    assert np.array_equal(there, shuffle_pixels(labels, "0000000001"))
    assert not np.array_equal(there, shuffle_pixels(labels, "0000000002"))


@pytest.mark.parametrize("masks", sorted(CONTROLS))
def test_samples_differ_in_their_masks_only(tmp_path, masks) -> None:
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
