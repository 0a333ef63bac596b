import numpy as np
import pytest
import torch

from synthgen.tiny import IMAGE_SIZE
from synthgen.tiny.compositor import LAYOUTS, MAX_OBJECTS, SCENES, Compositor, Names, article
from synthgen.tiny.paint import COLOURS
from tests.tiny_data import BLUE, CYAN, NAMES, PAINTS, ROWS, make_data


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compositor(data):
    return Compositor(data, NAMES)


@pytest.fixture(scope="module")
def batch(compositor):
    return compositor.draw(160, generator())


def centre(mask):
    """Column and row of the middle of a mask."""
    y, x = torch.nonzero(mask, as_tuple=True)
    return float(x.float().mean()), float(y.float().mean())


def whole(mask):
    """Whether nothing hides a part of a disc: it fills as much of its box as a disc does."""
    y, x = torch.nonzero(mask, as_tuple=True)
    height, width = (int(axis.max() - axis.min()) + 1 for axis in (y, x))
    return abs(len(x) / (np.pi / 4 * height * width) - 1) < 0.04


def seen_colour(image, mask):
    """The middle colour of what a mask covers, its strongest channel 1."""
    colour = image[mask].float().median(dim=0).values
    return (colour / colour.max()).tolist()


def test_shapes_and_types(batch):
    assert batch.images.shape == (160, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.masks.shape == (160, MAX_OBJECTS, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.masks.dtype == torch.bool
    lengths = {len(rows) for rows in (batch.captions, batch.words, batch.spans, batch.objects)}
    assert lengths == {160}
    assert {len(words) for words in batch.words} == {1, 2, 3}


def test_masks_are_of_what_is_seen(batch):
    """Discs are of saturated colours and backgrounds grey, so saturation tells what is an object."""
    light = batch.images.float() / 255
    saturation = light.amax(3) - light.amin(3)
    anything = batch.masks.any(dim=1)
    assert int(batch.masks.sum(dim=1).max()) == 1  # no pixel belongs to two words
    assert float((saturation[~anything] < 0.5).float().mean()) > 0.999  # edges are half object, half background
    assert float((saturation[anything] > 0.2).float().mean()) > 0.999
    assert float(((saturation > 0.3) == anything).float().mean()) > 0.99


def test_each_mask_is_of_its_own_object(batch):
    colours = {}
    for number, colour, paint, held_out in ROWS:
        if paint < 0 and not held_out:
            colours[NAMES.own[number]] = np.array(colour) / max(colour)
    for i, objects in enumerate(batch.objects):
        assert not batch.masks[i, len(objects) :].any()
        for mask, name, (start, _) in zip(batch.masks[i], objects, batch.spans[i], strict=False):
            if not batch.captions[i][:start].rstrip().endswith(PAINTS):
                np.testing.assert_allclose(seen_colour(batch.images[i], mask), colours[name], atol=0.05)


def test_spans_point_at_the_words_which_name_the_objects(batch):
    called = set()
    for caption, words, spans, objects in zip(batch.captions, batch.words, batch.spans, batch.objects, strict=True):
        assert len(words) == len(spans) == len(objects) == len(set(objects))
        assert list(spans) == sorted(spans)
        for word, (start, stop), name in zip(words, spans, objects, strict=True):
            assert caption[start:stop] == word
            assert word == name or word in NAMES.aliases[NAMES.own.index(name)]
            before = caption[:start].split()
            assert before[-1] in ("a", "an") or (before[-1] in COLOURS and before[-2] in ("a", "an"))
            called.add(word)
    assert called >= {*NAMES.own, "beach ball", "taxi"}


def test_painted_objects_are_called_by_their_colour_and_others_by_none(batch):
    found = set()
    for image, caption, spans, objects, masks in zip(
        batch.images, batch.captions, batch.spans, batch.objects, batch.masks, strict=True
    ):
        for (start, _), name, mask in zip(spans, objects, masks, strict=False):
            colour = caption[:start].split()[-1]
            if colour in COLOURS:
                assert name == "car"
                target = np.array(COLOURS[colour])
                np.testing.assert_allclose(seen_colour(image, mask), target / target.max(), atol=0.05)
                found.add(colour)
    assert found == set(PAINTS)


def test_what_captions_say_of_places_is_true(compositor):
    said = set()
    for layout in LAYOUTS[1:]:
        batch = compositor.draw(48, generator(1), [layout])
        for caption, spans, masks in zip(batch.captions, batch.spans, batch.masks, strict=True):
            relation = caption[spans[0][1] : spans[1][0]].removesuffix("an ").removesuffix("a ").strip()
            for colour in COLOURS:
                relation = relation.removesuffix(colour).strip()
            relation = relation.removesuffix(" an").removesuffix(" a")
            said.add(relation)
            (x, y), (other_x, other_y) = centre(masks[0]), centre(masks[1])
            if relation in ("and", "next to", "to the left of", ","):
                assert x < other_x
                assert len(spans) == 2 or other_x < centre(masks[2])[0]
            elif relation == "to the right of":
                assert x > other_x
            elif relation == "above":
                assert y < other_y
            elif relation == "below":
                assert y > other_y
            else:
                front, back = masks[:2] if relation == "in front of" else masks[:2].flip(0)
                assert whole(front)
                assert not whole(back)
    relations = {"and", "next to", "to the left of", "to the right of", ",", "above", "below", "in front of", "behind"}
    assert said == relations


def test_every_word_is_seen(batch):
    for masks, words in zip(batch.masks, batch.words, strict=True):
        assert float(masks[: len(words)].float().mean(dim=(1, 2)).min()) > 0.01


def test_captions_name_the_scene_that_is_shown(tmp_path):
    black = torch.zeros(8, 16, 3, dtype=torch.uint8)
    batch = Compositor(make_data(tmp_path, panoramas={"forest": black}), NAMES).draw(256, generator())
    named = 0
    for caption, image, masks in zip(batch.captions, batch.images, batch.masks, strict=True):
        scenes = [scene for scene, phrase in SCENES.items() if caption.endswith(f" {phrase}")]
        assert len(scenes) <= 1
        corner = image[~masks.any(dim=0)].float().median()
        if scenes:
            assert (scenes == ["forest"]) == bool(corner == 0)
            named += 1
    assert 80 < named < 176


def test_the_same_generator_gives_the_same_batch(data, compositor):
    one, other = compositor.draw(8, generator(3)), Compositor(data, NAMES).draw(8, generator(3))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.masks, other.masks)
    assert (one.captions, one.words, one.spans) == (other.captions, other.words, other.spans)
    assert not torch.equal(one.images, compositor.draw(8, generator(4)).images)


def test_the_first_of_a_batch(batch):
    few = batch.first(5)
    assert torch.equal(few.images, batch.images[:5])
    assert torch.equal(few.masks, batch.masks[:5])
    assert few.captions == batch.captions[:5]
    assert few.objects == batch.objects[:5]


def test_held_out_backgrounds_share_no_pixel_with_those_of_training(tmp_path):
    """Panoramas are white within 38.3° of their seam and black elsewhere; nothing stands in front."""
    azimuth = (torch.arange(2048) + 0.5) / 2048 * 360
    seam = torch.minimum(azimuth, 360 - azimuth) < 38.3
    panorama = (seam[None, :, None] * torch.full((64, 1, 3), 255)).to(torch.uint8)
    data = make_data(tmp_path, opacity=0, panoramas=dict.fromkeys(SCENES, panorama))
    training = Compositor(data, NAMES).draw(192, generator()).images
    held_out = Compositor(data, NAMES, held_out=True).draw(192, generator()).images
    assert int(training.max()) == 0
    assert int(held_out.min()) >= int(0.85 * 255)


def test_held_out_views_are_not_drawn_in_training_nor_the_others_held_out(data):
    for held_out, colour in ((False, CYAN), (True, BLUE)):
        batch = Compositor(data, NAMES, held_out=held_out).draw(96, generator(), LAYOUTS[:1])
        chairs = [i for i, objects in enumerate(batch.objects) if objects == ("chair",)]
        assert chairs
        for i in chairs:
            np.testing.assert_allclose(seen_colour(batch.images[i], batch.masks[i, 0]), colour, atol=0.05)
        assert {name for objects in batch.objects for name in objects} == set(NAMES.own)


def test_an_object_without_a_drawing_is_never_drawn(data):
    names = Names((*NAMES.own, "ghost"), (*NAMES.aliases, ()))
    batch = Compositor(data, names).draw(96, generator())
    assert not any("ghost" in objects for objects in batch.objects)


def test_articles_go_by_sound():
    words = ("apple", "hourglass", "unicycle", "umbrella", "ukulele", "boat", "one-eyed cat", "orange cup")
    assert [article(word).split()[0] for word in words] == ["an", "an", "a", "an", "a", "a", "a", "an"]


def test_familiar_names_and_those_with_more_aliases_are_drawn_more_often():
    apple, ball, car, _, egg, _ = NAMES.weights().tolist()  # an apple and a car are familiar
    assert float(NAMES.weights().sum()) == pytest.approx(1)
    assert egg < ball < 2 * egg
    assert apple == pytest.approx(3 * egg)
    assert apple < car < 2 * apple


def test_the_names_of_the_package_have_one_meaning_each():
    names = Names.load()
    everything = [*names.own, *(alias for aliases in names.aliases for alias in aliases)]
    assert len(set(everything)) == len(everything)
