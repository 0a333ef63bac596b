import hashlib

import numpy as np
import pytest

from synthgen import api, codecs
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, StaleArtifact, UnitsFailed
from synthgen.records import Maps
from synthgen.stages.masks import Masks, scores
from tests.factories import make_generation, make_run


def sums(run):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.folder("masks").glob("*.tar"))]


def iou(found, truth):
    return (found & truth).sum() / max((found | truth).sum(), 1)


@pytest.mark.parametrize("refine", ["threshold", "attentioncut"])
def test_masks_find_the_drawn_shapes(tmp_path, refine):
    run = make_run(tmp_path / "r", masks=False)
    summary = api.masks(run, engine=Local(workers=1), refine=Choice(refine))
    assert summary.samples == 12
    found = []
    for generation, masks in api.samples(run):
        words = generation.request.prompt.words
        _, truth = make_generation(words=words, seed=generation.request.seed)
        assert masks.words == words
        assert masks.values.shape == truth.shape
        assert masks.values.sum(0).max() <= 1
        assert (masks.scores > 0.3).all()
        found += [iou(one, other) for one, other in zip(masks.values, truth, strict=True)]
    assert np.mean(found) > {"threshold": 0.75, "attentioncut": 0.93}[refine]


def test_workers_change_no_byte(tmp_path):
    one = make_run(tmp_path / "one", masks=False)
    two = make_run(tmp_path / "two", masks=False)
    api.masks(one, engine=Local(workers=1), refine=Choice("attentioncut"))
    api.masks(two, engine=Local(workers=2), refine=Choice("attentioncut"))
    assert sums(one) == sums(two)


def test_another_refiner_over_old_masks_is_refused(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    api.masks(run, engine=Local(workers=1))
    before = sums(run)
    with pytest.raises(StaleArtifact, match="refine is"):
        api.masks(run, engine=Local(workers=1), refine=Choice("attentioncut"))
    assert sums(run) == before


def test_masks_that_are_too_small_or_too_large_are_dropped_with_the_reason():
    generation, truth = make_generation(words=("disc", "square"))
    values = truth.copy()
    values[0] = False
    values[0, 0, 0] = True
    values[1] = True
    kept = Masks().keep(values, generation.maps)
    assert "less than 0.50%" in kept.dropped[0]
    assert "more than 80.00%" in kept.dropped[1]
    assert not kept.values.any()
    assert (kept.scores == 0).all()
    values[:] = False
    assert Masks().keep(values, generation.maps).dropped == ("is empty", "is empty")


def test_score_by_hand():
    weights = np.zeros((1, 2, 2), np.float16)
    weights[0, 0] = 0.5, 0.25
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :2] = True
    maps = Maps(("x",), weights, np.zeros((12, 2, 2), np.float16))
    np.testing.assert_allclose(scores(mask, maps), [0.75], rtol=1e-6)  # inside (1 + 0.5) / 2, outside 0


def test_a_sample_that_lost_its_maps_fails_its_unit_and_says_which(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    from synthgen.stores.tar import TarWriter

    with TarWriter(run.tar("maps", 1)) as tar:
        for key, members in list(run.read("maps", 0)):
            tar.add(key, members)
    with pytest.raises(UnitsFailed, match="hold different samples") as caught:
        api.masks(run, engine=Local(workers=1))
    assert "1 of 2 units failed; unit 000001" in str(caught.value)
    assert run.mark("masks", 0) is not None


def test_bad_settings(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    with pytest.raises(ConfigError, match="min_area and max_area"):
        api.masks(run, min_area=0.9, max_area=0.2)
    with pytest.raises(ConfigError, match="smoothnes"):
        api.masks(run, refine=Choice("attentioncut", {"smoothnes": 1.0}))


def test_masks_survive_their_codec():
    generation, truth = make_generation(words=("disc", "square"))
    kept = Masks().keep(truth, generation.maps)
    back = codecs.decode_masks("k", codecs.encode_masks(kept))
    assert back.words == kept.words
    np.testing.assert_array_equal(back.values, kept.values)
    np.testing.assert_array_equal(back.scores, kept.scores)
