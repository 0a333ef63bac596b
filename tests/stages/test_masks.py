import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from synthgen import api, codecs
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, StaleArtifact, UnitsFailed
from synthgen.mask_shape import describe_masks
from synthgen.records import Maps, Prompt, WordMasks
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.refiners.threshold import Threshold
from synthgen.stages.masks import Masks
from synthgen.status import Tally, status
from tests.factories import WORDS, make_generation, make_run


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


def test_units_without_maps_are_named(tmp_path, caplog):
    run = make_run(tmp_path / "r", masks=False)
    run.tar("maps", 1).with_suffix(".json").unlink()  # killed between the two marks
    assert api.masks(run, engine=Local(workers=1)).units == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        f"1 of 2 units of {run.path} have images without maps, and get no masks (first: 000001); "
        f"run: {run.remedy('images')} and then this command again"
    )


@pytest.mark.parametrize("artifact", ["images", "maps"])
def test_no_masks_are_made_of_units_with_different_settings(tmp_path, artifact):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar(artifact, 1).with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    with pytest.raises(StaleArtifact, match=f"1 of 2 units of {run.folder(artifact)} were made with other settings"):
        api.masks(run, engine=Local(workers=1))
    assert not run.folder("masks").exists()


def test_masks_too_large_to_be_read_back_are_refused():
    words = tuple(f"w{number}" for number in range(45))
    generation, _ = make_generation(key="0000120003")
    request = replace(generation.request, prompt=Prompt(" ".join(words), words))
    image = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (4000, 6000, 3))  # 24 million pixels in three bytes
    maps = Maps(words, np.zeros((45, 4, 4), np.float16), np.zeros((12, 4, 4), np.float16))
    told = "45 masks of 6000 x 4000 pixels are more than are read; .* a lower max_side.* or mark fewer words$"
    with pytest.raises(ConfigError, match=f"^sample 0000120003: {told}"):
        Masks().mask(None, None, replace(generation, request=request, image=image, maps=maps))
    values = np.broadcast_to(np.zeros((1, 1, 1), bool), (45, 4000, 6000))
    with pytest.raises(ConfigError, match=f"^{told}"):
        codecs.encode_masks(WordMasks(words, values, np.zeros(45, np.float32)))
    with pytest.raises(ValueError, match=r"45 masks of 6000 x 4000 pixels are more than are read$"):
        codecs.labels_to_masks(np.broadcast_to(np.uint8(0), (4000, 6000)), 45)
    codecs.check_masks(44, (4000, 6000))
    with pytest.raises(ConfigError, match="256 masks of 8 x 8 pixels"):
        codecs.check_masks(256, (8, 8))


def test_masks_that_are_too_small_or_too_large_are_dropped_with_the_reason():
    generation, truth = make_generation(words=("disc", "square"))
    values = truth.copy()
    values[0] = False
    values[0, 0, 0] = True
    values[1] = True
    kept = Masks().keep(values, generation.maps)
    assert kept.dropped[0] == "too small: covers 0.02% of the image, less than 0.50%"
    assert kept.dropped[1] == "too large: covers 100.00% of the image, more than 80.00%"
    assert not kept.values.any()
    assert (kept.scores == 0).all()
    assert (kept.confidence == 0).all()
    values[:] = False
    assert Masks().keep(values, generation.maps).dropped == ("empty: no pixel is the word's",) * 2


def test_min_confidence_drops_masks():
    generation, truth = make_generation(seed=3)
    beside = np.roll(truth, 24, axis=2)
    kept = Masks().keep(beside, generation.maps)
    assert kept.dropped == ("",)
    assert 0 < kept.confidence[0] < 0.6
    unsure = Masks(min_confidence=0.6).keep(beside, generation.maps)
    assert unsure.dropped == (f"unsure: has a confidence of {kept.confidence[0]:.2f}, less than 0.60",)
    assert not unsure.values.any()
    assert (unsure.scores[0], unsure.confidence[0]) == (0, 0)
    assert Masks(min_confidence=0.6).keep(truth, generation.maps).dropped == ("",)


def broken(weights, how):
    """A map of a good word, spoiled."""
    spoiled = np.array(weights, np.float16)
    if how == "nan":
        spoiled[3, 4] = np.nan
    elif how == "infinity":
        spoiled[0, 0] = np.inf
    elif how == "all equal":
        spoiled[:] = 0.25
    elif how == "noise of rounding":
        spoiled[:] = 0.25
        spoiled[::2] += np.float16(0.0002)
    elif how == "nowhere":
        spoiled[:] = 0
    elif how == "one hot cell":
        spoiled[:] = 0.01
        spoiled[5, 5] = 0.9
    return spoiled


REASONS = {
    "nan": "broken map: it holds NaN or infinity",
    "infinity": "broken map: it holds NaN or infinity",
    "all equal": "flat map: it varies by 0.00% of its peak, no more than 5.00%",
    "noise of rounding": "flat map: it varies by 0.10% of its peak, no more than 5.00%",
    "nowhere": "no attention: the map is 0 everywhere",
    "one hot cell": "single cell: one holds 100.00% of the attention, more than 50.00%",
}


@pytest.mark.parametrize("refiner", [Threshold(), AttentionCut()])
@pytest.mark.parametrize("how", REASONS)
def test_an_unusable_map_drops_only_its_own_mask(how, refiner):
    generation, _ = make_generation(words=("disc", "square"))
    maps = generation.maps
    good = Masks().mask(refiner, Threshold(), alone(generation, 1))
    spoiled = replace(maps, weights=np.stack([broken(maps.weights[0], how), maps.weights[1]]))
    found = Masks().mask(refiner, Threshold(), replace(generation, maps=spoiled))
    assert found.dropped == (REASONS[how], "")
    assert not found.values[0].any()
    assert np.array_equal(found.values[1], good.values[0])
    for name in ("scores", "confidence", "sharpness", "disagreement"):
        assert getattr(found, name)[0] == 0
        assert getattr(found, name)[1] == getattr(good, name)[0]
        assert np.isfinite(getattr(found, name)).all()
    both = replace(maps, weights=np.stack([broken(one, how) for one in maps.weights]))
    assert Masks().mask(refiner, Threshold(), replace(generation, maps=both)).dropped == (REASONS[how],) * 2


def alone(generation, index):
    """The same sample with one of its words."""
    maps = generation.maps
    words, weights = maps.words[index : index + 1], maps.weights[index : index + 1]
    return replace(generation, maps=Maps(words, weights, maps.affinity))


def test_broken_affinity_empty_maps_and_no_words_are_handled():
    generation, _ = make_generation(words=("disc", "square"))
    affinity = generation.maps.affinity.copy()
    affinity[2, 3, 3] = np.nan
    stage, refiner = Masks(), AttentionCut()
    found = stage.mask(refiner, Threshold(), replace(generation, maps=replace(generation.maps, affinity=affinity)))
    assert found.dropped == ("broken map: the self-attention holds NaN or infinity",) * 2
    none = Maps(("disc",), np.zeros((1, 0, 0), np.float16), np.zeros((12, 0, 0), np.float16))
    assert stage.mask(refiner, Threshold(), replace(generation, maps=none)).dropped == ("broken map: it has no cells",)
    wordless = Maps((), np.zeros((0, 16, 16), np.float16), generation.maps.affinity)
    found = stage.mask(refiner, Threshold(), replace(generation, maps=wordless))
    assert (found.dropped, found.values.shape) == ((), (0, 64, 64))


def test_the_bounds_of_maps_are_settings():
    generation, _ = make_generation()
    soft = replace(generation, maps=replace(generation.maps, weights=generation.maps.weights / 4 + np.float16(0.5)))
    assert Masks().mask(Threshold(), Threshold(), soft).dropped == ("",)
    (reason,) = Masks(min_contrast=0.5).mask(Threshold(), Threshold(), soft).dropped
    assert reason.startswith("flat map: it varies by ")
    (reason,) = Masks(max_peak=0.01).mask(Threshold(), Threshold(), generation).dropped
    assert reason.startswith("single cell: one holds ")


def test_dropped_masks_and_cut_off_words_are_counted(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    spoil = iter(REASONS)
    with rewritten(run, "maps") as maps, rewritten(run, "images") as images:
        for (key, members), (_, picture) in zip(run.read("maps", 0), run.read("images", 0), strict=True):
            about = json.loads(picture["json"])
            decoded = codecs.decode_maps(key, members, tuple(about["words"]))
            weights = np.stack([broken(decoded.weights[0], next(spoil)), *decoded.weights[1:]])
            maps.add(key, codecs.encode_maps(replace(decoded, weights=weights)))
            about["words_cut_off"] = ["hat"]
            images.add(key, picture | {"json": json.dumps(about).encode()})
    summary = api.masks(run, engine=Local(workers=1), refine=Choice("attentioncut"))
    assert summary.samples == 12
    state = status(run)
    kinds = {"broken map": 2, "flat map": 2, "no attention": 1, "single cell": 1}
    assert (state.dropped, state.words_cut_off) == (kinds, 6)
    by_word = {tally.name: tally for tally in state.words}
    assert by_word["hat"] == Tally("hat", samples=6, cut_off=6)
    assert sum(tally.masks for tally in state.words) == 16 - 6
    notes = next(one.notes for one in state.artifacts if one.name == "masks")
    assert notes == {"masks": 10, "dropped": 6, "words cut off": 6}
    assert (state.plain()["dropped"], state.plain()["words_cut_off"]) == (kinds, 6)
    json.dumps(state.plain(), allow_nan=False)


def rewritten(run, artifact):
    run.tar(artifact, 0).with_suffix(".json").unlink()
    return run.write(artifact, 0)


@pytest.mark.parametrize("size", [(300, 200), (512, 512), (1000, 333)])
def test_masks_of_large_images_do_not_disagree_with_themselves(size):
    """They are compared at some of their pixels, which have to be the same ones."""
    generation, _ = make_generation(seed=1)
    large = replace(generation, image=np.zeros((*size, 3), np.uint8))
    found = Masks(min_area=0.0).mask(Threshold(), Threshold(), large)
    assert found.values.any()
    assert found.disagreement == [0]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (np.zeros((1, 8, 8), bool), r"returned bool \(1, 8, 8\); its contract is bool \(2, 64, 64\)"),
        (np.zeros((2, 64, 64), np.uint8), r"returned uint8 \(2, 64, 64\)"),
        ([], "returned list"),
        (np.ones((2, 64, 64), bool), "gave a pixel to two words"),
    ],
)
def test_the_result_of_a_refiner_is_checked(returned, says):
    generation, _ = make_generation(size=64, words=("disc", "square"))
    with pytest.raises(ConfigError, match=f"^the refiner SimpleNamespace {says}"):
        Masks().mask(SimpleNamespace(refine=lambda image, maps: returned), Threshold(), generation)


def test_only_cut_masks_disagree_with_the_threshold():
    generation, _ = make_generation(seed=1)
    stage = Masks()
    assert stage.mask(Threshold(), Threshold(), generation).disagreement == [0]
    cut = stage.mask(AttentionCut(), Threshold(), generation)
    plain = Threshold().refine(generation.image, generation.maps)
    assert cut.disagreement == pytest.approx(1 - iou(cut.values, plain), abs=1e-6)
    assert 0 < cut.disagreement < 0.5


def test_a_sample_without_maps_fails_its_unit_by_name(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    from synthgen.stores.tar import TarWriter

    with TarWriter(run.tar("maps", 1)) as tar:
        for key, members in list(run.read("maps", 0)):
            tar.add(key, members)
    mark = run.tar("maps", 1).with_suffix(".json")
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"sha256": tar.sha256, "bytes": tar.size}))
    with pytest.raises(UnitsFailed, match="hold different samples") as caught:
        api.masks(run, engine=Local(workers=1))
    assert "1 of 2 units failed; unit 000001" in str(caught.value)
    assert run.mark("masks", 0) is not None


def test_wrong_settings_are_refused_by_name(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    with pytest.raises(ConfigError, match="min_area and max_area"):
        api.masks(run, min_area=0.9, max_area=0.2)
    with pytest.raises(ConfigError, match="smoothnes"):
        api.masks(run, refine=Choice("attentioncut", {"smoothnes": 1.0}))


@pytest.mark.parametrize(
    "settings", [{"min_contrast": 1.0}, {"min_contrast": -0.1}, {"max_peak": 0.0}, {"min_confidence": 1.0}]
)
def test_invalid_bounds_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Masks(**settings)


def test_masks_survive_their_codec():
    generation, _ = make_generation(words=WORDS)
    found = Masks().mask(Threshold(), Threshold(), generation)
    members = codecs.encode_masks(found)
    back = codecs.decode_masks("k", members)
    assert (back.words, back.dropped) == (found.words, found.dropped)
    for name in ("values", "scores", "confidence", "sharpness", "disagreement"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
    assert json.loads(members["json"])["masks"] == describe_masks(found)


def test_masks_that_were_not_measured_survive_their_codec():
    generation, truth = make_generation(words=WORDS)
    kept = replace(Masks().keep(truth, generation.maps), confidence=None)
    back = codecs.decode_masks("k", codecs.encode_masks(kept))
    np.testing.assert_array_equal(back.values, truth)
    assert (back.confidence, back.sharpness, back.disagreement) == (None, None, None)
    assert [mask["confidence"] for mask in describe_masks(back)] == [-1.0, -1.0]
    assert [mask["score"] for mask in describe_masks(back)] == pytest.approx(kept.scores, abs=1e-6)
