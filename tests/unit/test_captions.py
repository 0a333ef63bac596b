"""Captions of images in a folder: every supported form, and broken ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthgen.captions import LONGEST, Caption, inside, read_beside, read_listing
from synthgen.datasets import CaptionedFolder, FolderDataset, ShardDataset, open_captioned
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, PromptError
from synthgen.image import decode_rgb, encode_png
from synthgen.records import Prompt
from synthgen.stages.attend import prompt_of
from synthgen.stores.tar import TarWriter

ROWS: list[dict[str, Any]] = [
    {"file_name": "a.png", "text": "a [dog] outside"},
    {"file_name": "sub/b.png", "text": "a dog and a cat", "words": ["dog", "cat"], "label": "pair"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.png", "sub/b.png", "sub/c.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((4, 6, 3), number, np.uint8)))
    return tmp_path / "images"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(samples: Any) -> dict[str, tuple[str, tuple[str, ...], str | None]]:
    found = {}
    for number in range(len(samples)):
        prompt = prompt_of(samples, number)
        found[samples.key(number)] = (prompt.text, prompt.words, prompt.label)
    return found


EXPECTED = {
    "a": ("a dog outside", ("dog",), "dog"),
    "sub/b": ("a dog and a cat", ("dog", "cat"), "pair"),
    "sub/c": ("the park", ("park",), "sub"),
}


def test_a_table_in_the_folder_and_texts_beside(folder: Path) -> None:
    write(folder / "metadata.jsonl", ROWS)
    (folder / "sub/c.txt").write_text("\n the park \n and more\n", encoding="utf-8")
    samples = open_captioned(folder)
    assert said(samples) == EXPECTED
    assert samples[1].image.shape == (4, 6, 3)


def test_a_table_in_a_folder_below_has_names_from_there(folder: Path) -> None:
    (folder / "sub/metadata.csv").write_text(
        '\ufefffile_name,caption,words,label\nb.png,"a dog and a cat",dog; cat,pair\nc.png,the park,,\n',
        encoding="utf-8",
    )
    (folder / "a.txt").write_text("a [dog] outside")
    assert said(open_captioned(folder)) == EXPECTED


def test_an_image_in_two_tables_is_refused(folder: Path) -> None:
    write(folder / "metadata.jsonl", ROWS)
    write(folder / "sub/metadata.jsonl", [{"file_name": "b.png", "text": "another"}])
    with pytest.raises(PromptError, match=r"sub/metadata\.jsonl lists 'sub/b\.png', which another table lists as well"):
        open_captioned(folder)


def test_a_metadata_file_elsewhere_selects_the_images(folder: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"file_name": "absent.png", "text": "nothing"}]
    samples = open_captioned(folder, write(tmp_path / "some.jsonl", rows))
    assert said(samples) == {key: EXPECTED[key] for key in ("a", "sub/b")}


def test_captions_of_coco(folder: Path, tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": 7, "file_name": "sub/c.png"},
            {"id": 5, "file_name": "a.png"},
            {"id": 9, "file_name": "x.png"},
        ],
        "annotations": [
            {"id": 3, "image_id": 5, "caption": "second"},
            {"id": 2, "image_id": 5, "caption": " A dog\nruns. "},
            {"id": 4, "image_id": 7, "caption": "the park"},
        ],
    }
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(content))
    samples = open_captioned(folder, path)
    assert said(samples) == {"a": ("A dog runs.", ("dog", "runs"), None), "sub/c": EXPECTED["sub/c"]}
    assert samples.captions(0) == ("A dog runs.", "second")
    content["images"][2]["id"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(PromptError, match="two images with the id 5"):
        open_captioned(folder, path)


@pytest.mark.parametrize(
    "name",
    ["../a.png", "/etc/passwd", "sub/../../a.png", "..\\a.png", "C:\\a.png", "\\\\host\\a.png", "", ".", None, 5],
)
def test_a_file_name_stays_in_its_folder(folder: Path, name: Any) -> None:
    path = write(folder / "metadata.jsonl", [ROWS[0], {"file_name": name, "text": "a dog"}])
    with pytest.raises(PromptError, match=r"metadata\.jsonl, line 2: .*file"):
        open_captioned(folder)
    with pytest.raises(ValueError, match="file"):
        inside(name)
    path.unlink()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"file_name": "a.png", "text": "a dog", "text": "a cat"}', "line 1: .*the key 'text' stands twice; keep one"),
        ("[]", "line 1: expected an object"),
        ('{"file_name": "a.png", "text": 5}', "line 1: the caption must be a text"),
        ('{"file_name": "a.png", "text": "a dog", "words": "dog"}', "'words' must be a list"),
        ('{"file_name": "a.png", "text": "a dog", "words": [""]}', "'words' must be a list"),
        ('{"file_name": "a.png", "label": {}}', "'label' must be"),
        ('{"file_name": "a.png", "label": false}', "'label' must be"),
        ('{"file_name": "a.png"}\n{"file_name": "./a.png"}', "line 2: the file 'a.png' is listed twice"),
        ('{"file_name": "none.png", "text": "a dog"}', "names 'none.png', and there is no such image"),
        ("[" * 100_000, "cannot be read|not valid JSON"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_broken_table_is_named(folder: Path, content: str | bytes, said: str) -> None:
    (folder / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptError, match=said) as caught:
        open_captioned(folder)
    assert "metadata.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "name,text\na.png,x\n", "no column 'file_name'"),
        ("a.csv", 'file_name,text\na.png,"x\n', "cannot be read"),
        ("a.json", "{}", "no list 'images'"),
        ("a.json", '{"images": [1], "annotations": []}', "no list 'images' of objects"),
        ("a.json", '{"images": [], "annotations": [{"segmentation": []}]}', r"captions_\*\.json"),
        ("a.json", '{"images": [{"file_name": "../x"}], "annotations": [{"caption": "x"}]}', "image 1: the file name"),
        ("a.parquet", "", "is not a list of captions"),
    ],
)
def test_a_broken_metadata_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=said):
        read_listing(tmp_path / name)


def test_missing_or_unexpected_metadata_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match="--metadata"):
        open_captioned(folder, tmp_path / "none.jsonl")
    with pytest.raises(MissingArtifact, match="no image of"):
        open_captioned(folder, write(tmp_path / "other.jsonl", [{"file_name": "z.png", "text": "a dog"}]))
    with TarWriter(tmp_path / "a.tar") as tar:
        tar.add("0", {"png": encode_png(np.zeros((4, 4, 3), np.uint8)), "txt": b"a [dog]"})
    with pytest.raises(ConfigError, match="leave --metadata out"):
        open_captioned(tmp_path / "a.tar", "x.jsonl")
    assert read_beside(folder / "a.png") == Caption()
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(PromptError, match="save it as UTF-8"):
        open_captioned(folder)


# -- captions of tars, and none at all


def tar_of(tmp_path: Path, **members: bytes) -> ShardDataset:
    with TarWriter(tmp_path / "one.tar") as tar:
        tar.add("0", {"png": encode_png(np.zeros((4, 4, 3), np.uint8)), **members})
    return ShardDataset([tmp_path / "one.tar"])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"a [dog]"}, Prompt("a dog", ("dog",), ((2, 5),), "dog")),
        ({"json": b'{"caption": "a dog", "url": "x"}'}, Prompt("a dog", ("dog",), ((2, 5),))),
        ({"json": b'{"prompt": "a dog", "words": ["Dog"]}', "cls": b"3"}, Prompt("a dog", ("dog",), ((2, 5),), "3")),
        ({"json": b'{"captions": ["a dog", "x"], "classes": ["person"]}'}, Prompt("a dog", ("dog",), ((2, 5),))),
    ],
)
def test_captions_of_tars(tmp_path: Path, members: dict[str, bytes], expected: Prompt) -> None:
    assert prompt_of(tar_of(tmp_path, **members), 0) == expected


def test_a_class_makes_a_caption(folder: Path, tmp_path: Path) -> None:
    samples = CaptionedFolder(folder)
    with pytest.raises(PromptError, match=r"sample a: it has no caption; .*metadata\.jsonl.*--caption 'a photo"):
        prompt_of(samples, 0)
    with pytest.raises(PromptError, match="sample a: it has neither caption nor class; name the class by a folder"):
        prompt_of(samples, 0, "a {label}")
    assert prompt_of(samples, 1, "a photo of a {label}") == Prompt("a photo of a sub", ("sub",), ((13, 16),), "sub")
    assert prompt_of(samples, 0, "a [thing] here") == Prompt("a thing here", ("thing",), ((2, 7),))
    labelled = tar_of(tmp_path, json=b'{"label": "old_owl"}')
    assert prompt_of(labelled, 0, "a {label}") == Prompt("an old owl", ("old owl",), ((3, 10),), "old_owl")
    with pytest.raises(PromptError, match="its class is only a number, 7"):
        prompt_of(tar_of(tmp_path, cls=b"7"), 0, "a {label}")
    with pytest.raises(PromptError, match="it has neither caption nor class"):
        prompt_of(tar_of(tmp_path, json=b'{"label": "_ _"}'), 0, "a {label}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a [dog", "not closed"),
        ("x" * (LONGEST + 1), "10000 are the most"),
        (" ".join(f"word{number}" for number in range(256)), "asks for 256 masks"),
    ],
)
def test_an_unusable_caption_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PromptError, match=f"sample 0: .*{said}"):
        prompt_of(tar_of(tmp_path, txt=text.encode()), 0)


# -- images as people have them


def test_images_of_folders_are_upright_and_hidden_files_are_skipped(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 5), "red").save(folder / "turned.jpg", exif=exif)
    for name in ("._a.png", ".cache/d.png", ".cache/metadata.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for us")
    samples = CaptionedFolder(folder)
    assert [samples.key(number) for number in range(len(samples))] == ["a", "sub/b", "sub/c", "turned"]
    assert samples[3].image.shape == (8, 5, 3)


def test_a_hostile_image_is_an_error_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encode_png(np.zeros((40, 40, 3), np.uint8))
    (folder / "a.png").write_bytes(bomb)
    samples = tar_of(tmp_path, txt=b"a [dog]", **{"png": bomb})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for source in (FolderDataset(folder), samples):
        with pytest.raises(CorruptFile, match="decompression bomb"):
            source[0]
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, format="TIFF")
    with pytest.raises(OSError, match="cannot identify"):
        decode_rgb(buffer.getvalue())  # no format but those that images are kept in


# -- tables written by hand


@pytest.mark.parametrize(
    "table",
    [
        "file_name, text\na.png, a dog\n",
        "file_name,Text\na.png,a dog\n",
        " File_Name ,\tCAPTION\na.png,a dog\n",
        'file_name, text\na.png, "a dog"\n',
        "file_name,text\ra.png,a dog\r",
        "file_name,text\r\na.png,a dog\r\n",
        "file_name,text\na.png,a dog,\n",  # an empty field too many says nothing
        "file_name,text,,\na.png,a dog,,\n",
        ",file_name,text,Width\n0,a.png,a dog,6\n",  # an index without a name
    ],
)
def test_a_table_may_be_written_by_hand(tmp_path: Path, table: str) -> None:
    (tmp_path / "A.CSV").write_bytes(table.encode())
    assert read_listing(tmp_path / "A.CSV") == {"a.png": Caption(("a dog",))}


def test_commas_and_line_ends_stay_within_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'file_name, text, words\na.png, "a dog,\rbig", dog; big\nb.png\n')
    assert read_listing(tmp_path / "a.csv") == {"a.png": Caption(("a dog, big",), ("dog", "big")), "b.png": Caption()}


@pytest.mark.parametrize("label", ["", " ", "\u0000", "\t \x1b"])
def test_an_empty_label_is_none(folder: Path, label: str) -> None:
    write(folder / "metadata.jsonl", [{"file_name": "a.png", "label": label}])
    samples = CaptionedFolder(folder)
    assert samples.label(0) is None
    with pytest.raises(PromptError, match="neither caption nor class"):
        prompt_of(samples, 0, "a {label}")


def test_a_table_may_have_labels_or_names_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file_name,Label\na.png,owl\n")
    assert read_listing(tmp_path / "a.csv") == {"a.png": Caption(label="owl")}
    (tmp_path / "a.csv").write_text("file_name\na.png\n")
    assert read_listing(tmp_path / "a.csv") == {"a.png": Caption()}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,text\na.png,x\nb.png,a dog, big\n", "line 3: it has more fields than columns; put quotes around"),
        ("file_name,text,\na.png,a dog, big\n", "line 2: it has more fields than columns"),
        ('file_name,text\na.png, "Stop" says a sign\n', "put quotes around a whole text and double those within it"),
        ("file_name,description\na.png,a dog\n", "no column 'text', .* but description; name the column .* 'text'"),
        ("file_name,words\na.png,dog\n", "no column 'text', .* but words"),
        ("file_name,text,Text\na.png,x,y\n", "two columns 'text'; keep one"),
        ("file_name;text\na.png;a dog\n", "no column 'file_name'; its first line must name .*commas"),
        ("", "no column 'file_name'"),
    ],
)
def test_a_table_that_would_lose_captions_is_refused(tmp_path: Path, table: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(PromptError, match=rf"a\.csv.*{said}"):
        read_listing(tmp_path / "a.csv")


def test_utf16_text_is_refused(folder: Path) -> None:
    for name, text in (("a.txt", "a dog"), ("metadata.csv", "file_name,text\na.png,a dog\n")):
        (folder / name).write_bytes(text.encode("utf-16-le"))
        with pytest.raises(PromptError, match=rf"{name}.*not UTF-8 text, as it holds zero bytes; save it as UTF-8"):
            open_captioned(folder)


def test_the_extension_of_a_metadata_file_may_be_in_capitals(folder: Path, tmp_path: Path) -> None:
    samples = open_captioned(folder, write(tmp_path / "SOME.JSONL", ROWS))
    assert said(samples) == {key: EXPECTED[key] for key in ("a", "sub/b")}
