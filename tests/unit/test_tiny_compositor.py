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
    return compositor.sample(160, generator())


def centre(mask):
    """Mean column and row of a mask."""
    y, x = torch.nonzero(mask, as_tuple=True)
    return float(x.float().mean()), float(y.float().mean())


def is_whole_disc(mask):
    """Whether a mask fills as much of its bounding box as a disc that nothing occludes."""
    y, x = torch.nonzero(mask, as_tuple=True)
    height, width = (int(axis.max() - axis.min()) + 1 for axis in (y, x))
    return abs(len(x) / (np.pi / 4 * height * width) - 1) < 0.04


def median_colour(image, mask):
    """The median colour inside a mask, scaled so that its strongest channel is 1."""
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


def test_masks_cover_the_visible_parts_of_objects(batch):
    """Discs have saturated colours and backgrounds are grey, so saturation separates them."""
    light = batch.images.float() / 255
    saturation = light.amax(3) - light.amin(3)
    anything = batch.masks.any(dim=1)
    assert int(batch.masks.sum(dim=1).max()) == 1  # no pixel belongs to two words
    assert float((saturation[~anything] < 0.5).float().mean()) > 0.999  # pixels on an edge are mixed
    assert float((saturation[anything] > 0.2).float().mean()) > 0.999
    assert float(((saturation > 0.3) == anything).float().mean()) > 0.99


def test_each_mask_belongs_to_its_object(batch):
    colours = {}
    for number, colour, paint, held_out in ROWS:
        if paint < 0 and not held_out:
            colours[NAMES.own[number]] = np.array(colour) / max(colour)
    for i, objects in enumerate(batch.objects):
        assert not batch.masks[i, len(objects) :].any()
        for mask, name, (start, _) in zip(batch.masks[i], objects, batch.spans[i], strict=False):
            if not batch.captions[i][:start].rstrip().endswith(PAINTS):
                np.testing.assert_allclose(median_colour(batch.images[i], mask), colours[name], atol=0.05)


def test_spans_locate_the_words_that_name_the_objects(batch):
    used = set()
    for caption, words, spans, objects in zip(batch.captions, batch.words, batch.spans, batch.objects, strict=True):
        assert len(words) == len(spans) == len(objects) == len(set(objects))
        assert list(spans) == sorted(spans)
        for word, (start, stop), name in zip(words, spans, objects, strict=True):
            assert caption[start:stop] == word
            assert word == name or word in NAMES.aliases[NAMES.own.index(name)]
            before = caption[:start].split()
            assert before[-1] in ("a", "an") or (before[-1] in COLOURS and before[-2] in ("a", "an"))
            used.add(word)
    assert used >= {*NAMES.own, "beach ball", "taxi"}


def test_captions_name_the_colour_of_painted_objects_only(batch):
    found = set()
    for image, caption, spans, objects, masks in zip(
        batch.images, batch.captions, batch.spans, batch.objects, batch.masks, strict=True
    ):
        for (start, _), name, mask in zip(spans, objects, masks, strict=False):
            colour = caption[:start].split()[-1]
            if colour in COLOURS:
                assert name == "car"
                target = np.array(COLOURS[colour])
                np.testing.assert_allclose(median_colour(image, mask), target / target.max(), atol=0.05)
                found.add(colour)
    assert found == set(PAINTS)


def test_captions_describe_the_arrangement(compositor):
    relations = set()
    for layout in LAYOUTS[1:]:
        batch = compositor.sample(48, generator(1), [layout])
        for caption, spans, masks in zip(batch.captions, batch.spans, batch.masks, strict=True):
            relation = caption[spans[0][1] : spans[1][0]].removesuffix("an ").removesuffix("a ").strip()
            for colour in COLOURS:
                relation = relation.removesuffix(colour).strip()
            relation = relation.removesuffix(" an").removesuffix(" a")
            relations.add(relation)
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
                assert is_whole_disc(front)
                assert not is_whole_disc(back)
    expected = {"and", "next to", "to the left of", "to the right of", ",", "above", "below", "in front of", "behind"}
    assert relations == expected


def test_every_object_is_visible(batch):
    for masks, words in zip(batch.masks, batch.words, strict=True):
        assert float(masks[: len(words)].float().mean(dim=(1, 2)).min()) > 0.01


def test_captions_name_the_scene_in_the_background(tmp_path):
    black = torch.zeros(8, 16, 3, dtype=torch.uint8)
    batch = Compositor(make_data(tmp_path, panoramas={"forest": black}), NAMES).sample(256, generator())
    count = 0
    for caption, image, masks in zip(batch.captions, batch.images, batch.masks, strict=True):
        scenes = [scene for scene, phrase in SCENES.items() if caption.endswith(f" {phrase}")]
        assert len(scenes) <= 1
        corner = image[~masks.any(dim=0)].float().median()
        if scenes:
            assert (scenes == ["forest"]) == bool(corner == 0)
            count += 1
    assert 80 < count < 176


def test_the_same_generator_gives_the_same_batch(data, compositor):
    one, other = compositor.sample(8, generator(3)), Compositor(data, NAMES).sample(8, generator(3))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.masks, other.masks)
    assert (one.captions, one.words, one.spans) == (other.captions, other.words, other.spans)
    assert not torch.equal(one.images, compositor.sample(8, generator(4)).images)


def test_first_slices_every_field(batch):
    part = batch.first(5)
    assert torch.equal(part.images, batch.images[:5])
    assert torch.equal(part.masks, batch.masks[:5])
    for name in ("captions", "words", "spans", "objects"):
        assert getattr(part, name) == getattr(batch, name)[:5]


def test_held_out_backgrounds_share_no_pixel_with_those_of_training(tmp_path):
    """Panoramas are white within 38.3° of their seam and black elsewhere; objects are transparent."""
    azimuth = (torch.arange(2048) + 0.5) / 2048 * 360
    seam = torch.minimum(azimuth, 360 - azimuth) < 38.3
    panorama = (seam[None, :, None] * torch.full((64, 1, 3), 255)).to(torch.uint8)
    data = make_data(tmp_path, opacity=0, panoramas=dict.fromkeys(SCENES, panorama))
    training = Compositor(data, NAMES).sample(192, generator()).images
    held_out = Compositor(data, NAMES, held_out=True).sample(192, generator()).images
    assert int(training.max()) == 0
    assert int(held_out.min()) >= int(0.85 * 255)


def test_training_and_held_out_views_do_not_mix(data):
    for held_out, colour in ((False, CYAN), (True, BLUE)):
        batch = Compositor(data, NAMES, held_out=held_out).sample(96, generator(), LAYOUTS[:1])
        chairs = [i for i, objects in enumerate(batch.objects) if objects == ("chair",)]
        assert chairs
        for i in chairs:
            np.testing.assert_allclose(median_colour(batch.images[i], batch.masks[i, 0]), colour, atol=0.05)
        assert {name for objects in batch.objects for name in objects} == set(NAMES.own)


def test_an_object_without_renderings_is_never_sampled(data):
    names = Names((*NAMES.own, "ghost"), (*NAMES.aliases, ()))
    batch = Compositor(data, names).sample(96, generator())
    assert not any("ghost" in objects for objects in batch.objects)


def test_articles_follow_the_sound():
    words = ("apple", "hourglass", "unicycle", "umbrella", "ukulele", "boat", "one-eyed cat", "orange cup")
    assert [article(word).split()[0] for word in words] == ["an", "an", "a", "an", "a", "a", "a", "an"]


def test_familiar_objects_and_those_with_many_aliases_are_sampled_more_often():
    apple, ball, car, _, egg, _ = NAMES.weights().tolist()  # an apple and a car are familiar
    assert float(NAMES.weights().sum()) == pytest.approx(1)
    assert egg < ball < 2 * egg
    assert apple == pytest.approx(3 * egg)
    assert apple < car < 2 * apple


def test_names_of_the_package_are_unambiguous():
    names = Names.load()
    everything = [*names.own, *(alias for aliases in names.aliases for alias in aliases)]
    assert len(set(everything)) == len(everything)
