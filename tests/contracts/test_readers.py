"""webdataset, wids, Hugging Face datasets and open_clip's rules read the shards as they are."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import webdataset
from PIL import Image

from synthgen import codecs
from synthgen.card import MASK_COLUMNS
from synthgen.engines.local import Local
from synthgen.records import Generation, Prompt, Report, Request, WordMasks, sample_key
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Stage, Work, Worker
from synthgen.stages.shards import Shards
from synthgen.stores.tar import read_tar
from tests.factories import make_generation, make_run

TEXTS = {"a photo of a disc", "a photo of a square", "a photo of a disc and a square"}


@dataclass(frozen=True)
class Wordless(Stage):
    """Images and masks of which the first ten have no words: no list in their JSON holds anything."""

    name: ClassVar = "generate"
    reads: ClassVar = ()
    writes: ClassVar = ("images", "masks")

    empty: int = 10
    size_of_unit: int = 14

    def plan(self, run: Run) -> list[int]:
        return [0]

    def size(self, run: Run, unit: int) -> int:
        return self.size_of_unit

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        def work(unit: int) -> Report:
            with run.write("images", unit) as images, run.write("masks", unit) as masks:
                for row in range(self.size_of_unit):
                    drawn, truth = make_generation(sample_key(unit, row), seed=row, label=None)
                    prompt, warnings = drawn.request.prompt, ()
                    if row < self.empty:
                        prompt, truth, warnings = Prompt("of the and"), truth[:0], ("no word to mask",)
                    request = Request(drawn.request.key, prompt, row)
                    images.add(request.key, codecs.encode_image(Generation(request, drawn.image, drawn.maps, warnings)))
                    scores = np.full(len(truth), 0.25, np.float32)
                    found = WordMasks(prompt.words, truth, scores, ("",) * len(truth))
                    masks.add(request.key, codecs.encode_masks(found))
            return Report(unit, self.size_of_unit)

        yield work


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 samples in train shards of ten and one val shard, all with a label and masks."""
    run = make_run(tmp_path_factory.mktemp("readers") / "run", units=4, unit_size=8)
    run_stage(Shards(samples_per_shard=10, val_ratio=0.2), run, Local(workers=1))
    return run.folder("shards")


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that begin with samples without words."""
    run = Run.create(tmp_path_factory.mktemp("wordless") / "run")
    run_stage(Wordless(), run, Local(workers=1))
    run_stage(Shards(val_ratio=0.0, shuffle=False), run, Local(workers=1))
    return run.folder("shards")


def train(shards: Path) -> list[str]:
    return [str(path) for path in sorted(shards.glob("train/*.tar"))]


def split_size(shards: Path, split: str) -> int:
    size: int = json.loads((shards / "dataset.json").read_text())["splits"][split]["samples"]
    return size


# -- webdataset


def test_webdataset_reads_tuples(shards: Path) -> None:
    dataset = webdataset.WebDataset(train(shards), shardshuffle=False).decode("pil")
    rows = list(dataset.to_tuple("jpg", "txt", "cls", "mask.png", "json"))
    assert len(rows) == split_size(shards, "train")
    for image, text, label, mask, meta in rows:
        assert (image.size, image.mode) == ((64, 64), "RGB")
        assert text == meta["prompt"]
        assert text in TEXTS
        assert meta["label"] == ["disc", "square"][label]
        values = np.asarray(mask)  # decode("pil") makes everything RGB: the mask's value stands in each channel
        assert np.array_equal(values[..., 0], values[..., 2])
        assert set(np.unique(values)) == {0, *(described["value"] for described in meta["masks"])}


def test_webdataset_batches_in_worker_processes(shards: Path) -> None:
    dataset = (
        webdataset.WebDataset(train(shards), shardshuffle=10, seed=0)
        .shuffle(10)
        .decode("l8")
        .to_tuple("__key__", "mask.png")
    )
    loader = webdataset.WebLoader(dataset, batch_size=4, num_workers=2)
    keys = [key for batch, _ in loader for key in batch]
    assert len(keys) == len(set(keys)) == split_size(shards, "train")


# -- PyTorch


def test_the_snippet_of_open_dataset_runs(shards: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/format.md").read_text(encoding="utf-8")
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "open_dataset" in code]
    snippet = snippet.replace("runs/demo/shards/train", str(shards / "train")).replace('"dog"', "sample.words[0]")
    scope: dict[str, Any] = {"seen": []}
    exec(snippet.replace("    ...", "    seen.append((images, texts))"), scope)
    assert scope["dog"].any()
    assert scope["dog"].shape == (64, 64)
    assert sum(len(images) for images, _ in scope["seen"]) == split_size(shards, "train")
    assert {tuple(images.shape[1:]) for images, _ in scope["seen"]} == {(64, 64, 3)}
    assert {text for _, texts in scope["seen"] for text in texts} <= TEXTS


# -- wids


@pytest.mark.parametrize(("index", "split"), [("index.json", "train"), ("index-val.json", "val")])
def test_wids_reads_any_sample_by_number(shards: Path, index: str, split: str) -> None:
    wids = pytest.importorskip("wids")
    dataset = wids.ShardListDataset(str(shards / index), localname=str)
    assert len(dataset) == split_size(shards, split)
    keys = [key for path in sorted(shards.glob(f"{split}/*.tar")) for key, _ in read_tar(path)]
    for number in (len(dataset) - 1, 0, len(dataset) // 2):
        sample = dataset[number]
        assert sample["__key__"] == keys[number] == sample[".json"]["key"]
        assert sample[".jpg"].size == sample[".mask.png"].size == (64, 64)
        assert sample[".txt"] in TEXTS
        assert sample[".cls"] in (0, 1)
    assert not list(shards.rglob("*.lock"))


def test_wids_copies_to_its_own_cache(shards: Path, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids")
    dataset = wids.ShardListDataset(str(shards / "index.json"), cache_dir=str(tmp_path))
    assert dataset[3][".json"]["width"] == 64


# -- Hugging Face datasets


@pytest.fixture(scope="module")
def load_dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        datasets = pytest.importorskip("datasets")
        cache = str(tmp_path_factory.mktemp("hf"))

        def load(*args: Any, **kwargs: Any) -> Any:
            return datasets.load_dataset(*args, cache_dir=cache, **kwargs)

        yield load


def check_rows(rows: list[dict[str, Any]], count: int) -> None:
    assert len(rows) == count
    shape = {name: type(value) for name, value in rows[0]["json"].items()}
    for row in rows:
        assert {name: type(value) for name, value in row["json"].items()} == shape
        assert set(row["json"]["masks"][0]) == {"word", "value", *MASK_COLUMNS} if row["json"]["masks"] else True
        assert row["jpg"].size == row["mask.png"].size == (64, 64)
        assert row["mask.png"].mode == "L"
        assert row["mask.png"].getextrema()[1] == len(row["json"]["words"])
        assert row["__key__"] == row["json"]["key"]


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_loads_the_folder(shards: Path, load_dataset: Any, streaming: bool) -> None:
    for split, name in (("train", "train"), ("validation", "val")):
        dataset = load_dataset(str(shards), split=split, streaming=streaming)
        assert dataset.features["cls"].names == ["disc", "square"]
        rows = list(dataset)
        check_rows(rows, split_size(shards, name))
        stored = [
            json.loads(members["json"])
            for path in sorted(shards.glob(f"{name}/*.tar"))
            for _, members in read_tar(path)
        ]
        assert [row["json"] for row in rows] == stored  # a key that the card does not list would be dropped
        assert all("licence" in row["json"]["licence"] for row in rows)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_loads_a_list_of_tars(shards: Path, load_dataset: Any, streaming: bool) -> None:
    dataset = load_dataset("webdataset", data_files={"train": train(shards)}, split="train", streaming=streaming)
    check_rows(list(dataset), split_size(shards, "train"))


@pytest.mark.parametrize("by", ["folder", "files"])
def test_datasets_loads_samples_without_words_first(wordless: Path, load_dataset: Any, by: str) -> None:
    source = (str(wordless),) if by == "folder" else ("webdataset",)
    files = {} if by == "folder" else {"data_files": {"train": train(wordless)}}
    rows = list(load_dataset(*source, **files, split="train"))
    check_rows(rows, 14)
    assert sum(not row["json"]["words"] for row in rows) == 10
    assert {row["json"]["warnings"] for row in rows} == {"", "no word to mask"}


# -- open_clip: its reader needs torchvision and more, so its rules stand here


def test_open_clip_keeps_every_sample_and_knows_their_number(shards: Path) -> None:
    for folder in (shards / "train", shards / "val"):
        sizes = json.loads((folder / "sizes.json").read_text())
        tars = sorted(folder.glob("*.tar"))
        assert list(sizes) == [path.name for path in tars]  # contiguous, so that {000000..N}.tar names them all
        assert list(sizes) == [f"{number:06d}.tar" for number in range(len(tars))]
        for path in tars:
            samples = list(read_tar(path))
            assert sizes[path.name] == len(samples)
            for _, members in samples:
                found = [name for name in ("jpg", "png", "jpeg", "webp") if name in members]
                assert found == ["jpg"]  # the first of these is taken: a mask must not be called plain png
                assert Image.open(io.BytesIO(members["jpg"])).convert("RGB").size == (64, 64)
                assert members["txt"].decode("utf-8").strip()


# -- all of them


def test_keys_are_unique_and_members_equal_over_the_whole_set(shards: Path) -> None:
    samples = [sample for path in shards.glob("*/*.tar") for sample in read_tar(path)]
    assert len({key for key, _ in samples}) == len(samples) == 32
    assert all(re.fullmatch(r"\d{10}", key) for key, _ in samples)
    assert len({tuple(members) for _, members in samples}) == 1
    assert len({tuple(json.loads(members["json"])) for _, members in samples}) == 1


@pytest.mark.parametrize("library", ["webdataset", "wids", "datasets"])
def test_the_snippets_of_the_card_run(
    shards: Path, library: str, load_dataset: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (shards / "README.md").read_text(), re.DOTALL)
    (snippet,) = [
        snippet
        for snippet in snippets
        if f"import {library}" in snippet or f"import os, {library}" in snippet or f"from {library}" in snippet
    ]
    assert len(snippet.strip().splitlines()) <= 5
    monkeypatch.chdir(shards)
    exec(snippet.replace("path/to/this/folder", str(shards)), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if library == "wids" else split_size(shards, "train"))
