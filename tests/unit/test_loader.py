"""Shards and folders to batches: what is read, in which order, and what is said of broken files."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from synthgen.augment import Augment, CenterCrop
from synthgen.datasets import (
    FolderDataset,
    Sample,
    ShardDataset,
    open_captioned,
    open_dataset,
    open_masks,
    rows,
    source_inputs,
)
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact
from synthgen.image import encode_jpeg, encode_png
from synthgen.loader import Order, collate, loader, prefetch, workers_for
from synthgen.plan.source import survey_images
from synthgen.stages._eval_sources import source_hash
from synthgen.stores.tar import TarWriter, index_tar
from tests.factories import make_generation

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def members(number, words=("disc",), label="disc", image="png", **extra):
    generation, truth = make_generation(f"{number:010d}", words, 32, seed=number)
    labels = (truth * np.arange(1, len(words) + 1)[:, None, None]).max(0).astype(np.uint8)
    encode = encode_png if image == "png" else encode_jpeg
    found = {
        image: encode(generation.image),
        "txt": generation.request.prompt.text.encode(),
        "json": json.dumps({"words": list(words), "label": label}).encode(),
        "mask.png": encode_png(labels),
        "cls": b"1",
    }
    return {name: value for name, value in (found | extra).items() if value is not None}


def write(path, samples):
    with TarWriter(path) as tar:
        for number, sample in samples.items():
            tar.add(f"{number:010d}", sample)
    return path


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "000000.tar", {n: members(n) for n in range(5)})
    write(tmp_path / "000001.tar", {n: members(n, ("disc", "square"), "square", "jpg") for n in range(5, 8)})
    return tmp_path


def test_shards_by_number(shards):
    samples = open_dataset(shards)
    assert len(samples) == 8
    assert [samples.key(n)[-1] for n in range(8)] == list("01234567")
    last = samples[7]
    generation, truth = make_generation("0000000007", ("disc", "square"), 32, seed=7)
    assert (last.key, last.label, last.words) == ("0000000007", "square", ("disc", "square"))
    assert last.text == "a photo of a disc and a square"
    assert np.array_equal(last.label_map == 2, truth[1])
    assert np.array_equal(samples[0].image, make_generation("0", ("disc",), 32, seed=0)[0].image)
    assert abs(last.image.astype(int) - generation.image).mean() < 5  # a jpg
    assert [samples.label(n) for n in (0, 7)] == ["disc", "square"]


def test_sources_are_tars_patterns_and_folders(shards):
    one = shards / "000001.tar"
    assert len(open_dataset(one)) == 3
    assert len(open_dataset(str(shards / "*.tar"))) == 8
    assert len(open_dataset(one, shards)) == 11
    assert open_dataset(one, shards)[3].key == "0000000000"
    assert open_dataset(one, shards).has_masks()
    (text,) = source_inputs(shards).values()
    assert text.startswith("000000.tar:")
    with pytest.raises(MissingArtifact, match="nothing-here"):
        open_dataset(shards / "nothing-here")
    (shards / "notes.md").write_text("no tar")
    with pytest.raises(ConfigError, match=r"notes\.md is not a tar"):
        open_dataset(shards / "notes.md")


def test_numbers_below_zero_count_from_the_end(shards):
    one = shards / "000001.tar"
    for samples in (open_dataset(shards), open_dataset(shards / "000000.tar", one)):
        assert samples[-1].key == "0000000007"
        assert samples.key(-8) == "0000000000"
        for index in (8, -9):
            with pytest.raises(IndexError, match=f"no sample {index} among 8"):
                samples[index]
    assert len(list(iter(open_dataset(one)))) == 3


@pytest.mark.parametrize(
    ("label", "expected"), [("disc", "disc"), (0, "0"), (7, "7"), ("", "1"), (None, "1"), (True, "1"), ([7], "1")]
)
def test_a_label_is_a_text_or_a_whole_number_of_the_json_or_else_the_cls(tmp_path, label, expected):
    samples = ShardDataset([write(tmp_path / "a.tar", {0: members(0, label=label)})])
    assert (samples[0].label, samples.label(0)) == (expected, expected)


def test_a_json_may_contain_nan(tmp_path):
    """As img2dataset and what filters its tars write it."""
    sample = members(0, txt=None, json=b'{"caption": "a disc", "words": ["disc"], "unsafe": NaN}')
    samples = ShardDataset([write(tmp_path / "a.tar", {0: sample})])
    assert samples[0].words == ("disc",)
    assert samples.captions(0) == ("a disc",)
    assert samples[0].text == "a disc"


def test_labels_come_from_json_then_cls(tmp_path):
    bare = {"mask.png": None, "txt": None}
    tar = write(
        tmp_path / "a.tar",
        {0: members(0), 1: members(1, json=b"{}", cls=b" 7\n"), 2: members(2, json=None, cls=None, **bare)},
    )
    samples = ShardDataset([tar])
    assert [samples.label(n) for n in range(3)] == ["disc", "7", None]
    assert (samples[2].text, samples[2].words, samples[2].label_map) == ("", (), None)


def test_masks_beside_a_jpg_may_be_a_plain_png(tmp_path):
    """As in published sets: the image is the first of jpg, jpeg, webp, png; the json's classes name the masks."""
    sample = members(0, image="jpg")
    sample["png"] = sample.pop("mask.png")
    sample["json"] = json.dumps({"classes": ["disc"]}).encode()
    samples = ShardDataset([write(tmp_path / "a.tar", {0: sample})])
    assert samples[0].words == ("disc",)
    assert samples[0].label_map.max() == 1
    assert samples.has_masks()
    assert not ShardDataset(samples.paths, masks=False).has_masks()


def test_masks_alone_need_no_image(tmp_path):
    sample = {name: value for name, value in members(3).items() if name in ("mask.png", "json")}
    masks = open_masks(write(tmp_path / "truth.tar", {3: sample}))
    assert list(masks) == ["0000000003"]
    assert np.array_equal(masks["0000000003"].values, make_generation("3", ("disc",), 32, seed=3)[1])
    with pytest.raises(ConfigError, match="has no masks"):
        open_masks(write(tmp_path / "none.tar", {0: members(0, **{"mask.png": None})}))
    for name in ("a", "b"):  # as of two runs
        write(tmp_path / "two" / f"{name}.tar", {3: sample})
    with pytest.raises(ConfigError, match=r"two samples of .*two have the key '.*3'"):
        open_masks(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"png": b"this is no picture"}, "cannot identify"),
        ({"png": b"\x89PNG\r\n\x1a\n" + b"0" * 40}, "cannot be read"),
        ({"png": None}, "has no image"),
        ({"json": b"{"}, "cannot be read"),
        ({"json": b"[]"}, "not an object"),
        ({"json": b"{}", "cls": b"cat"}, "not a whole number"),
        ({"mask.png": encode_png(np.zeros((8, 8), np.uint8))}, "8 x 8 pixels"),
        ({"mask.png": encode_png(np.zeros((32, 32, 3), np.uint8))}, "mode RGB"),
        ({"txt": b"\xff\xfe\xfd"}, "cannot be read"),
    ],
)
def test_a_broken_sample_is_named(tmp_path, change, said):
    tar = write(tmp_path / "000003.tar", {0: members(0), 1: members(1, **change)})
    samples = ShardDataset([tar])
    assert samples[0].key == "0000000000"
    with pytest.raises(CorruptFile, match=said) as caught:
        samples[1]
    assert "0000000001" in str(caught.value)
    assert str(tar) in str(caught.value)


def test_a_cut_tar_is_named(shards):
    path = shards / "000001.tar"
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(CorruptFile, match=r"000001\.tar"):
        open_dataset(shards)


def test_a_tar_is_indexed_once_until_it_changes(shards, monkeypatch):
    indexed = []
    monkeypatch.setattr(rows, "index_tar", lambda path: indexed.append(path.name) or index_tar(path))
    for _ in range(2):
        assert len(open_dataset(shards)) == 8
    assert indexed == ["000000.tar", "000001.tar"]
    write(shards / "000001.tar", {9: members(9)})
    assert [open_dataset(shards).key(n) for n in (4, 5, -1)] == ["0000000004", "0000000009", "0000000009"]
    assert indexed[2:] == ["000001.tar"]
    held = [path.name for path in rows._known if path.parent == shards]
    assert sorted(held) == ["000000.tar", "000001.tar"]  # what stood in it before is forgotten


def test_members_may_differ_from_sample_to_sample(tmp_path):
    tars = [
        {0: members(0), 1: members(1, image="jpg", txt=None), 2: members(2, cls=None, json=None)},
        {3: members(3, **{"mask.png": None})},
    ]
    samples = open_dataset(*(write(tmp_path / f"{number}.tar", tar) for number, tar in enumerate(tars)))
    assert [samples[n].key for n in range(4)] == [samples.key(n) for n in range(4)]
    assert [samples[n].label_map is None for n in range(4)] == [False, False, False, True]
    assert [samples.label(n) for n in range(4)] == ["disc", "disc", None, "disc"]
    assert [bool(samples[n].text) for n in range(4)] == [True, False, True, True]


def test_folders_are_classes(tmp_path):
    for number, name in enumerate(["dog/b.png", "cat/x/a.jpg", "top.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), number * 100, np.uint8)).save(path)
    samples = open_dataset(tmp_path)
    assert [(samples.key(n), samples.label(n)) for n in range(3)] == [
        ("cat/x/a", "cat"),
        ("dog/b", "dog"),
        ("top", None),
    ]
    assert samples[1].image.shape == (9, 7, 3)
    (tmp_path / "dog/b.png").write_bytes(b"no")
    with pytest.raises(CorruptFile, match=r"dog/b.*; replace it, or leave it out"):  # it is somebody's picture
        samples[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingArtifact, match="neither tars nor images"):
        FolderDataset(tmp_path / "empty")


def test_a_folder_of_links_to_classes_is_read_like_one_of_folders(tmp_path):
    for name in ("dog", "cat", "bird"):
        (tmp_path / "all" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "all" / name / "0.png")
    subset = tmp_path / "subset"
    shutil.copytree(tmp_path / "all" / "bird", subset / "bird")
    for name in ("dog", "cat"):
        (subset / name).symlink_to(tmp_path / "all" / name)
    (subset / "dog" / "0.txt").write_text("a dog")
    samples = open_dataset(subset)
    assert [(samples.key(n), samples.label(n)) for n in range(3)] == [(f"{c}/0", c) for c in ("bird", "cat", "dog")]
    assert open_captioned(subset).captions(2) == ("a dog",)
    assert source_inputs(subset)[str(subset)].split()[1].startswith("0.png:")
    assert len(source_inputs(subset)[str(subset)].split()) == 4
    pictures = survey_images(str(subset))
    assert (pictures.count, sorted(key for key, _ in pictures.few)) == (3, ["bird/0", "cat/0", "dog/0"])
    before = source_hash(str(subset))
    Image.new("RGB", (9, 9)).save(tmp_path / "all" / "dog" / "0.png")
    assert source_hash(str(subset)) != before


def test_collate_normalises_and_pads(shards):
    samples = [CenterCrop(size=32)(open_dataset(shards)[n]) for n in (0, 7)]
    batch = collate(samples, MEAN, STD)
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.masks.shape == (2, 2, 32, 32)
    assert batch.present.tolist() == [[True, False], [True, True]]
    wanted = (torch.tensor(samples[1].image[4, 5] / 255.0) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(batch.images[1, :, 4, 5], wanted.float(), atol=1e-6)
    assert torch.equal(batch.masks[1, 1], torch.from_numpy(samples[1].label_map == 2))
    assert not batch.masks[0, 1].any()
    assert batch.labels == ("disc", "square")
    assert len(batch) == 2


# -- order


def test_words_beyond_255_have_no_masks():
    """An 8-bit label map has no numbers for them; the background is none either."""
    label_map = np.zeros((4, 4), np.uint8)
    label_map[0] = 1
    sample = Sample("0", np.zeros((4, 4, 3), np.uint8), words=tuple(map(str, range(300))), label_map=label_map)
    batch = collate([sample], MEAN, STD)
    assert batch.present[0].nonzero().flatten().tolist() == [0]


def test_every_epoch_is_another_permutation():
    order = Order(length=10, batch_size=3, epochs=3, seed=1)
    steps = list(order)
    assert len(order) == len(steps) == order.steps == 9
    epochs = [[index for step in steps[e * 3 : e * 3 + 3] for _, index in step] for e in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [ticket[0] for step in steps for ticket in step] == [0] * 9 + [1] * 9 + [2] * 9
    assert steps == list(order)
    assert steps != list(Order(length=10, batch_size=3, epochs=3, seed=2))


@pytest.mark.parametrize("start", [0, 1, 3, 5, 9])
def test_order_resumes_at_any_position(start):
    whole = list(Order(length=10, batch_size=3, epochs=3, seed=1))
    assert list(Order(length=10, batch_size=3, epochs=3, seed=1, start=start)) == whole[start:]


def test_processes_and_parts_share_a_step():
    whole = next(iter(Order(length=9, batch_size=8, epochs=1, seed=1)))
    shared = [list(Order(length=9, batch_size=8, epochs=1, seed=1, rank=r, world_size=2, parts=2)) for r in (0, 1)]
    assert [len(part) for part in shared[0]] == [2, 2]
    assert sorted(ticket for rank in shared for part in rank for ticket in part) == sorted(whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_resuming_change_nothing(shards, num_workers):
    samples, view = open_dataset(shards), Augment(size=16, jitter=0.2)

    def batches(start=0, num_workers=0):
        order = Order(length=8, batch_size=3, epochs=2, seed=5, start=start)
        return list(loader(samples, order, view, mean=MEAN, std=STD, seed=5, num_workers=num_workers))

    whole, rest = batches(), batches(start=1, num_workers=num_workers)
    assert [batch.keys for batch in rest] == [batch.keys for batch in whole[1:]]
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.masks, other.masks)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_a_process_are_raised_unchanged(shards, num_workers):
    """In one line, after the batches before it; torch would give the process's traceback for a message."""
    path = shards / "000000.tar"
    wrong = CorruptFile(f"the third sample of {path} cannot be read; delete it")

    class Broken(ShardDataset):
        def __getitem__(self, index):
            if index == 2:
                raise wrong
            return super().__getitem__(index)

    samples = Broken([path])
    order = [[(0, 0), (0, 1)], [(0, 3), (0, 2)], [(0, 0), (0, 3)]]
    made = loader(samples, order, Augment(size=16), mean=MEAN, std=STD, num_workers=num_workers)
    assert len(made) == 3
    batches = iter(made)
    assert next(batches).keys == (samples.key(0), samples.key(1))
    with pytest.raises(CorruptFile) as caught:
        next(batches)
    assert str(caught.value) == str(wrong)


def test_pinning_reaches_the_tensors_of_both_views(shards, monkeypatch):
    """Torch passes over what has no ``pin_memory`` of its own. Without a GPU nothing is pinned: a copy stands in."""
    samples, view = open_dataset(shards), Augment(size=16)
    order = Order(length=8, batch_size=4, epochs=1, seed=5)
    batch = next(iter(loader(samples, order, view, second=view, mean=MEAN, std=STD)))
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    moved = pin_memory(batch)
    tensors = [value for one in (moved, moved.second) for value in (one.images, one.masks, one.present, one.seeds)]
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned}
    assert torch.equal(moved.second.images, batch.second.images)
    assert (moved.keys, moved.words) == (batch.keys, batch.words)


def test_batches_are_prefetched():
    asked = []

    def source():
        for number in range(6):
            asked.append((number, threading.current_thread()))
            yield number
        raise CorruptFile("the last one")

    batches = prefetch(source())
    for number in range(6):
        assert next(batches) == number
        time.sleep(0.01)
        assert asked[-1][0] <= number + 1
    with pytest.raises(CorruptFile, match="the last one"):
        next(batches)
    assert all(thread is not threading.current_thread() for _, thread in asked)
    assert list(prefetch(iter([]))) == []


def test_two_views_are_of_the_same_samples(shards):
    samples, view = open_dataset(shards), Augment(size=16)
    settings = {"mean": MEAN, "std": STD, "seed": 5}
    order = Order(length=8, batch_size=4, epochs=2, seed=5)
    one, two = (list(loader(samples, order, view, second=second, **settings)) for second in (None, view))
    for alone, first in zip(one, two, strict=True):
        assert torch.equal(alone.images, first.images)  # the first view is the one there would be alone
        assert alone.second is None
        assert (first.second.keys, first.second.words) == (first.keys, first.words)
        assert not torch.equal(first.images, first.second.images)
        assert first.to("cpu").second.images.shape == first.images.shape
        for batch in (first, first.second):  # each view's masks go with its own image: shapes are of one bright colour
            covered = batch.masks.any(1)
            red = batch.images[:, 0] * STD[0] + MEAN[0]
            blue = batch.images[:, 2] * STD[2] + MEAN[2]
            bright = torch.maximum(red, blue)
            assert bright[covered].mean() > bright[~covered].mean() + 0.2
    seeds = torch.cat([batch.seeds for batch in one])
    assert len(set(seeds.tolist())) == 16  # another for every sample in every epoch
    assert torch.equal(seeds, torch.cat([batch.seeds for batch in two]))


def test_a_limit_ends_an_epoch_early():
    whole = Order(length=10, batch_size=3, epochs=3, seed=1)
    short = Order(length=10, batch_size=3, epochs=3, seed=1, limit=5)
    assert (short.steps, len(short)) == (5, 5)
    assert list(short) == list(whole)[:5]
    assert Order(length=10, batch_size=3, epochs=1, seed=1, limit=5).steps == 3


def test_datasets_travel_without_their_files(shards):
    samples = open_dataset(shards)
    first = samples[0].image
    assert np.array_equal(pickle.loads(pickle.dumps(samples))[0].image, first)


def test_number_of_workers():
    assert workers_for(3) == 3
    assert workers_for(-1) >= 0
