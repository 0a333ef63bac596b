"""Exports: other tools read the same masks, and a run that was cut short ends with the same bytes."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from scipy import ndimage

from synthgen import codecs, export
from synthgen.__main__ import main
from synthgen.api import export_dataset
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact
from synthgen.export import formats
from synthgen.export.polygons import compress_counts, join_corners, outlines, run_lengths
from synthgen.mask_shape import box, split
from synthgen.records import Generation, Maps, Prompt, Request, WordMasks
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.shards import Shards
from synthgen.stores.tar import read_tar, temporary_beside
from tests.factories import make_run, record_settings

FORMATS = ("coco", "yolo", "labels")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """12 samples in two units; every third has both words. Tests only read it, and export elsewhere."""
    return make_run(tmp_path_factory.mktemp("source") / "run", units=2, unit_size=6)


def truths(run: Run) -> dict[str, WordMasks]:
    return {
        key: codecs.decode_masks(key, members)
        for unit in run.units("masks")
        for key, members in run.read("masks", unit)
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rasterise(polygons: list[np.ndarray], height: int, width: int, scale: int = 8) -> np.ndarray:
    """Whether each pixel's centre is inside one of the polygons."""
    canvas = Image.new("1", (width * scale, height * scale))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in (np.asarray(polygon) * scale).tolist()], fill=1)
    return np.asarray(canvas)[scale // 2 :: scale, scale // 2 :: scale]


def decompress(text: str, height: int, width: int) -> np.ndarray:
    """COCO's compressed run lengths, read with nothing of ours."""
    counts: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    flat = [index % 2 == 1 for index, count in enumerate(counts) for _ in range(count)]
    return np.array(flat, bool).reshape(width, height).T


def blobs(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A ragged mask of several parts, with pixels that touch at corners only."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.random((7, 9)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(coarse) + rng.normal(0, 0.05, (height, width)) > 0.6


def noise(seed: int) -> np.ndarray:
    """Pixels of chance: holes in parts in holes, and corners everywhere."""
    rng = np.random.default_rng(seed)
    return rng.random(rng.integers(1, 24, 2)) < rng.uniform(0.2, 0.98)


def windings(polygons: list[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each pixel's centre lies right of a polygon's side, and how often the polygons go around it."""
    crossed, around = np.zeros((2, height, width + 1), int)
    for polygon in polygons:
        for (x, y), (x_next, y_next) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            assert (x == x_next) != (y == y_next)
            crossed[min(y, y_next) : max(y, y_next), x] += 1
            around[min(y, y_next) : max(y, y_next), x] += np.sign(y - y_next)
    return crossed.cumsum(axis=1)[:, :width], around.cumsum(axis=1)[:, :width]


def area(polygon: np.ndarray) -> float:
    x, y = np.transpose(polygon)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def parts(mask: np.ndarray, corners: bool) -> int:
    return int(ndimage.label(mask, np.ones((3, 3)) if corners else None)[1])


# -- run lengths


def test_run_lengths_of_known_masks() -> None:
    dot = np.zeros((3, 3), bool)
    dot[1, 1] = True
    assert run_lengths(dot) == [4, 1, 4]
    assert run_lengths(np.ones((2, 3), bool)) == [0, 6]
    assert run_lengths(np.zeros((2, 3), bool)) == [6]
    assert run_lengths(np.array([[1, 1, 0], [0, 0, 0]], bool)) == [0, 1, 1, 1, 3]  # down the columns
    assert compress_counts([4, 1, 4]) == "414"
    assert compress_counts([10, 20, 30, 5]) == ":d0n0A"  # 20 and 30 take two characters; 5 is 15 less than 20
    assert compress_counts([100]) == "T3"


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_come_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for mask in (blobs(seed), ~blobs(seed), rng.random((13, 7)) < 0.5, np.ones((300, 200), bool)):
        assert np.array_equal(decompress(compress_counts(run_lengths(mask)), *mask.shape), mask)


# -- outlines


def test_outlines_of_known_masks() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    (box,) = outlines(mask)
    assert box.tolist() == [[2, 1], [5, 1], [5, 3], [2, 3]]
    assert outlines(np.zeros((4, 6), bool)) == []
    assert [len(part) for part in outlines(np.eye(3, dtype=bool))] == [4, 4, 4]  # corners do not connect
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    (keyhole,) = outlines(ring)  # the hole, anticlockwise, hangs at a slit along y = 2
    assert keyhole.tolist() == [[0, 0], [5, 0], [5, 5], [0, 5], [0, 2], [2, 2], [2, 3], [3, 3], [3, 2], [0, 2]]
    open_ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool)  # its hole reaches the outside over a corner
    (part,) = outlines(open_ring)
    assert np.array_equal(rasterise([part], 3, 3), open_ring)


@pytest.mark.parametrize("make", [blobs, noise, lambda seed: ~blobs(seed)])
@pytest.mark.parametrize("seed", range(12))
def test_outlines_drawn_again_are_the_mask_with_its_holes(seed: int, make: Callable[[int], np.ndarray]) -> None:
    mask = make(seed)
    for polygons, corners in ((outlines(mask), False), ([np.array(one) for one in join_corners(outlines(mask))], True)):
        assert len(polygons) == parts(mask, corners)
        crossed, around = windings(polygons, *mask.shape)
        assert np.array_equal(crossed % 2 == 1, mask)  # by the even-odd rule
        assert np.array_equal(around, mask.astype(int))  # by the nonzero rule; no pixel twice
        assert sum(map(area, polygons)) == mask.sum()
        for polygon in polygons:  # every point is a turn
            across = np.roll(polygon, -1, axis=0)[:, 0] == polygon[:, 0]
            assert (across != np.roll(across, 1)).all()
    assert np.array_equal(rasterise(outlines(mask), *mask.shape), mask)  # and by Pillow


def test_random_masks_have_holes_and_parts_in_holes() -> None:
    masks = [make(seed) for make in (blobs, noise) for seed in range(12)]
    assert sum(parts(~np.pad(mask, 1), True) - 1 for mask in masks) > 100


def test_the_memory_of_outlines_does_not_grow_with_the_holes_in_a_row() -> None:
    mask = np.random.default_rng(0).random((400, 400)) < 0.8
    tracemalloc.start()
    outlines(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * mask.size


# -- objects


def test_separate_objects_are_annotated_apart_unless_that_is_switched_off(tmp_path: Path) -> None:
    run = make_own(tmp_path / "run", [("0000000000", ("dog",))], draw=two_dogs)
    export_dataset(run, "coco")
    export_dataset(run, "coco", tmp_path / "whole", instances=False)
    apart, whole = (
        json.loads((folder / "annotations/instances.json").read_text())["annotations"]
        for folder in (run.path / "export-coco", tmp_path / "whole")
    )
    assert [(one["id"], one["category_id"], one["area"], one["bbox"]) for one in apart] == [
        (1, 1, 25, [2, 20, 6, 6]),
        (2, 1, 12, [10, 2, 3, 4]),
    ]
    assert [(one["id"], one["area"], one["bbox"]) for one in whole] == [(1, 38, [2, 2, 22, 24])]
    assert [len(one["segmentation"]) for one in apart + whole] == [2, 1, 4]  # over sides
    mask = two_dogs(32, 24)
    drawn = [rasterise([np.reshape(part, (-1, 2)) for part in one["segmentation"]], 32, 24) for one in apart + whole]
    assert np.array_equal(drawn[2], mask)
    assert np.array_equal(drawn[0] | drawn[1], mask & (np.arange(24) < 20))
    export_dataset(run, "yolo", val_ratio=0.0)
    export_dataset(run, "yolo", tmp_path / "lines", val_ratio=0.0, instances=False)
    lines, all_lines = (
        [np.array(line.split()[1:], float).reshape(-1, 2) * (24, 32) for line in file.read_text().splitlines()]
        for file in (
            folder / "labels/train/0000000000.txt" for folder in (run.path / "export-yolo", tmp_path / "lines")
        )
    )
    assert [np.array_equal(rasterise([line], 32, 24), one) for line, one in zip(lines, drawn, strict=False)] == [
        True
    ] * 2
    assert len(all_lines) == 3  # the speck too
    assert np.array_equal(rasterise(all_lines, 32, 24), mask)
    with pytest.raises(ConfigError, match="instances"):
        export_dataset(run, "labels", instances=False)


def two_dogs(height: int, width: int) -> np.ndarray:
    """A ring of 24 pixels with one that touches it at a corner, a block of 12, and a speck."""
    mask = np.zeros((height, width), bool)
    mask[20:25, 2:7] = True
    mask[22, 4] = False
    mask[25, 7] = True
    mask[2:6, 10:13] = True
    mask[10, 23] = True
    return mask


# -- coco


@pytest.mark.parametrize("rle", [False, True])
def test_coco_holds_every_mask(source: Run, tmp_path: Path, rle: bool) -> None:
    summary = export_dataset(source, "coco", tmp_path / "out", rle=rle)
    whole = json.loads((tmp_path / "out/annotations/instances.json").read_text())
    captions = json.loads((tmp_path / "out/annotations/captions.json").read_text())
    assert whole["categories"] == [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
    assert [image["id"] for image in whole["images"]] == list(range(1, 13))
    assert [one["id"] for one in whole["annotations"]] == list(range(1, summary.notes["masks"] + 1))
    names = {one["id"]: one["name"] for one in whole["categories"]}
    prompts = {one["image_id"]: one["caption"] for one in captions["annotations"]}
    for image in whole["images"]:
        key = image["file_name"].removesuffix(".png")
        truth = truths(source)[key]
        assert prompts[image["id"]] == image["caption"] == "a photo of a " + " and a ".join(truth.words)
        unit = dict(source.read("images", int(key[:6])))
        assert (tmp_path / "out/images" / image["file_name"]).read_bytes() == unit[key]["png"]
        mine = [one for one in whole["annotations"] if one["image_id"] == image["id"]]
        assert [names[one["category_id"]] for one in mine] == list(truth.words)
        for one, mask in zip(mine, truth.values, strict=True):
            size = image["height"], image["width"]
            if rle:
                assert one["segmentation"]["size"] == list(size)
                found = decompress(one["segmentation"]["counts"], *size)
                assert np.array_equal(found, mask)
            else:
                found = rasterise([np.reshape(part, (-1, 2)) for part in one["segmentation"]], *size)
                assert np.array_equal(found, mask)
            assert (one["area"], one["iscrowd"], one["score"], one["confidence"]) == (mask.sum(), 0, 0.5, -1.0)
            left, top, width, height = one["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
            assert mask.any(axis=0).sum() == width
            assert mask.any(axis=1).sum() == height


@pytest.mark.parametrize("rle", [False, True])
def test_the_coco_api_reads_it(tmp_path: Path, rle: bool) -> None:
    coco, tools = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.mask")
    run = make_own(tmp_path / "run", [("0000000000", ("dog",)), ("0000000001", ("dog",))], draw=ragged)
    export_dataset(run, "coco", tmp_path / "out", rle=rle)
    read = coco.COCO(str(tmp_path / "out/annotations/instances.json"))
    assert len(coco.COCO(str(tmp_path / "out/annotations/captions.json")).anns) == 2
    objects = split(ragged(32, 24))
    assert [parts(~np.pad(one, 1), False) - 1 for one in objects] == [10, 5, 1]  # holes
    for number in read.imgs:
        for one, mask in zip(read.loadAnns(read.getAnnIds(number)), objects, strict=True):
            assert np.array_equal(read.annToMask(one).astype(bool), mask)
            lengths = read.annToRLE(one)
            text = compress_counts(run_lengths(mask))
            assert lengths["counts"] in (text, text.encode())
            assert one["area"] == tools.area(lengths) == mask.sum()
            left, top, right, bottom = box(mask)
            assert one["bbox"] == tools.toBbox(lengths).tolist() == [left, top, right - left, bottom - top]


def ragged(height: int, width: int) -> np.ndarray:
    """Parts with holes, chosen by chance."""
    rng = np.random.default_rng(3)
    return (ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.2) > 0.06) & (
        rng.random((height, width)) < 0.94
    )


@pytest.mark.parametrize("make", [blobs, noise])
def test_the_coco_api_draws_our_outlines_and_packs_the_same_text(make: Callable[[int], np.ndarray]) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    for seed in range(30):
        mask = make(seed)
        lengths = tools.encode(np.asfortranarray(mask, np.uint8))
        assert lengths["counts"].decode() == compress_counts(run_lengths(mask))
        for polygons in (outlines(mask), join_corners(outlines(mask))):
            flat = [np.ravel(polygon).tolist() for polygon in polygons]
            assert tools.merge(tools.frPyObjects(flat, *mask.shape))["counts"] == lengths["counts"]


def test_coco_says_whether_a_model_made_the_images(tmp_path: Path) -> None:
    run = make_own(tmp_path / "run", [("0000000000", ("dog",))])
    noted = run.folder("images") / "settings.yaml"
    for stage, told in (("generate", "generated images, masks from"), ("attend", "existing images, masks from")):
        noted.write_text(noted.read_text().replace("stage: generate", f"stage: {stage}"))
        export_dataset(run, "coco", tmp_path / stage)
        for name in formats.Coco.summaries:
            assert json.loads((tmp_path / stage / name).read_text())["info"]["description"].startswith(f"run: {told}")


def coco_of(run: Run, folder: Path) -> formats.Coco:
    return formats.Coco(run, formats.Export("coco").complete(run), folder, ["dog"])


def some_samples(count: int) -> Iterator[formats.Sample]:
    image, masks = np.zeros((8, 8, 3), np.uint8), WordMasks(("dog",), np.ones((1, 8, 8), bool), np.ones(1, np.float32))
    for number in range(count):
        yield formats.Sample(f"{number:010}", Prompt("a dog", ("dog",), ((2, 5),)), b"png", image, masks)


def test_coco_holds_one_image_at_a_time(tmp_path: Path) -> None:
    class Long(formats.Coco):
        def segmentation(self, mask: np.ndarray) -> list[list[int]]:
            return [list(range(3000))]

    run, peaks, bytes_written = make_own(tmp_path / "run", []), [], []
    for count in (4, 40):
        coco = Long(run, formats.Export("coco").complete(run), tmp_path / str(count), ["dog"])
        tracemalloc.start()
        coco.write(0, some_samples(count))
        coco.finish([0])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        bytes_written.append((tmp_path / str(count) / "annotations/instances.json").stat().st_size)
    assert bytes_written[1] > 9 * bytes_written[0] > 50_000
    assert peaks[1] < 1.2 * peaks[0]


def test_coco_files_are_compact_json_in_the_order_of_the_format(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "coco", tmp_path / "out")
    for name, lists in (
        ("instances", ["images", "annotations", "categories"]),
        ("captions", ["images", "annotations"]),
    ):
        text = (tmp_path / f"out/annotations/{name}.json").read_text()
        assert list(json.loads(text)) == ["info", "licenses", *lists]
        assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


def test_jpg_instead_of_png(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "coco", tmp_path / "out", image_format="jpg")
    assert {path.suffix for path in (tmp_path / "out/images").iterdir()} == {".jpg"}
    images = json.loads((tmp_path / "out/annotations/instances.json").read_text())["images"]
    assert all((tmp_path / "out/images" / image["file_name"]).is_file() for image in images)


# -- yolo


def test_yolo_holds_every_mask_in_shares_of_the_image(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "yolo", tmp_path / "out")
    data = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert data["names"] == {0: "disc", 1: "square"}
    for key, truth in truths(source).items():
        (label,) = (tmp_path / "out/labels").glob(f"*/{key}.txt")
        assert (tmp_path / "out/images" / label.parent.name / f"{key}.jpg").is_file()
        found = {word: np.zeros((64, 64), bool) for word in truth.words}
        for line in label.read_text().splitlines():
            number, *numbers = line.split()
            corners = np.array(numbers, float).reshape(-1, 2)
            assert len(corners) >= 4
            assert corners.min() >= 0
            assert corners.max() <= 1
            found[data["names"][int(number)]] |= rasterise([corners * 64], 64, 64)
        for word, mask in zip(truth.words, truth.values, strict=True):
            assert np.array_equal(found[word], mask)


def test_the_split_is_that_of_the_shards(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", units=2, unit_size=12)
    run_stage(Shards(val_ratio=0.3), run, Local(workers=1))
    export_dataset(run, "yolo")
    assert yaml.safe_load((run.path / "export-yolo/data.yaml").read_text())["val"] == "images/val"
    for name in ("train", "val"):
        packed = {key for tar in (run.folder("shards") / name).glob("*.tar") for key, _ in read_tar(tar)}
        assert packed
        assert {path.stem for path in (run.path / "export-yolo/images" / name).iterdir()} == packed
        assert {path.stem for path in (run.path / "export-yolo/labels" / name).iterdir()} == packed


def test_without_a_val_split_val_names_the_images_of_train(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "yolo", tmp_path / "out", val_ratio=0)
    data = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert data["train"] == data["val"] == "images/train"
    assert not (tmp_path / "out/images/val").exists()


# -- labels


def test_labels_hold_class_numbers(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "labels", tmp_path / "out")
    classes = (tmp_path / "out/classes.txt").read_text().splitlines()
    assert classes == ["background", "disc", "square"]
    for key, truth in truths(source).items():
        label = Image.open(tmp_path / f"out/labels/{key}.png")
        assert label.mode == "L"
        pixels = np.asarray(label)
        assert (pixels == 0).sum() == (~truth.values.any(axis=0)).sum()
        for word, mask in zip(truth.words, truth.values, strict=True):
            assert (pixels[mask] == classes.index(word)).all()


def test_many_classes_take_sixteen_bits(tmp_path: Path) -> None:
    words = tuple(f"w{number:03d}" for number in range(300))
    run = make_own(tmp_path / "run", [("0000000000", words[:150]), ("0000000001", words[150:])])
    export_dataset(run, "labels")
    pixels = np.asarray(Image.open(run.path / "export-labels/labels/0000000001.png"))
    assert pixels.dtype.itemsize >= 2
    assert sorted(set(pixels.ravel().tolist())) == [0, *range(151, 301)]
    assert len((run.path / "export-labels/classes.txt").read_text().splitlines()) == 301


# -- samples that are not as the others


def make_own(
    path: Path,
    wanted: list[tuple[str, tuple[str, ...]]],
    *,
    dropped: tuple[str, ...] = (),
    draw: Callable[[int, int], np.ndarray] | None = None,
) -> Run:
    """A run of one unit with these keys and words; each has a row of four pixels, or what is drawn, or is dropped."""
    from tests.factories import Drawn, TrueMasks

    run = Run.create(path)
    record_settings(run, Drawn(units=1))
    with run.write("images", 0) as images, run.write("maps", 0) as maps:
        for key, words in wanted:
            text = " ".join(words) or "nothing"
            prompt = Prompt(text, words, tuple((0, 1) for _ in words), None)
            none = Maps(words, np.zeros((len(words), 4, 4), np.float16), np.zeros((12, 4, 4), np.float16))
            generation = Generation(Request(key, prompt, 0), np.full((32, 24, 3), 9, np.uint8), none)
            images.add(key, codecs.encode_image(generation))
            maps.add(key, codecs.encode_maps(none))
    record_settings(run, TrueMasks())
    with run.write("masks", 0) as masks:
        for key, words in wanted:
            values = np.zeros((len(words), 32, 24), bool)
            for number, word in enumerate(words):
                row, column = divmod(4 * number, 24)
                values[number, row, column : column + 4] = word not in dropped
                values[number] = draw(32, 24) if draw else values[number]
            why = tuple("is empty" if word in dropped else "" for word in words)
            masks.add(key, codecs.encode_masks(WordMasks(words, values, np.full(len(words), np.nan, np.float32), why)))
    return run


def test_the_same_word_twice_is_annotated_twice(tmp_path: Path) -> None:
    run = make_own(tmp_path / "run", [("0000000000", ("dog", "cat", "dog"))])
    export_dataset(run, "coco")
    export_dataset(run, "yolo", val_ratio=0.0)
    whole = json.loads((run.path / "export-coco/annotations/instances.json").read_text())
    assert [one["category_id"] for one in whole["annotations"]] == [2, 1, 2]
    assert [one["bbox"] for one in whole["annotations"]] == [[0, 0, 4, 1], [4, 0, 4, 1], [8, 0, 4, 1]]
    assert [one["score"] for one in whole["annotations"]] == [0, 0, 0]  # JSON has no nan
    lines = (run.path / "export-yolo/labels/train/0000000000.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "0", "1"]


def test_an_image_without_masks_stays(tmp_path: Path) -> None:
    run = make_own(tmp_path / "run", [("0000000000", ("dog",)), ("0000000001", ())], dropped=("dog",))
    summary = export_dataset(run, "coco")
    assert (summary.notes["masks"], summary.notes["dropped"]) == (0, 1)
    export_dataset(run, "yolo", val_ratio=0.0)
    export_dataset(run, "labels")
    whole = json.loads((run.path / "export-coco/annotations/instances.json").read_text())
    assert len(whole["images"]) == 2
    assert whole["annotations"] == []
    assert whole["categories"] == [{"id": 1, "name": "dog"}]
    assert (run.path / "export-yolo/labels/train/0000000000.txt").read_bytes() == b""
    assert not np.asarray(Image.open(run.path / "export-labels/labels/0000000001.png")).any()


def test_a_key_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    run = make_own(tmp_path / "run", [("../../out", ("dog",))])
    with pytest.raises(CorruptFile, match="leads out of its folder"):
        export_dataset(run, "coco")
    assert not list(tmp_path.rglob("*.png"))


# -- again, and after a kill


@pytest.mark.parametrize("format", FORMATS)
def test_cut_short_and_run_again_gives_the_same_bytes(
    source: Run, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_dataset(source, format, tmp_path / "whole")
    whole, folder = contents(tmp_path / "whole"), tmp_path / "cut"
    real, left = formats.write_bytes, [8]

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f".{path.name}.1.tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(formats, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        export_dataset(source, format, folder)
    monkeypatch.undo()
    assert list(folder.rglob(".*.tmp"))
    assert 8 < len(contents(folder)) < len(whole)
    export_dataset(source, format, folder)
    assert contents(folder) == whole


def test_units_that_a_killed_coco_export_described_are_not_decoded_again(
    source: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read = tmp_path / "whole", list[int]()
    export_dataset(source, "coco", whole)
    assert not (whole / "annotations/parts").exists()
    real, read_samples = formats.write_chunks, export._samples

    def samples(run: Run, unit: int, rejected: Collection[str]) -> Iterator[formats.Sample]:
        read.append(unit)
        return read_samples(run, unit, rejected)

    def write_but(doomed: str) -> None:
        def write(path: Path, chunks: Iterator[bytes]) -> None:
            if path.name == doomed:
                raise KeyboardInterrupt
            real(path, chunks)

        monkeypatch.setattr(formats, "write_chunks", write)

    monkeypatch.setattr(export, "_samples", samples)
    for doomed, units in (("000001.jsonl", [0, 1]), ("instances.json", [1]), ("captions.json", [])):
        write_but(doomed)
        read.clear()
        with pytest.raises(KeyboardInterrupt):
            export_dataset(source, "coco", tmp_path / "out")
        assert read == units
    write_but("")
    export_dataset(source, "coco", tmp_path / "out")
    assert read == []
    assert contents(tmp_path / "out") == contents(whole)
    assert not (tmp_path / "out/annotations/parts").exists()


def test_parts_that_a_kill_left_behind_are_taken_away(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "coco", tmp_path / "out")
    part = tmp_path / "out/annotations/parts/000001.jsonl"
    part.parent.mkdir()
    part.touch()
    assert export_dataset(source, "coco", tmp_path / "out").done_before == 2
    assert not part.parent.exists()


def test_a_part_that_is_gone_or_damaged_is_named_unless_another_export_has_ended(tmp_path: Path) -> None:
    coco = coco_of(make_own(tmp_path / "run", []), tmp_path / "out")
    coco.write(0, some_samples(2))
    part = coco.part(0)
    good = part.read_bytes()
    for damage in (good[:-20], good[: good.rindex(b'{"cat')], b"[1]\n" + good, good.replace(b"annotations", b"things")):
        part.write_bytes(damage)
        with pytest.raises(CorruptFile, match=rf"^{part} cannot be read; delete it and run the same command again$"):
            coco.finish([0])
        assert not coco.is_finished
    with pytest.raises(MissingArtifact, match=rf"^{coco.part(1)} is gone; run the same command again$"):
        coco.finish([1])

    class Other(formats.Coco):
        def head(self) -> dict[str, object]:  # asked for when the first file is begun
            for name in self.summaries:
                (self.folder / name).write_text("theirs")
            part.unlink(missing_ok=True)
            return {}

    part.write_bytes(good)
    Other(coco.run, coco.settings, coco.folder, coco.names).finish([0])
    assert [(coco.folder / name).read_text() for name in coco.summaries] == ["theirs"] * 2


@pytest.mark.parametrize("format", FORMATS)
def test_a_finished_export_is_unchanged_and_lost_files_are_written_again(
    source: Run, tmp_path: Path, format: str
) -> None:
    folder = tmp_path / "out"
    export_dataset(source, format, folder)
    whole, times = contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    summary = export_dataset(source, format, folder)
    assert summary.done_before == summary.units == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    next(folder.glob("images/**/0000010003.*")).unlink()
    export_dataset(source, format, folder)
    assert contents(folder) == whole


def test_what_another_export_is_writing_is_left_to_it(source: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    theirs = temporary_beside(folder / "annotations.json")  # of a process that lives: this one
    theirs.touch()
    dead = theirs.with_name(theirs.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))  # above any process number
    dead.touch()
    export_dataset(source, "labels", folder)
    assert theirs.exists()
    assert not dead.exists()


def test_other_settings_other_samples_and_other_folders_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", units=1, unit_size=3)
    export_dataset(run, "coco", tmp_path / "out")
    with pytest.raises(StaleArtifact, match="rle is True and was False"):
        export_dataset(run, "coco", tmp_path / "out", rle=True)
    more = make_run(tmp_path / "more", units=2, unit_size=3)
    with pytest.raises(StaleArtifact, match="units of masks have changed"):
        export_dataset(more, "coco", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not written by"):
        export_dataset(run, "coco", tmp_path / "mine")
    for settings in ({"rle": True}, {"image_format": "webp"}, {"quality": 0}, {"val_ratio": 1.5}, {"size": 3}):
        with pytest.raises(ConfigError, match="export"):
            export_dataset(run, "yolo", tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


# -- the command


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["synthgen", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return int(str(end.value.code))


def test_the_command_writes_beside_the_run_and_says_where(
    source: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--run", source.path, "--format", "coco", "--out", tmp_path / "out", "--set", "rle=true") == 0
    told = capsys.readouterr().out
    assert "12 samples" in told
    assert f"coco: {tmp_path / 'out'}" in told
    whole = json.loads((tmp_path / "out/annotations/instances.json").read_text())
    assert isinstance(whole["annotations"][0]["segmentation"]["counts"], str)


def test_a_run_without_masks_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", units=1, unit_size=2, masks=False)
    assert command("--run", run.path, "--format", "yolo") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"synthgen masks --run {run.path}" in told
    assert not (run.path / "export-yolo").exists()


def test_a_unit_without_masks_says_what_to_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", units=2, unit_size=2)
    run.tar("masks", 1).with_suffix(".json").unlink()
    with pytest.raises(MissingArtifact, match=r"1 of 2 units .* synthgen masks --run"):
        export_dataset(run, "labels")


def test_images_are_those_of_the_run(source: Run, tmp_path: Path) -> None:
    export_dataset(source, "yolo", tmp_path / "out")
    for key, members in source.read("images", 0):
        (path,) = (tmp_path / "out/images").glob(f"*/{key}.jpg")
        pixels = np.asarray(Image.open(io.BytesIO(members["png"])), np.int16)
        assert np.abs(np.asarray(Image.open(path), np.int16) - pixels).mean() < 6
