"""Shards: what is in them, that they are the same every time, and what happens when something goes wrong."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from synthgen import codecs
from synthgen.card import MASK_COLUMNS, PromptCount, count_split, parquet_bytes, prompt_figures
from synthgen.config import Choice
from synthgen.engines.accelerate import Accelerate
from synthgen.engines.local import Local
from synthgen.errors import CorruptFile, MissingArtifact, StaleArtifact, UnitsFailed
from synthgen.records import Prompt, Report
from synthgen.run import Run
from synthgen.runner import Progress, run_stage
from synthgen.stages import Stage, Worker
from synthgen.stages.masks import Masks
from synthgen.stages.shards import Shards, _layout
from synthgen.stores.tar import TarWriter, read_tar
from tests.factories import Drawn, TrueMasks, make_run

ROOT = Path(__file__).parents[2]
SETTINGS = {"samples_per_shard": 10, "val_ratio": 0.25}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 36 samples in three units, images and masks; tests take copies."""
    path = tmp_path_factory.mktemp("source") / "run"
    make_run(path, units=3, unit_size=12)
    return path


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    return copy(source, tmp_path / "run")


def copy(source: Path, path: Path) -> Run:
    shutil.copytree(source, path)
    return Run.open(path)


def pack(run: Run, workers: int = 1, **settings: object) -> Run:
    run_stage(Shards(**(SETTINGS | settings)), run, Local(workers=workers))
    return run


def hashes(run: Run) -> dict[str, str]:
    folder = run.folder("shards")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("_stats.json")  # they hold the time
    }


def samples(run: Run, split: str = "*") -> dict[str, dict[str, bytes]]:
    tars = sorted(run.folder("shards").glob(f"{split}/*.tar"))
    return {key: members for path in tars for key, members in read_tar(path)}


def test_every_sample_occurs_once_with_the_same_members(run: Run) -> None:
    pack(run)
    keys = [key for path in run.folder("shards").glob("*/*.tar") for key, _ in read_tar(path)]
    assert len(keys) == len(set(keys)) == 36
    assert set(keys) == {key for unit in range(3) for key in run.keys("images", unit)}
    assert {tuple(members) for members in samples(run).values()} == {("cls", "jpg", "json", "mask.png", "txt")}


def test_image_mask_and_metadata_are_those_of_the_source(run: Run) -> None:
    pack(run)
    packed = samples(run)
    classes = json.loads((run.folder("shards") / "dataset.json").read_text())["classes"]
    for unit in range(3):
        masks = dict(run.read("masks", unit))
        for key, members in run.read("images", unit):
            request, pixels, _ = codecs.decode_image(key, members)
            prompt, sample = request.prompt, packed[key]
            image = np.asarray(Image.open(io.BytesIO(sample["jpg"])), np.int16)
            assert np.abs(image - pixels).mean() < 6  # noise at quality 95
            mask = Image.open(io.BytesIO(sample["mask.png"]))
            truth = codecs.decode_masks(key, masks[key]).values
            assert mask.mode == "L"
            assert np.array_equal(codecs.labels_to_masks(np.asarray(mask), len(prompt.words)), truth)
            meta = json.loads(sample["json"])
            assert sample["txt"].decode() == meta["prompt"] == prompt.text
            assert (meta["key"], meta["seed"], meta["label"]) == (key, request.seed, prompt.label)
            assert (meta["width"], meta["height"], tuple(meta["words"])) == (64, 64, prompt.words)
            assert [prompt.text[slice(*span)] for span in meta["spans"]] == list(prompt.words)
            assert classes[int(sample["cls"])] == prompt.label
            for described, value in zip(meta["masks"], truth, strict=True):
                left, top, right, bottom = described["box"]
                assert value[top:bottom, left:right].sum() == value.sum()
                assert value[top:bottom, left].any() and value[top, left:right].any()  # noqa: PT018
                assert value[top:bottom, right - 1].any() and value[bottom - 1, left:right].any()  # noqa: PT018
                assert described["area"] == pytest.approx(value.mean(), abs=1e-6)
                assert described["score"] == 0.5
                assert described["instances"] == [{"area": described["area"], "box": described["box"]}]
                assert (described["components"], described["touches_border"]) == (1, False)


def test_two_runs_one_and_two_workers_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    one = hashes(pack(copy(source, tmp_path / "one" / "run")))
    assert one == hashes(pack(copy(source, tmp_path / "two" / "run"), workers=2))
    assert {"train/000000.tar", "train/000000.parquet", "index.json", "README.md"} <= one.keys()


def test_side_files_agree_with_the_tars(run: Run) -> None:
    pack(run)
    folder = run.folder("shards")
    described = json.loads((folder / "dataset.json").read_text())
    for shard in described["shards"]:
        path = folder / shard["file"]
        keys = [key for key, _ in read_tar(path)]
        stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
        assert shard["samples"] == stats["count"] == stats["successes"] == len(keys)
        assert shard["sha256"] == stats["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == stats["bytes"] == path.stat().st_size
        table = parquet.read_table(path.with_suffix(".parquet"))
        assert table.column_names[0] == "key"
        assert table["key"].to_pylist() == keys
        assert json.loads((path.parent / "sizes.json").read_text())[path.name] == len(keys)
    counts = [shard["samples"] for shard in described["shards"] if shard["split"] == "train"]
    assert set(counts[:-1]) == {10}
    assert sum(split["samples"] for split in described["splits"].values()) == 36
    assert described["splits"]["train"]["labels"].keys() == {"disc", "square"}


def test_columns_of_the_parquet_have_fixed_types(run: Run) -> None:
    schemas = [parquet.read_schema(path) for path in pack(run).folder("shards").glob("*/*.parquet")]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert not [field.name for field in schemas[0] if "null" in str(field.type)]
    for key, members in samples(run).items():  # the table leaves nothing of the json out
        assert set(json.loads(members["json"])) - {"masks"} <= set(schemas[0].names), key


def test_quality_figures_of_masks_are_in_the_json_and_the_parquet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", units=1, unit_size=6, masks=False)
    run_stage(Masks(), run, Local(workers=1))
    pack(run)
    stored = {key: json.loads(members["json"])["masks"] for key, members in run.read("masks", 0)}
    packed = {key: json.loads(members["json"])["masks"] for key, members in samples(run).items()}
    assert packed == stored
    assert all(0.5 < mask["confidence"] <= 1 and mask["sharpness"] > 0.5 for masks in stored.values() for mask in masks)
    tables = [parquet.read_table(path).to_pylist() for path in run.folder("shards").glob("*/*.parquet")]
    for row in (row for table in tables for row in table):
        for name in MASK_COLUMNS:
            assert row[f"mask_{name}"] == [mask[name] for mask in stored[row["key"]]]


def test_objects_are_separated_unless_instances_is_off(source: Path, tmp_path: Path) -> None:
    for number, expected in enumerate(([72, 16], [88])):
        run = copy(source, tmp_path / str(number))
        members = dict(run.read("masks", 0))
        run.tar("masks", 0).with_suffix(".json").unlink()
        with run.write("masks", 0) as masks:
            for key, old in members.items():
                found = codecs.decode_masks(key, old)
                values = np.zeros_like(found.values)
                values[0, 4:12, 4:13], values[0, 40:44, 40:44] = True, True
                masks.add(key, codecs.encode_masks(replace(found, values=values)))
        pack(run, instances=not number)
        (mask, *_) = json.loads(samples(run)["0000000000"]["json"])["masks"]
        assert [round(one["area"] * 64 * 64) for one in mask["instances"]] == expected
        assert mask["instances"][0]["box"] == ([4, 4, 44, 44] if number else [4, 4, 13, 12])


def test_a_sample_with_a_mask_comes_first(source: Path, tmp_path: Path) -> None:
    run = copy(source, tmp_path / "run")
    members = dict(run.read("masks", 0))
    run.tar("masks", 0).with_suffix(".json").unlink()
    with run.write("masks", 0) as masks:
        for number, (key, old) in enumerate(members.items()):
            found = codecs.decode_masks(key, old)
            if number < 3:
                why = ("too small: covers nothing",) * len(found.words)
                found = replace(found, values=np.zeros_like(found.values), dropped=why)
            masks.add(key, codecs.encode_masks(found))
    pack(run, val_ratio=0.0, shuffle=False)
    first = [key for key, _ in read_tar(run.folder("shards") / "train/000000.tar")]
    assert first[:4] == ["0000000003", "0000000000", "0000000001", "0000000002"]


# -- splits and order


def test_the_split_does_not_depend_on_order_or_number_of_units(source: Path, tmp_path: Path) -> None:
    first = set(samples(pack(copy(source, tmp_path / "a")), "val"))
    for number, settings in enumerate(({"shuffle": False}, {"samples_per_shard": 3}, {"image_format": "png"})):
        assert set(samples(pack(copy(source, tmp_path / str(number)), **settings), "val")) == first
    more = set(samples(pack(make_run(tmp_path / "more", units=4, unit_size=12)), "val"))
    assert {key for key in more if key < "0000030000"} == first
    assert 0 < len(first) < 36


def test_another_seed_gives_another_split_and_order(source: Path, tmp_path: Path) -> None:
    keys = [list(samples(pack(copy(source, tmp_path / "0"))))]
    Run.create(tmp_path / "1", seed=1)
    keys.append(list(samples(pack(make_run(tmp_path / "1", units=3, unit_size=12)))))
    assert keys[0] != keys[1]


def test_samples_are_shuffled_or_in_the_order_of_their_keys(source: Path, tmp_path: Path) -> None:
    plain = list(samples(pack(copy(source, tmp_path / "plain"), shuffle=False, val_ratio=0.0)))
    mixed = list(samples(pack(copy(source, tmp_path / "mixed"), val_ratio=0.0)))
    assert plain == sorted(plain) == sorted(mixed) != mixed
    assert len({key[:6] for key in mixed[:10]}) == 1  # a shard holds neighbouring units: each is read once


def test_a_worker_verifies_each_unit_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of val look at every unit again."""
    from synthgen import run as runs

    real, verified = runs.verify_sha256, collections.Counter[str]()

    def check(path: Path, sha256: str, again: str) -> None:
        verified[path.relative_to(run.path).as_posix()] += 1
        real(path, sha256, again)

    monkeypatch.setattr(runs, "verify_sha256", check)
    pack(run, samples_per_shard=5)
    assert verified == {f"{name}/{unit:06d}.tar": 1 for name in ("images", "masks") for unit in range(3)}


def test_no_shard_is_written_after_the_settings_were_replaced(run: Run) -> None:
    stage = Shards(**SETTINGS)
    late = run.claim(stage)
    claimed = late.__enter__()
    prepared = stage.prepare(claimed)
    (run.folder("shards") / "settings.yaml").unlink()  # the same command elsewhere failed, and took its settings back
    pack(run, samples_per_shard=12)
    before = {path: path.read_bytes() for path in run.folder("shards").rglob("*") if path.is_file()}
    with prepared.open(claimed, Worker()) as work, pytest.raises(StaleArtifact, match="other settings since this one"):
        work(0)
    assert {path: path.read_bytes() for path in run.folder("shards").rglob("*") if path.is_file()} == before
    with pytest.raises(StaleArtifact):
        late.__exit__(None, None, None)


def test_images_that_failed_are_in_no_shard(run: Run) -> None:
    """The done mark knows them: the tars are not read for the layout."""
    unit = run.tar("images", 0)
    samples = list(read_tar(unit))
    with TarWriter(unit) as tar:
        for key, members in samples[:1] + samples[2:]:
            tar.add(key, members)
    mark = json.loads(unit.with_suffix(".json").read_text())
    mark |= {"count": tar.count, "bytes": tar.size, "sha256": tar.sha256, "failed": {samples[1][0]: "black"}}
    unit.with_suffix(".json").write_text(json.dumps(mark))
    packed = sorted(key for shard in Shards().layout(run) for key in shard.keys)
    assert packed == [key for unit in run.units("images") for key in run.keys("images", unit)]
    assert samples[1][0] not in packed


def test_a_mark_that_counts_too_many_samples_is_refused(run: Run) -> None:
    mark = run.tar("images", 1).with_suffix(".json")
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"count": 2**62}))
    with pytest.raises(CorruptFile, match=r"000001.tar counts 4611686018427387904 samples; delete both"):
        Shards().layout(run)


def test_no_val_folder_without_val_samples(run: Run) -> None:
    pack(run, val_ratio=0.0)
    folder = run.folder("shards")
    assert not (folder / "val").exists()
    assert not (folder / "index-val.json").exists()
    assert "val/*.tar" not in (folder / "README.md").read_text()


def test_classes_follow_the_prompts_of_the_run(run: Run) -> None:
    prompts = [Prompt("a square", label="square"), Prompt("a ring", label="ring"), Prompt("a disc", label="disc")]
    lines = [json.dumps(codecs.prompt_to_json(prompt)) for prompt in prompts]
    (run.path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    pack(run)
    assert json.loads((run.folder("shards") / "dataset.json").read_text())["classes"] == ["square", "ring", "disc"]
    for sample in samples(run).values():
        assert int(sample["cls"]) == {"square": 0, "disc": 2}[json.loads(sample["json"])["label"]]


def test_the_labels_of_images_are_read_once_for_all_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no prompts, they stand in the json of each image."""
    alone = pack(copy(run.path, run.path.parent / "alone"))
    read = list[Path]()
    monkeypatch.setattr(
        "synthgen.stages._classes.read_tar", lambda tar, names: read.append(tar) or read_tar(tar, names)
    )

    class Elsewhere(Accelerate):
        def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
            for unit in units:
                yield from Local(workers=1).map(pickle.loads(pickle.dumps(stage)), run, [unit], Progress())

    run_stage(Shards(**SETTINGS), run, Elsewhere())
    assert read == [run.tar("images", unit) for unit in range(3)]
    assert samples(run) == samples(alone)


def test_no_sample_has_a_class_if_one_prompt_has_no_label(run: Run) -> None:
    prompts = [Prompt("a square", label="square"), Prompt("a disc", label="disc"), Prompt("a cloud")]
    lines = [json.dumps(codecs.prompt_to_json(prompt)) for prompt in prompts]
    (run.path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    pack(run)
    assert {tuple(members) for members in samples(run).values()} == {("jpg", "json", "mask.png", "txt")}
    assert "class_label" not in (run.folder("shards") / "README.md").read_text()


# -- what the card says


def card_of(run: Run) -> str:
    return (run.folder("shards") / "README.md").read_text()


def test_card_and_dataset_have_the_versions_that_made_the_images(run: Run) -> None:
    noted = run.folder("images") / "settings.yaml"
    entry = yaml.safe_load(noted.read_text())
    here = dict(entry["versions"])
    entry["versions"] |= {"torch": "2.4.0", "diffusers": "0.30.0"}
    noted.write_text(yaml.safe_dump(entry, sort_keys=False))
    pack(run)
    described = json.loads((run.folder("shards") / "dataset.json").read_text())
    assert described["made_with"] == {"images": entry["versions"], "masks": here}
    assert described["versions"] == here
    first, second = (line for line in card_of(run).splitlines() if line.startswith(("- images", "- masks")))
    assert first.startswith("- images: python")
    assert "diffusers 0.30.0" in first
    assert second.startswith("- masks, shards: python")
    assert f"torch {here['torch']}" in second


def test_the_card_counts_prompts_of_val_that_are_in_train(source: Path, tmp_path: Path) -> None:
    run = pack(copy(source, tmp_path / "both"))
    assert "3 different prompts (3 of the 3 in val are in train as well), such as:" in card_of(run)
    run = copy(source, tmp_path / "own")
    val = next(shard for shard in Shards(**SETTINGS).layout(run) if shard.split == "val").keys[0]
    (unit,) = {int(val[:6])}
    members = dict(run.read("images", unit))
    run.tar("images", unit).with_suffix(".json").unlink()
    with run.write("images", unit) as images:
        for key, old in members.items():
            meta = json.loads(old["json"])
            meta["prompt"] += ", alone" * (key == val)
            images.add(key, old | {"json": json.dumps(meta).encode()})
    prompts = json.loads((pack(run).folder("shards") / "dataset.json").read_text())["prompts"]
    assert (prompts["distinct"], prompts["val"], prompts["val_in_train"]) == (4, 4, 3)
    assert "(3 of the 4 in val are in train as well)" in card_of(run)
    assert "in train as well" not in card_of(pack(copy(source, tmp_path / "none"), val_ratio=0.0))


def test_a_word_marked_twice_in_an_image_counts_once(tmp_path: Path) -> None:
    row = {"prompt": "p", "label": "", "width": 8, "height": 8}
    rows = [row | {"words": ["dog", "cat", "dog"]}, row | {"words": ["dog"]}, row | {"words": []}]
    (tmp_path / "000000.parquet").write_bytes(parquet_bytes(rows, masks=False))
    counts, _ = count_split(tmp_path, [{"file": "000000.tar", "samples": 3, "bytes": 1}])
    assert counts["words"] == {"cat": 1, "dog": 2}


def test_prompts_are_counted_in_little_memory():
    """Of millions of prompts no process holds all; a text of these takes 90 bytes by itself."""
    count = PromptCount()
    tracemalloc.start()
    for shard in range(50):
        count.add([f"a photo of the {number % 30_000:012d}" for number in range(1000 * shard, 1000 * shard + 1000)])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 16 * 50_000
    other = PromptCount()
    other.add(["a photo of the 000000000007", "something else"])
    assert prompt_figures(count, other) == {
        "distinct": 30_001, "examples": [f"a photo of the {number:012d}" for number in range(10)],
        "val": 2, "val_in_train": 1,
    }  # fmt: skip
    assert prompt_figures(PromptCount(), PromptCount()) == {"distinct": 0, "examples": []}


@pytest.mark.parametrize(
    ("refine", "told"), [("threshold", "threshold"), ("attentioncut", "synthgen's own attentioncut")]
)
def test_the_card_names_the_refiner(tmp_path: Path, refine: str, told: str) -> None:
    run = make_run(tmp_path / "run", units=1, unit_size=2, masks=False)
    run_stage(Masks(refine=Choice(refine)), run, Local(workers=1))
    assert f"attention while it generated the image, refined by {told}. No person" in card_of(pack(run))


# -- settings


def test_png_is_the_source_unchanged(run: Run) -> None:
    pack(run, image_format="png")
    packed = samples(run)
    for key, members in run.read("images", 0):
        assert packed[key]["png"] == members["png"]


def test_webp(run: Run) -> None:
    pack(run, image_format="webp", quality=80)
    assert Image.open(io.BytesIO(next(iter(samples(run).values()))["webp"])).format == "WEBP"


def test_without_masks_the_masks_stage_need_not_have_run(tmp_path: Path) -> None:
    run = pack(make_run(tmp_path / "run", units=1, masks=False), masks=False)
    assert {tuple(members) for members in samples(run).values()} == {("cls", "jpg", "json", "txt")}
    assert "masks" not in json.loads(next(iter(samples(run).values()))["json"])
    assert "mask" not in (run.folder("shards") / "README.md").read_text()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("samples_per_shard", 0),
        ("val_ratio", 1.0),
        ("val_ratio", -0.1),
        ("image_format", "gif"),
        ("quality", 0),
        ("quality", 101),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        Shards(**{setting: value})


# -- what an earlier stage left undone, or spoiled


def test_a_run_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match="synthgen masks"):
        pack(make_run(tmp_path / "run", units=1, masks=False))


def test_a_unit_without_masks_is_refused(run: Run) -> None:
    run.tar("masks", 1).with_suffix(".json").unlink()
    with pytest.raises(MissingArtifact, match=r"1 of 3 units.*000001.*synthgen masks") as caught:
        pack(run)
    assert "\n" not in str(caught.value)
    assert not run.folder("shards").exists()


def test_a_unit_without_maps_names_the_stage_that_makes_them(run: Run) -> None:
    for name, unit in (("masks", 1), ("masks", 2), ("maps", 2)):
        run.tar(name, unit).with_suffix(".json").unlink()
    with pytest.raises(MissingArtifact) as caught:
        pack(run)
    assert str(caught.value) == (
        f"1 of 3 units of {run.path} have neither masks nor maps yet (first: 000002); run: {run.remedy('images')} and "
        f"then: {run.remedy('masks')}, or leave masks out with --set masks=false"
    )
    assert run.remedy("images") != run.remedy("masks")


@pytest.mark.parametrize("artifact", ["images", "masks"])
def test_a_unit_with_other_settings_is_never_packed_with_the_others(run: Run, artifact: str) -> None:
    path = run.tar(artifact, 1).with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    told = rf"1 of 3 units of {run.folder(artifact)} were made with other settings .*000001.*: {run.remedy(artifact)}$"
    with pytest.raises(StaleArtifact, match=told) as caught:
        pack(run)
    assert "\n" not in str(caught.value)
    assert not run.folder("shards").exists()


def test_runtime_fields_are_no_settings(run: Run) -> None:
    stage = Shards(**SETTINGS)
    fields, settings = dict(vars(stage)), stage.settings()
    stage.inputs(run)
    with run.claim(stage) as claimed:
        prepared = stage.prepare(claimed)
        assert vars(stage) == fields
        assert (prepared._units, prepared._labels) == ({0, 1, 2}, ["disc", "square"])
        assert prepared == stage
        assert prepared.settings() == settings
        assert not any(name.startswith("_") for name in settings)
        assert replace(prepared, quality=80)._units is None  # what was found was found for other settings


def test_a_sample_without_masks_is_named(run: Run) -> None:
    run.tar("masks", 1).with_suffix(".json").unlink()  # what is done is not written again
    with run.write("masks", 1) as masks:
        for key, members in read_tar(run.tar("masks", 0)):
            masks.add(key.replace("000000", "000001", 1).replace("0000010003", "0000010999"), members)
    with pytest.raises(UnitsFailed, match=r"MissingArtifact: .*000001.tar has no sample 0000010003.*synthgen masks"):
        pack(run)


def test_units_with_masks_of_some_images_are_named(run: Run) -> None:
    run.tar("masks", 1).with_suffix(".json").unlink()
    with run.write("masks", 1) as masks:
        for key, members in list(read_tar(run.tar("masks", 0)))[:1]:
            masks.add(key.replace("000000", "000001", 1), members)
    with pytest.raises(MissingArtifact, match=r"1 of 3 units of .* have not all masks yet \(first: 000001\); run: syn"):
        pack(run)


def test_more_units_make_old_shards_stale(run: Run) -> None:
    pack(run)
    before = hashes(run)
    with run.write("images", 3) as images, run.write("masks", 3) as masks:
        for key, members in run.read("images", 0):
            images.add(key.replace("000000", "000003", 1), members)
        for key, members in run.read("masks", 0):
            masks.add(key.replace("000000", "000003", 1), members)
    with pytest.raises(StaleArtifact, match="units of images"):
        pack(run)
    assert hashes(run) == before
    shutil.rmtree(run.folder("shards"))
    assert len(samples(pack(run))) == 48


class Meanwhile(Progress):
    """Stands for another command, which does something when the shards have been claimed."""

    def __init__(self, doing: Callable[[], object]) -> None:
        self.doing = doing

    def start(self, stage: str, total: int, done: int) -> None:
        self.doing()


def test_units_added_while_packing_go_into_no_shard(source: Path, run: Run, tmp_path: Path) -> None:
    late = [run.tar(name, 1).with_suffix(end) for name in ("masks", "images") for end in (".tar", ".json")]
    for path in late:
        path.unlink()
    alone = hashes(pack(copy(run.path, tmp_path / "alone" / "run")))
    more = Meanwhile(lambda: [shutil.copy(source / path.relative_to(run.path), path) for path in late])
    run_stage(Shards(**SETTINGS), run, Local(workers=2), more)  # its workers open after that
    assert all(path.is_file() for path in late)
    assert len(samples(run)) == 24
    assert hashes(run) == alone


def test_the_layout_of_a_claimed_run_is_pickled_with_the_stage(source: Path, run: Run) -> None:
    stage = Shards(**SETTINGS)
    mark = run.tar("images", 1).with_suffix(".json")
    mark.unlink()
    with run.claim(stage) as claimed:
        stage = stage.prepare(claimed)
        before = [shard.keys for shard in stage.layout(claimed)]
        shutil.copy(source / "images" / mark.name, mark)
        _layout.cache_clear()  # as in another process
        elsewhere, held = pickle.loads(pickle.dumps((stage, claimed)))
        assert [shard.keys for shard in elsewhere.layout(held)] == before
        _layout.cache_clear()
        with pytest.raises(StaleArtifact, match=rf"the images of {run.path} have changed since .* run this one again"):
            Shards(**SETTINGS).layout(claimed)  # which of the units are meant is not known
        run.tar("images", 2).unlink()
        with pytest.raises(StaleArtifact, match="another one made or deleted some"):
            elsewhere.layout(held)


def test_a_shard_that_another_process_has_made_is_not_made_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rival(Accelerate):
        def map(self, stage: Stage, run: Run, units: Sequence[int], progress: Progress) -> Iterator[Report]:
            for _ in Local(workers=1).map(stage, run, [1, 3], Progress()):
                pass
            made.update({path: path.stat().st_mtime_ns for path in run.folder("shards").glob("*/*.tar")})
            yield from super().map(stage, run, units, progress)

    made: dict[Path, int] = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_stage(Shards(**SETTINGS), run, Rival())
    assert len(made) == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_no_failure_file_is_left_when_all_shards_are_made(run: Run) -> None:
    note = run.folder("shards") / "000001.failed.json"
    killed = Meanwhile(lambda: note.write_text('{"unit": 1, "error": "OSError: once"}'))
    run_stage(Shards(**SETTINGS), run, Local(workers=1), killed)
    assert not note.exists()  # its own shard took it away
    killed.doing()  # that shard's worker was killed before it did
    pack(run)
    assert run.failures("shards") == {}
    assert not note.exists()


def test_other_settings_are_refused_and_named(run: Run) -> None:
    pack(run)
    with pytest.raises(StaleArtifact, match="quality is 80 and was 95"):
        pack(run, quality=80)


@pytest.mark.parametrize("artifact", ["images", "masks"])
@pytest.mark.parametrize("end", [0, 5000, -10240])
def test_a_truncated_tar_is_found_before_anything_is_written(run: Run, artifact: str, end: int) -> None:
    path = run.tar(artifact, 1)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(CorruptFile, match=rf"{artifact}.000001.tar .*cut off.*synthgen (generate|masks)") as caught:
        pack(run)
    assert "\n" not in str(caught.value)
    assert not run.folder("shards").exists()


@pytest.mark.parametrize("artifact", ["images", "masks"])
def test_damage_inside_a_member_is_found(run: Run, artifact: str) -> None:
    path = run.tar(artifact, 1)
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT" if artifact == "images" else b"PK") + 60
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    says = rf"{artifact}.000001.tar .*a byte of it is wrong.*delete it and run: synthgen (generate|masks)"
    with pytest.raises((CorruptFile, UnitsFailed), match=says) as caught:
        pack(run, samples_per_shard=9, val_ratio=0.1)
    assert "\n" not in str(caught.value)


def test_an_empty_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run_stage(Drawn(units=1, unit_size=0), run, Local(workers=1))
    run_stage(TrueMasks(), run, Local(workers=1))
    with pytest.raises(MissingArtifact, match="no image to pack"):
        pack(run)


# -- death and full disks

SCRIPT = """
import os, resource, signal, sys
from synthgen.engines.local import Local
from synthgen.errors import SynthgenError
from synthgen.run import Run
from synthgen.runner import Progress, run_stage
from synthgen.stages import shards

def die(): os.kill(os.getpid(), signal.SIGKILL)

class Doom(Progress):
    seen = 0
    def advance(self, count):
        self.seen += count
        if when == f"sample {self.seen}": die()
        if when == "full disk" and self.seen == 15:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def doomed(write):
    def stand_in(path, value):
        if path.name == when: die()
        write(path, value)
    return stand_in

when = sys.argv[2]
shards.write_json, shards.write_bytes = doomed(shards.write_json), doomed(shards.write_bytes)
try:
    run_stage(shards.Shards(samples_per_shard=10, val_ratio=0.25), Run.open(sys.argv[1]), Local(workers=1), Doom())
except SynthgenError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def doomed(run: Run, when: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run.path), when]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_after_a_kill_at_any_moment_the_next_call_makes_the_same_bytes(source: Path, run: Run, tmp_path: Path) -> None:
    whole = hashes(pack(copy(source, tmp_path / "whole" / "run")))
    for when in ("sample 7", "000000.parquet", "sample 4", "000001_stats.json", "sizes.json", "README.md"):
        assert doomed(run, when).returncode == -9, when
        assert not (run.folder("shards") / "README.md").exists()
    pack(run)
    assert hashes(run) == whole  # and no temporary file is left
    assert not [path for path in run.folder("shards").rglob("*") if path.suffix == ".tmp"]


def test_a_full_disk_damages_no_shard(source: Path, run: Run, tmp_path: Path) -> None:
    whole = hashes(pack(copy(source, tmp_path / "whole" / "run")))
    ended = doomed(run, "full disk")
    assert "UnitsFailed" in ended.stderr
    assert "StorageError: cannot write" in ended.stderr
    assert "train/000001.tar" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert hashes(run)["train/000000.tar"] == whole["train/000000.tar"]
    assert not (run.folder("shards") / "train/000001.tar").exists()
    pack(run)
    assert hashes(run) == whole


def test_a_folder_that_cannot_be_written(run: Run) -> None:
    run.folder("shards").mkdir()
    (run.folder("shards") / "train").write_text("in the way")
    with pytest.raises(UnitsFailed, match="StorageError: cannot write"):
        pack(run)


def test_only_lost_shards_are_made_again(run: Run) -> None:
    before, folder = hashes(pack(run)), run.folder("shards")
    tars = sorted(folder.glob("*/*.tar"))
    times = {path: path.stat().st_mtime_ns for path in tars}
    (folder / "train/000000.parquet").unlink()
    (folder / "train/000001.tar").unlink()
    (folder / "val/000000_stats.json").unlink()
    pack(run)
    assert hashes(run) == before
    made = {str(path.relative_to(folder)) for path in tars if path.stat().st_mtime_ns != times[path]}
    assert made == {"train/000000.tar", "train/000001.tar", "val/000000.tar"}
    assert len(tars) > 3
