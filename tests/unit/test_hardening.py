"""What comes from outside is hostile until decoded; nothing from data runs, and no secret is written down."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from synthgen import codecs, prompts
from synthgen.__main__ import main
from synthgen.captions import read_listing
from synthgen.card import dataset_card
from synthgen.columns import unit_of
from synthgen.config import load_yaml
from synthgen.datasets import FolderDataset, ShardDataset
from synthgen.diffusion.loading import Loading, load_pipeline
from synthgen.entries import dump_yaml, read_entry
from synthgen.errors import ConfigError, CorruptFile, PromptError, SynthgenError
from synthgen.image import MAX_PIXELS, decode_labels, decode_rgb, encode_png
from synthgen.log import logged_to
from synthgen.models.vit import EncoderConfig, VisionTransformer, load_encoder, save_encoder
from synthgen.pipeline import read_pipeline
from synthgen.prompts import find_words, read_prompts
from synthgen.records import Report
from synthgen.redact import redact, redacted
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import make_stage
from synthgen.stages.masks import Masks
from synthgen.stages.shards import Shards
from synthgen.status import status
from synthgen.stores.tar import TarWriter, index_tar, read_tar
from synthgen.untrusted import SAFE_LOADER, read_file, read_json, read_lines, read_yaml, visible
from tests.factories import make_generation, make_run

PNG = encode_png(np.zeros((4, 4, 3), np.uint8))


# -- tars


def tar_of(path: Path, *members: tuple[str, bytes], **header: Any) -> Path:
    """A tar with these members; ``header`` sets fields of the last one."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, data) in enumerate(members, start=1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == len(members):
                for field, value in header.items():
                    setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


@pytest.mark.parametrize(
    "name", ["../out.png", "/etc/out.png", "a/../../out.png", "a\x1b[2J.png", "a\nb.png", "\udcff.png"]
)
def test_names_in_a_tar_that_lead_out_or_steer_a_console_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptFile, match="cannot be read") as caught:
        index_tar(tar_of(tmp_path / "a.tar", (name, PNG)))
    assert str(caught.value).isprintable()


def test_links_and_devices_in_a_tar_are_skipped(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        path = tar_of(tmp_path / "a.tar", ("0.txt", b"x"), ("1.png", b""), type=kind, linkname="/etc/passwd")
        assert list(read_tar(path)) == [("0", {"txt": b"x"})]
    path = tar_of(tmp_path / "a.tar", ("._0.txt", b"?"), ("0.txt", b"x"), ("LICENSE", b"?"))
    assert list(read_tar(path)) == [("0", {"txt": b"x"})]


def test_repeated_members_of_a_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="two members 'txt'"):
        index_tar(tar_of(tmp_path / "a.tar", ("0.txt", b"x"), ("0.TXT", b"y")))
    with pytest.raises(CorruptFile, match="'0' occurs twice, the second time after '1'"):
        index_tar(tar_of(tmp_path / "a.tar", ("0.txt", b"x"), ("1.txt", b"y"), ("0.png", b"z")))


def test_a_damaged_header_does_not_end_a_tar_silently(tmp_path: Path) -> None:
    with TarWriter(tmp_path / "a.tar") as tar:
        for number in range(3):
            tar.add(str(number), {"txt": b"x"})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 + 5] ^= 1  # the name of the second member: its checksum is wrong now
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(CorruptFile, match="a header in it is damaged; the last key read is 0"):
        index_tar(tmp_path / "a.tar")


def patched(path: Path, place: int, value: bytes) -> Path:
    """A tar whose first header says something else, with a right checksum."""
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [-512, -(2**40)])
def test_a_negative_size_causes_no_endless_loop(tmp_path: Path, size: int) -> None:
    path = tar_of(tmp_path / "a.tar", ("0.txt", b"x"), ("1.txt", b"y"))
    with pytest.raises(CorruptFile):
        index_tar(patched(path, 124, b"\xff" + (256**11 + size).to_bytes(11, "big")))


def test_long_headers_do_not_take_quadratic_time(tmp_path: Path) -> None:
    for data in (b"1" * 60_000, b"x" * 100_000):
        path = tar_of(tmp_path / "a.tar", ("0.txt", data))
        with pytest.raises(CorruptFile, match="larger than any name"):
            index_tar(patched(path, 156, tarfile.XHDTYPE))


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", ("0.txt", b"x" * 2000))
    with pytest.raises(CorruptFile, match="sparse"):
        index_tar(patched(path, 156, tarfile.GNUTYPE_SPARSE))


def test_a_member_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "a.tar", ("0.txt", b"x"), ("1.txt", b"y" * 200))
    monkeypatch.setattr("synthgen.stores.tar.MAX_BYTES", 100)
    with pytest.raises(CorruptFile, match="200 bytes; 100 are the most; the last key read is 0"):
        list(read_tar(path))


def test_keys_of_other_forms_are_refused() -> None:
    for key in ("a", "../0000000", "\u0664\u0664\u0664\u0664\u0664\u0664"):
        with pytest.raises(CorruptFile, match="no key of a run's sample"):
            unit_of(key)


# -- arrays


def npz(**members: bytes) -> bytes:
    """An npz whose members are these bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(descr: str, shape: str, body: bytes = b"") -> bytes:
    """An npy whose header says so."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (npy("'|u1'", "(1000000, 1000000)"), "0 bytes"),
        (npy("'|u1'", "(-1, -1)", b"1"), "axes"),
        (npy("'|O'", "(2, 2)", b"cos\nsystem\n(S'true'\ntR."), "labels is object with 2 axes"),
        (npy("'<f8'", "(2, 2)", bytes(32)), "float64"),
        (npy("'|u1'", "(4,)", bytes(4)), "1 axes"),
        (npy("'|u1'", "(16384, 16384)", bytes(2**27 + 1)), "larger than"),
        (npy("[('a', '|u1')]", "(2, 2)", bytes(4)), "axes"),
    ],
)
def test_headers_of_arrays_are_checked_before_memory_is_allocated(labels: bytes, why: str) -> None:
    members = {"masks.npz": npz(labels=labels, scores=npy("'<f4'", "(1,)", bytes(4)))}
    with pytest.raises(CorruptFile, match=why):
        codecs.decode_masks("0", members | {"json": b'{"words": ["a"], "dropped": []}'})


def test_few_bytes_cannot_expand_to_many_masks() -> None:
    words = [str(number) for number in range(255)]
    meta = {"words": words, "dropped": [], "masks": [dict.fromkeys(codecs._MEASURED, 0.0)] * 255}
    labels = npy("'|u1'", "(4096, 4096)", bytes(2**24))
    members = {"masks.npz": npz(labels=labels, scores=npy("'<f4'", "(255,)", bytes(1020)))}
    with pytest.raises(CorruptFile, match="more than are read"):
        codecs.decode_masks("0", members | {"json": json.dumps(meta).encode()})


def test_arrays_of_either_order_are_read() -> None:
    maps = make_generation()[0].maps
    buffer = io.BytesIO()
    np.savez_compressed(buffer, weights=np.asfortranarray(maps.weights), affinity=np.asfortranarray(maps.affinity))
    read = codecs.decode_maps("0", {"maps.npz": buffer.getvalue()}, maps.words)
    np.testing.assert_array_equal(read.weights, maps.weights)
    np.testing.assert_array_equal(read.affinity, maps.affinity)


@pytest.mark.parametrize(
    "change",
    [{"words": "dog"}, {"words": [1]}, {"spans": [[0]]}, {"spans": [["0", 1]]}, {"seed": -1}, {"seed": 2**70},
     {"seed": "1"}, {"prompt": 3}, {"label": {"a": 1}}, {"warnings": 5}, {"prompt": "\ud800"}],
)  # fmt: skip
def test_types_in_the_json_of_a_sample_are_checked(change: dict[str, Any]) -> None:
    members = codecs.encode_image(make_generation()[0])
    meta = json.loads(members["json"]) | change
    with pytest.raises(CorruptFile):
        codecs.decode_image("0", members | {"json": json.dumps(meta).encode()})


# -- images


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is of this size."""
    body = b"IHDR" + struct.pack(">II", width, height) + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + PNG[33:]


@pytest.mark.parametrize("decode", [decode_rgb, decode_labels])
def test_an_image_of_too_many_pixels_is_not_decoded(decode: Any) -> None:
    with pytest.raises(OSError, match="67,108,864 are the most"):
        decode(png_header(MAX_PIXELS // 1000 + 1, 1000))
    with pytest.raises(OSError, match="pixels"):
        decode(png_header(60_000, 60_000))


def as_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_grey_of_sixteen_bits_keeps_its_upper_eight() -> None:
    values = np.linspace(0, 65535, 20 * 30).round().astype(np.uint16).reshape(20, 30)
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(decode_rgb(as_bytes(Image.fromarray(values))), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = decode_rgb(as_bytes(Image.fromarray(values), exif=exif), upright=True)
    assert np.array_equal(turned, np.rot90(expected, -1))


def test_pixels_of_unknown_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthgen.image._FORMATS", ("TIFF",))  # none of those that are read has any
    for kind in (np.int32, np.float32):
        with pytest.raises(OSError, match=r"32-bit numbers of unknown range; save it with 8 bits"):
            decode_rgb(as_bytes(Image.fromarray(np.full((4, 4), 1, kind)), "TIFF"))


def test_masks_are_png_and_no_format_that_starts_a_program(tmp_path: Path) -> None:
    """Pillow hands PostScript to Ghostscript."""
    with pytest.raises(OSError, match="cannot identify"):
        decode_labels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "TIFF")
    with TarWriter(tmp_path / "a.tar") as tar:
        tar.add("0", {"png": PNG, "mask.png": buffer.getvalue(), "json": b'{"words": ["a"]}'})
    with pytest.raises(CorruptFile, match="cannot identify"):
        ShardDataset([tmp_path / "a.tar"])[0]
    with pytest.raises(CorruptFile, match="cannot identify"):
        ShardDataset([tmp_path / "a.tar"]).word_masks(0)


def test_errors_of_pillow_become_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("inside\nPillow")

    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(OSError, match=r"^inside Pillow$"):
        decode_rgb(PNG)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "p.txt", "p.jsonl", "m.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CorruptFile, match="not a regular file"):
        FolderDataset(tmp_path)[0]
    with pytest.raises(PromptError, match="not a regular file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(PromptError, match="not a regular file"):
        read_listing(tmp_path / "m.jsonl")


# -- text


@pytest.mark.parametrize(
    ("text", "why"),
    [("[" * 100_000, "nested"), ('{"a": NaN}', "not a number"), ('{"a": 1e999}', "not a number"),
     ('"\\ud800"', "surrogates"), ("9" * 5000, "digits"), ('"' + "a" * 2**24, "larger")],
)  # fmt: skip
def test_json_within_bounds(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_json(text)


def test_json_joins_surrogate_pairs_and_accepts_nan_if_asked() -> None:
    assert read_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert np.isnan(read_json("NaN", finite=False))
    with pytest.raises(ValueError, match="utf-8"):
        read_json(b'"\xed\xa0\x80"')


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [(LAUGHS, "more than"), ("&a [*a]", "itself"), ("[" * 5000, "nested"), ("- " * 5000, "nested"),
     ("a: 2001-99-99", "month"), ("#" * 300_000, "larger"), ("a: " + "9" * 5000, "digits"),
     ("!!python/object/apply:os.system [x]", "constructor")],
)  # fmt: skip
def test_yaml_within_bounds(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(yaml.YAMLError, match=why):
        load_yaml(text)
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SynthgenError) as caught:
        read_pipeline(tmp_path / "p.yaml")
    assert len(str(caught.value)) < 1000


def test_yaml_of_too_many_values_is_refused_before_any_is_built() -> None:
    class Parser(SAFE_LOADER):  # type: ignore[misc]
        def get_single_node(self) -> None:
            pytest.fail("a tree of all values")

    with pytest.raises(yaml.YAMLError, match="more than 20,000 values"):
        read_yaml("[" + "a," * 30_000 + "]", Parser)


def test_settings_of_thousands_of_files_are_read_again(tmp_path: Path) -> None:
    inputs = {f"runs/{number:05d}/shards/train": "000000.tar:123456" for number in range(15_000)}
    (tmp_path / "settings.yaml").write_bytes(dump_yaml({"fingerprint": "x", "inputs": inputs}))
    entry = read_entry(tmp_path / "settings.yaml", "fingerprint", str)
    assert entry is not None
    assert entry["inputs"] == inputs


def test_yaml_may_contain_aliases() -> None:
    assert load_yaml("a: &a {x: 1e-3}\nb: {<<: *a, y: 2}") == {"a": {"x": 1e-3}, "b": {"x": 1e-3, "y": 2}}


def test_settings_are_finite() -> None:
    with pytest.raises(ConfigError, match="finite"):
        make_stage("masks", {"min_area": float("nan")})


def test_prompts_lose_control_characters_and_spans_stay_correct(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a\n\x1b\x9b dog", "words": ["dog"], "label": "d\x07g"}))
    (prompt,) = read_prompts(path)
    assert (prompt.text, prompt.spans, prompt.label) == ("a    dog", ((5, 8),), "d g")
    assert visible("a\tb\u202e") == "a\tb\u202e"


def test_a_prompt_of_too_many_words_or_characters(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("ok [dog]\n" + "[a] " * 256)
    with pytest.raises(PromptError, match="line 2: it asks for 256 masks; 255"):
        read_prompts(path)
    path.write_text("x" * 70_000)
    with pytest.raises(PromptError, match="65,536 are the most"):
        read_prompts(path)
    with pytest.raises(ValueError, match="255 are the most"):
        find_words("a " * 5000, ["a"] * 5000)  # would take hours: each looks past all others


@pytest.mark.parametrize("before", ["", "é "])
def test_words_without_a_span_are_not_searched_repeatedly(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these would take seconds or minutes if every word were tried at every place."""
    looked: list[str] = []
    search = prompts._free_place
    monkeypatch.setattr(prompts, "_free_place", lambda *given: (looked.append(given[2]), search(*given))[1])
    many, stairs = "a " * 8_000, ["a" * number for number in range(1, 100)]
    tries: list[tuple[str, list[str], int]] = [
        (f"{many}b", [many.strip(), *["a"] * 254], 4),  # in two orders: once with its place, once without
        (f"{many}b", [f"{many}c", *["a"] * 254], 2),
        (f"{'a' * 20_000} {' '.join(stairs)}", [*stairs, "b"], 200),
        (f"{'A' * 20_000} b", ["a" * 20_000, "a"], 4),
        ("abcd", ["x" * 2**20] * 255, 2),
    ]
    for text, words, number in tries:
        looked.clear()
        with pytest.raises(ValueError, match="is not in the prompt") as caught:
            find_words(before + text, words)
        assert len(looked) == number
        assert len(str(caught.value)) < 500


def test_errors_shorten_long_values(tmp_path: Path) -> None:
    long = "the " * 10_000
    (tmp_path / "t.txt").write_text("a {}\n")
    texts = {"p.txt": long, "q.jsonl": json.dumps({"prompt": "a dog", long: 1})}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(PromptError) as caught:
            read_prompts(tmp_path / name, tmp_path / "t.txt")
        assert len(str(caught.value)) < 1000
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": f"../{long}"}))
    with pytest.raises(PromptError, match="does not lead") as caught:
        read_listing(tmp_path / "m.jsonl")
    assert len(str(caught.value)) < 1000


def test_an_endless_line_is_refused_early(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"x" * 200_000)
    with pytest.raises(ValueError, match="65,536 characters"):
        list(read_lines(path))
    with pytest.raises(PromptError, match="65,536 characters"):
        read_listing(path)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_file(path, 10)


def test_prompts_cannot_break_the_markdown_of_the_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=2, image_size=16)
    run_stage(Shards(), run)
    description = json.loads((run.folder("shards") / "dataset.json").read_text())
    description["prompts"]["examples"] = ["a\n````\n# taken over"]
    assert "\n# taken over" not in dataset_card(description)


# -- runs


@pytest.mark.parametrize(
    "mark",
    ["[]", "3", "{}", "[" * 5000, '{"count": 1}', '{"fingerprint": [], "bytes": "x", "count": null, "sha256": 1}'],
)
def test_invalid_done_marks_do_not_count(tmp_path: Path, mark: str) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=1, image_size=16)
    fingerprint = run.artifact("masks")["fingerprint"]
    assert run.has_unit("masks", 0, fingerprint)
    run.tar("masks", 0).with_suffix(".json").write_text(mark)
    assert run.mark("masks", 0) is None
    assert not run.has_unit("masks", 0, fingerprint)


def test_unreadable_failure_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=1, image_size=16)
    (run.folder("masks") / "000001.failed.json").write_text("[1]")
    (run.folder("masks") / "x.failed.json").write_text("{}")
    assert list(run.failures("masks")) == [1]


@pytest.mark.parametrize("size", ["NaN", "Infinity", "1e999", "1" * 400, '"x"', "null", "[]"])
def test_invalid_sizes_of_shards(tmp_path: Path, size: str) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=1, image_size=16)
    run.folder("shards").mkdir()
    (run.folder("shards") / "dataset.json").write_text(f'{{"shards": [{{"bytes": {size}}}, {{"bytes": 7}}]}}')
    found = status(run).shards
    assert found is not None
    assert (found.num_shards, found.bytes) == (2, 7)


@pytest.mark.parametrize("text", ["fingerprint: a", "fingerprint: a\nstage: s\nsettings: []\ninputs: {}", LAUGHS])
def test_invalid_settings_of_an_artifact(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=1, image_size=16)
    (run.folder("masks") / "settings.yaml").write_text(text)
    for ask in (run.artifacts, lambda: run.artifact("masks"), lambda: run.check(Masks())):
        with pytest.raises(ConfigError, match=r"settings\.yaml"):
            ask()


# -- models


def test_the_config_of_a_huge_network_is_refused(tmp_path: Path) -> None:
    save_encoder(VisionTransformer(EncoderConfig(image_size=8, patch_size=4, dim=8, depth=1, num_heads=2)), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert load_encoder(tmp_path).config.dim == 8
    for change in ({"depth": 10**9}, {"dim": 2**20}, {"image_size": 2**20}, {"patch_size": 2**20, "image_size": 2**20}):
        (tmp_path / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(CorruptFile, match="smaller network"):
            load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("part", "file"),
    [(["my_code", "Net"], ""), (["os", "system"], ""), (["diffusers", "UNet2DConditionModel"], "unet/diffusers.py")],
)
def test_code_of_a_model_is_never_run(tmp_path: Path, part: list[str], file: str) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": part}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if file:
        (tmp_path / "unet").mkdir()
        (tmp_path / file).write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="runs no code that comes with a model"):
        load_pipeline(Loading(str(tmp_path)), ("StableDiffusionPipeline",))


@pytest.mark.parametrize("setting", ["lora", "textual_inversion"])
def test_pickled_weights_on_top_of_a_model_are_refused(tmp_path: Path, setting: str) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name in ("x.bin", "x.weights"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
        loading = Loading(str(tmp_path), **{setting: str(tmp_path / name)})
        with pytest.raises(ConfigError, match="no safetensors file"):
            load_pipeline(loading, ("StableDiffusionPipeline",))


# -- secrets

SECRETS = {
    "s3://AKIAABCDEFGHIJKLMNOP:wJalrXUtnFEMI@bucket/run": "wJalrXUtnFEMI",
    "https://user:pass-word@host/x.tar": "pass-word",
    "s3:/user:pass/word@bucket/x.tar": "pass/word",
    "https://host/x?X-Amz-Signature=0123456789abcdef&y=1": "0123456789abcdef",
    "Authorization: Bearer abcdefghijkl": "abcdefghijkl",
    "failed with hf_abcdefghijklmnopqrstuv here": "hf_abcdefghijklmnopqrstuv",
    '{"aws_secret_access_key": "wJalrXUtnFEMI"}': "wJalrXUtnFEMI",
    "HF_TOKEN=abcdefgh12": "abcdefgh12",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden(text: str) -> None:
    assert SECRETS[text] not in redact(text)
    assert "***" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    ["a token of love", "tokens: 77", "runs/a:b@c", "mail me@host", "s3://bucket/key", "max_tokens=48",
     "a photo of a [dog]", "https://host/a@b", "the key is under the mat", "secret: no",
     "max_tokens: unknown setting", "basic composition of an image"],
)  # fmt: skip
def test_other_values_are_not_hidden(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "text", ["a-" * 50_000, "a:/" * 30_000, "a://" + "b:" * 50_000, "token-" * 20_000, "'token" * 20_000]
)
def test_hostile_text_is_searched_in_bounded_time(text: str) -> None:
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 1


def test_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse")
    assert redact("no: correct-horse!") == "no: ***!"
    assert redacted({"a": ["correct-horse"], "password": "x", "n": 1, "key": 5}) == {
        "a": ["***"], "password": "***", "n": 1, "key": 5,
    }  # fmt: skip


def test_secrets_reach_no_error_run_record_or_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, secret = "https://me:hunter2hunter2@host/images", "hunter2hunter2"
    assert secret not in str(SynthgenError(f"cannot read {url}"))
    stage = make_stage("pretrain", {"method": "mae", "data": [url]})
    assert secret not in json.dumps(stage.settings())
    assert secret not in json.dumps(stage.fingerprinted())
    run = make_run(tmp_path / "r", units=1, unit_size=1, image_size=16)
    run.fail(Masks(), Report(3, error=f"OSError: {url}", trace=f"at {url}"))
    logger = logging.getLogger("synthgen.test")
    with logged_to(run.path / "logs" / "x.jsonl"):
        logger.warning("failed: %s", url, extra={"trace": url, "where": Path(url)})
    written = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert b"host/images" in written
    assert secret.encode() not in written


def test_errors_on_the_console_are_one_line_that_cannot_steer_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["synthgen", "status", f"{tmp_path}/\x1b[2J\nx"])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "\x1b" not in told


def test_the_traceback_of_a_bug_hides_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: Any) -> None:
        raise RuntimeError("https://me:hunter2hunter2@host")

    monkeypatch.setattr("synthgen.__main__.app", broken)
    with pytest.raises(SystemExit, match="1"):
        main()
    told = capsys.readouterr().err
    assert "RuntimeError" in told
    assert "hunter2" not in told


def test_invalid_files_of_a_run_are_refused_in_one_line(tmp_path: Path) -> None:
    """Run.open refuses in one line what is no run."""
    (tmp_path / "run.yaml").write_text(LAUGHS)
    with pytest.raises(ConfigError, match="values"):
        Run.open(tmp_path)
