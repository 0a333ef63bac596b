import json
import logging
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from synthgen.tiny import fetch
from synthgen.tiny.paint import COLOURS

FOLDER = Path(fetch.__file__).parent
OBJECTS = json.loads((FOLDER / "objects.json").read_text(encoding="utf-8"))
MODELS = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
NAMES = {*OBJECTS, *MODELS}


def test_no_emoji_is_used_for_two_objects():
    assert len(OBJECTS) >= 290
    assert len(NAMES) >= 300
    codes = [code for entry in OBJECTS.values() for code in entry["emoji"]]
    assert len(set(codes)) == len(codes)


def test_names_are_unique_within_a_file():
    for file in ("objects.json", "models.json"):
        pairs = json.loads((FOLDER / file).read_text(encoding="utf-8"), object_pairs_hook=list)
        assert len({name for name, _ in pairs}) == len(pairs)


def test_every_object_has_a_short_name_and_an_image():
    assert all(name == name.lower() and name.isascii() and len(name.split()) <= 3 for name in NAMES)
    for entry in OBJECTS.values():
        assert entry["emoji"]
        assert set(entry) <= {"emoji", "paint", "hue"}
        assert entry.get("paint", True) is True
        assert set(entry.get("hue", {})) <= set(entry["emoji"] if "paint" in entry else ())
    assert sum(entry.get("paint", False) for entry in OBJECTS.values()) >= 40
    assert all(MODELS.values())


def test_every_imagenet_class_has_an_object_and_its_own_one_if_there_is_one():
    rows = json.loads((FOLDER / "imagenet.json").read_text(encoding="utf-8"))
    assert len(rows) == len({row["name"] for row in rows}) == 1000
    assert {row["object"] for row in rows} <= NAMES
    assert all(row["object"] == row["name"] for row in rows if row["name"] in NAMES)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A data folder with a dog, a paintable car, and a car and two tables as 3D models; records what is rendered."""
    (tmp_path / "objects.json").write_text('{"dog": {"emoji": ["1f415"]}, "car": {"emoji": ["1f697"], "paint": true}}')
    (tmp_path / "models.json").write_text('{"car": ["a/one"], "table": ["a/two", "a/three"]}')
    (tmp_path / "data.json").write_text('[{"hexcode": "1F415"}, {"hexcode": "1F697"}]')
    for code, colour in (("1f415", (120, 120, 120, 255)), ("1f697", (220, 30, 40, 255))):
        Image.new("RGBA", (40, 20), colour).save(tmp_path / f"{code}.webp", lossless=True)
    rendered = []

    def render_views(archives, model, *, size):
        rendered.append(model)
        return [(np.full((size, size, 4), 200, dtype=np.uint8), held_out) for held_out in (False, True)]

    monkeypatch.setattr(fetch, "OBJECTS", tmp_path / "objects.json")
    monkeypatch.setattr(fetch, "MODELS", tmp_path / "models.json")
    monkeypatch.setattr(fetch, "render_views", render_views)
    return tmp_path, rendered


def prepare(data: Path) -> dict[str, np.ndarray]:
    fetch.prepare_objects(data, data / "data.json", data, data / "views", data / "objects.safetensors")
    return load_file(data / "objects.safetensors")


def test_rows_are_emoji_then_painted_emoji_then_views(small):
    data, _ = small
    got = prepare(data)
    colours = list(range(len(COLOURS)))
    assert got["object"].tolist() == [0, 1, *[1] * len(COLOURS), 1, 1, 2, 2, 2, 2]
    assert got["colour"].tolist() == [-1, -1, *colours, *[-1] * 6]
    assert got["held_out"].tolist() == [False] * (2 + len(COLOURS)) + [False, True] * 3
    assert got["rgba"].shape == (8 + len(COLOURS), fetch.OBJECT_SIZE, fetch.OBJECT_SIZE, 4)
    assert got["rgba"].dtype == np.uint8
    assert got["object"].dtype == got["colour"].dtype == np.int64
    assert got["held_out"].dtype == np.bool_
    assert (got["rgba"][..., :3] <= got["rgba"][..., 3:]).all()
    blue = got["rgba"][2 + list(COLOURS).index("blue"), 48, 48].tolist()
    assert blue[2] > 2 * max(blue[:2])


def test_views_are_rendered_once_and_progress_is_logged(small, caplog):
    data, rendered = small
    with caplog.at_level(logging.INFO):
        first = prepare(data)
    assert "2 of 2 objects" in caplog.text
    (data / "views" / "a%2Ftwo.safetensors").unlink()
    second = prepare(data)
    assert rendered == ["a/one", "a/two", "a/three", "a/two"]
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_a_code_that_is_no_emoji_or_has_no_image_is_refused(small):
    data, _ = small
    (data / "1f697.webp").unlink()
    with pytest.raises(fetch.FetchError, match="car: there is no image"):
        prepare(data)
    (data / "data.json").write_text('[{"hexcode": "1F697"}]')
    with pytest.raises(fetch.FetchError, match="dog: 1f415 is not an emoji"):
        prepare(data)


def test_an_existing_debian_package_is_unpacked_but_not_downloaded(tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append([Path(command[0]).name, *command[1:]])
        Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(fetch.subprocess, "run", run)
    (tmp_path / "thing_1.0_all.deb").touch()
    for _ in range(2):
        assert fetch.unpack_debian(tmp_path, "thing", "1.0") == tmp_path / "thing-1.0"
    assert (tmp_path / "thing-1.0").is_dir()
    assert [call[:2] for call in calls] == [["dpkg-deb", "-x"]]
    assert calls[0][2] == str(tmp_path / "thing_1.0_all.deb")


@pytest.mark.parametrize(("has_deb", "tool"), [(False, "apt-get"), (True, "dpkg-deb")])
def test_the_error_without_debian_tools_says_what_to_do(tmp_path, monkeypatch, has_deb, tool):
    monkeypatch.setattr(fetch.shutil, "which", lambda _: None)
    if has_deb:
        (tmp_path / "thing_1.0_all.deb").touch()
    with pytest.raises(fetch.FetchError, match=rf"^{tool} is not on the path: unpack .* into .*thing-1\.0$"):
        fetch.unpack_debian(tmp_path, "thing", "1.0")


def test_the_error_of_a_failing_tool_is_shown(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package thing\n")
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetch.FetchError, match="apt-get download failed: E: Unable to locate package thing; or unpack"):
        fetch.unpack_debian(tmp_path, "thing", "1.0")


def test_a_damaged_archive_leaves_no_folder_that_looks_complete(tmp_path):
    source = tmp_path / "source" / "package"
    source.mkdir(parents=True)
    for number in range(4):
        (source / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(4096))
    archive = tmp_path / "thing-1.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "package")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fetch.FetchError, match=r"cannot unpack .*thing-1\.0\.tgz: .*; delete it and run this again"):
        fetch.unpack(tmp_path, "thing", "1.0")
    archive.write_bytes(whole)
    folder = fetch.unpack(tmp_path, "thing", "1.0")
    assert sorted(path.name for path in folder.iterdir()) == ["0.bin", "1.bin", "2.bin", "3.bin"]
