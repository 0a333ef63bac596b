"""The page of a run: what is in it, that nothing in it can act, and that it is made of what there is."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthgen import codecs
from synthgen.engines.local import Local
from synthgen.records import Maps, Prompt, Report, WordMasks, sample_key
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Work, Worker
from synthgen.stages.masks import Masks
from synthgen.status import RunStatus, Tally
from synthgen.stores.remote import RemotePath
from synthgen.tallies import Tallies
from synthgen.viewers.page import _attention, _segments, _spread, _summary, write_page
from tests.factories import Drawn, TrueMasks, make_generation, make_prompt, make_run

EVIL = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>{{data}}<!-- 🌄 "


@dataclass(frozen=True)
class Evil(Drawn):
    """Drawn samples whose prompts, labels and warnings are hostile; images are wide where ``wide``."""

    wide: int = 1

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        def work(unit: int) -> Report:
            with run.write("maps", unit) as maps, run.write("images", unit) as images:
                for row in range(self.unit_size):
                    words = ("disc", "square")[: 1 + row % 2]
                    made, _ = make_generation(sample_key(unit, row), words, self.image_size, seed=row)
                    plain = make_prompt(words)
                    spans = tuple((start + len(EVIL), stop + len(EVIL)) for start, stop in plain.spans)
                    prompt = Prompt(EVIL + plain.text, words, spans, f"<b>class {row % 2}")
                    made = replace(
                        made,
                        request=replace(made.request, prompt=prompt, seed=2**63 + row),
                        image=np.repeat(made.image, self.wide, axis=1),
                        warnings=("<i>cut",),
                    )
                    images.add(made.request.key, codecs.encode_image(made))
                    maps.add(made.request.key, codecs.encode_maps(made.maps))
            return Report(unit, self.unit_size)

        yield work


class Scripts(HTMLParser):
    """What a browser would make of the page: its elements, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        elif self.tags and self.tags[-1][0] == "title":
            self.title += data


def read(path: Path):
    page = Scripts(path.read_text(encoding="utf-8"))
    return json.loads(page.scripts[0])


def pixels(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_images_masks_and_attention_are_those_of_the_run(tmp_path):
    run = make_run(tmp_path / "demo")
    path = write_page(run)
    assert path == run.path / "view.html"
    data = read(path)
    assert [sample["key"] for sample in data["samples"]] == [
        sample_key(unit, row) for unit in (0, 1) for row in range(6)
    ]
    for unit in (0, 1):
        masks = {key: codecs.decode_masks(key, members) for key, members in run.read("masks", unit)}
        maps = dict(run.read("maps", unit))
        for key, members in run.read("images", unit):
            sample = next(sample for sample in data["samples"] if sample["key"] == key)
            request, image, _ = codecs.decode_image(key, members)
            assert np.array_equal(pixels(sample["image"]), image)
            assert np.array_equal(pixels(sample["masks"]["labels"]), codecs.masks_to_labels(masks[key].values))
            assert sample["masks"]["areas"] == pytest.approx(masks[key].values.mean((1, 2)), abs=1e-4)
            weights = codecs.decode_maps(key, maps[key], request.prompt.words).weights.astype(np.float32)
            strip = pixels(sample["attention"]["strip"]).reshape(weights.shape)
            low, high = weights.min((1, 2), keepdims=True), weights.max((1, 2), keepdims=True)
            assert strip / 255 == pytest.approx((weights - low) / (high - low), abs=0.5 / 255 + 1e-6)
            assert "".join(text for text, _ in sample["text"]) == request.prompt.text
            assert [text for text, word in sample["text"] if word >= 0] == list(request.prompt.words)
    images = next(artifact for artifact in data["artifacts"] if artifact["name"] == "images")
    assert (images["samples"], images["done"], images["planned"]) == (12, 2, 2)


def test_the_page_is_whole_in_itself_and_may_fetch_nothing(tmp_path):
    text = write_page(make_run(tmp_path / "demo")).read_text(encoding="utf-8")
    page = Scripts(text)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert "url(" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", page.scripts[1])


def test_prompts_stay_text(tmp_path):
    run = Run.create(tmp_path / "<b>run & co")
    run_stage(Evil(units=1, unit_size=2), run, Local(workers=1))
    path = write_page(run)
    page = Scripts(path.read_text(encoding="utf-8"))
    assert len(page.scripts) == 2  # the data and the page's own
    assert "<" not in page.scripts[0]
    assert page.title.startswith("<b>run & co")
    data = json.loads(page.scripts[0])
    assert "".join(text for text, _ in data["samples"][0]["text"]) == EVIL + "a photo of a disc"
    assert data["samples"][0]["seed"] == str(2**63)  # a number of JavaScript would be another


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "demo")
    first = write_page(run, tmp_path / "a.html").read_bytes()
    assert write_page(run, tmp_path / "b.html").read_bytes() == first


@pytest.mark.parametrize(
    ("limit", "rows"), [(0, []), (1, [0]), (4, [0, 3, 6, 9]), (5, [0, 2, 4, 7, 9]), (99, range(12))]
)
def test_samples_are_spread_evenly_over_units(tmp_path, limit, rows):
    run = make_run(tmp_path / "demo", masks=False)
    data = read(write_page(run, limit=limit))
    assert [sample["key"] for sample in data["samples"]] == [sample_key(row // 6, row % 6) for row in rows]


def test_the_marks_of_a_run_in_a_store_are_read_together(tmp_path, monkeypatch):
    run = Run.create(f"memory://{tmp_path.name}/run")
    for unit, count in ((0, 4), (1, 6), (2, 2)):
        mark = {"count": count, "bytes": 1, "sha256": "0" * 64, "seconds": 1.0, "fingerprint": "x"}
        run.tar("images", unit).put(b"x")
        run.tar("images", unit).with_suffix(".json").put(json.dumps(mark).encode())

    def alone(path):
        raise AssertionError(f"{path} is read alone")

    monkeypatch.setattr(RemotePath, "read_bytes", alone)
    problems = []
    assert _spread(run, 6, problems) == {0: [0, 2], 1: [0, 2, 4], 2: [0]}
    assert problems == []


def test_units_whose_tars_are_gone_are_named_and_the_others_shown(tmp_path):
    run = make_run(tmp_path / "demo", units=4, masks=False)
    run.tar("images", 1).unlink()
    run.tar("images", 2).write_bytes(b"")
    data = read(write_page(run))
    assert {sample["key"][:6] for sample in data["samples"]} == {"000000", "000003"}
    (problem,) = data["problems"]
    assert problem.startswith(f"{run.tar('images', 1)} and 1 more: missing, cut off")
    assert problem.endswith(f"delete it and run: synthgen generate --run {run.path}")


def test_a_page_of_96_small_samples_is_small(tmp_path):
    run = make_run(tmp_path / "demo", units=2, unit_size=48)
    assert write_page(run).stat().st_size < 3e6  # of noise, which no PNG makes smaller


def test_without_masks_or_maps_or_anything(tmp_path):
    run = make_run(tmp_path / "demo", masks=False)
    assert all("masks" not in sample and "attention" in sample for sample in read(write_page(run))["samples"])
    run_stage(TrueMasks(), run, Local(workers=1))
    run.tar("masks", 1).with_suffix(".json").unlink()
    for unit in (0, 1):
        run.tar("maps", unit).unlink()
        run.tar("maps", unit).with_suffix(".json").unlink()
    samples = read(write_page(run))["samples"]
    assert ["masks" in sample for sample in samples] == [True] * 6 + [False] * 6
    assert not any("attention" in sample for sample in samples)
    data = read(write_page(Run.create(tmp_path / "new")))
    assert (data["samples"], data["artifacts"]) == ([], [])
    assert data["next"].startswith("synthgen generate")


def test_a_tar_that_cannot_be_read_is_named_and_the_others_shown(tmp_path):
    run = make_run(tmp_path / "demo")
    run.tar("maps", 1).write_bytes(b"no tar")
    run.tar("images", 0).write_bytes(run.tar("images", 0).read_bytes()[:3000])
    data = read(write_page(run))
    assert [sample["key"][:6] for sample in data["samples"]] == ["000001"] * 6
    assert any("maps/000001.tar" in problem for problem in data["problems"])
    assert any("images/000000.tar" in problem for problem in data["problems"])


def test_large_images_are_shown_smaller_with_masks_of_the_same_size(tmp_path):
    run = Run.create(tmp_path / "demo")
    run_stage(Evil(units=1, unit_size=2, image_size=256, wide=2), run, Local(workers=1))
    run_stage(Wide(), run, Local(workers=1))
    sample = read(write_page(run))["samples"][1]
    assert (sample["width"], sample["height"]) == (512, 256)
    assert pixels(sample["image"]).shape == (192, 384, 3)
    labels = pixels(sample["masks"]["labels"])
    assert labels.shape == (192, 384)
    assert [np.mean(labels == word) for word in (1, 2)] == pytest.approx(sample["masks"]["areas"], abs=2e-3)


@dataclass(frozen=True)
class Wide(TrueMasks):
    """Masks of images that were drawn twice as wide."""

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        def work(unit: int) -> Report:
            with run.write("masks", unit) as masks:
                masks.about["tallies"] = Tallies().plain()
                for key, members in run.read("images", unit):
                    request, image, _ = codecs.decode_image(key, members)
                    words = request.prompt.words
                    _, truth = make_generation(key, words, len(image), seed=int(key[6:]))
                    scores = np.full(len(words), 0.5, np.float32)
                    values = np.repeat(truth, 2, axis=2)
                    masks.add(key, codecs.encode_masks(WordMasks(words, values, scores, ("",) * len(words))))
            return Report(unit, 2)

        yield work


def test_failures_training_and_scores_are_on_the_page(tmp_path):
    run = make_run(tmp_path / "demo")
    (run.folder("masks") / "000009.failed.json").write_text('{"unit": 9, "error": "it broke"}')
    (run.folder("masks") / "000001.failed.json").write_text('{"unit": 1, "error": "it outlived its success"}')
    folder = run.path / "pretrain" / "mae"
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 1001)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1001, "loss": NaN}']))
    (run.path / "evaluate").mkdir()
    (run.path / "evaluate" / "mae.json").write_text('{"scores": {"mae": {"knn": {"accuracy": NaN}}}}')
    data = read(write_page(run))
    assert data["failures"] == [{"stage": "masks", "units": [9], "reason": "it broke"}]
    (training,) = data["training"]
    steps, losses = zip(*training["curve"], strict=True)
    assert len(steps) == 240
    assert list(steps) == sorted(steps)
    assert losses[-1] < losses[0] <= 1
    assert training["last"] == {"step": 1001, "loss": None}
    assert data["evaluations"][0]["scores"][0]["main"] == ["accuracy", None]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        (make_prompt(("disc", "square")), [("a photo of a ", -1), ("disc", 0), (" and a ", -1), ("square", 1)]),
        (Prompt("a 🌄 dog", ("dog",), ((4, 7),)), [("a 🌄 ", -1), ("dog", 0)]),
        (Prompt("red dog", ("red dog", "dog"), ((0, 7), (4, 7))), [("red dog", 0), (" ", -1), ("dog", 1)]),
        (Prompt("b a", ("a", "b"), ((2, 3), (0, 1))), [("b", 1), (" ", -1), ("a", 0)]),
        (Prompt("a dog", ("dog",), ((2, 99),)), [("a dog", -1), (" ", -1), ("dog", 0)]),
        (Prompt("a dog", ("dog",)), [("a dog", -1), (" ", -1), ("dog", 0)]),
        (Prompt(""), []),
    ],
)
def test_a_prompt_is_cut_at_its_words(prompt, pieces):
    assert _segments(prompt) == pieces


def test_measures_of_masks_are_on_the_page_where_there_are_any(tmp_path):
    run = make_run(tmp_path / "demo", masks=False)
    run_stage(Masks(), run, Local(workers=1))
    samples = {sample["key"]: sample["masks"] for sample in read(write_page(run))["samples"]}
    for unit in (0, 1):
        for key, members in run.read("masks", unit):
            described = json.loads(members["json"])["masks"]
            for name in ("confidence", "sharpness", "disagreement"):
                assert samples[key][name] == pytest.approx([mask[name] for mask in described], abs=1e-4)
            assert samples[key]["objects"] == [len(mask["instances"]) for mask in described]
    old = read(write_page(make_run(tmp_path / "old")))["samples"]
    assert {value for sample in old for value in sample["masks"]["confidence"]} == {None}


def test_tables_of_words_are_bounded(tmp_path):
    words = tuple(Tally(f"word {number}", 2, 1, {"empty": 1, "too small": number % 2}) for number in range(500))
    words += (Tally("lamp", 1, cut_off=3),)
    data = _summary(RunStatus(tmp_path, 0, (), words=words), [])
    assert (len(data["words"]), data["num_words"], data["num_masks"]) == (200, 501, 500)
    assert data["dropped"] == {"empty": 500, "too small": 250}
    assert data["words_cut_off"] == 3


def test_flat_or_broken_or_absent_attention_is_drawn_as_none():
    flat = np.full((1, 4, 4), 0.3, np.float16)
    assert not pixels(_attention(Maps(("a",), flat, np.zeros((12, 4, 4), np.float16)))["strip"]).any()
    broken = np.full((1, 4, 4), np.nan, np.float16)
    assert not pixels(_attention(Maps(("a",), broken, np.zeros((12, 4, 4), np.float16)))["strip"]).any()
    nothing = np.zeros((0, 4, 4), np.float16)
    assert _attention(Maps((), nothing, np.zeros((12, 4, 4), np.float16)))["strip"] == ""


def test_a_limit_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="limit"):
        write_page(make_run(tmp_path / "demo"), limit=-1)
