"""Tars: the same content gives the same bytes, and a tar is there whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import webdataset

from synthgen.errors import CorruptFile, MissingArtifact, StorageError
from synthgen.stores.tar import TarWriter, index_tar, iter_samples, read_tar, write_bytes, write_json

SAMPLES = [(f"{number:010d}", {"txt": b"a disc", "json": b"{}", "mask.png": bytes(number)}) for number in range(5)]


def write(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]] = SAMPLES) -> TarWriter:
    with TarWriter(path) as tar:
        for key, members in samples:
            tar.add(key, members)
    return tar


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tar = write(tmp_path / "deep" / "000000.tar")
    assert list(read_tar(tar.path)) == SAMPLES
    data = tar.path.read_bytes()
    assert (tar.count, tar.size, tar.sha256) == (5, len(data), hashlib.sha256(data).hexdigest())


def test_an_index_says_where_the_bytes_lie(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tar").path.read_bytes()
    for (key, members), (other, places) in zip(SAMPLES, index_tar(tmp_path / "a.tar"), strict=True):
        assert key == other
        assert members == {name: data[place.offset : place.offset + place.size] for name, place in places.items()}


def test_members_are_sorted_and_headers_say_nothing_of_who_or_when(tmp_path: Path) -> None:
    one = write(tmp_path / "one.tar", [("0", {"b": b"1", "a.c": b"2"})])
    two = write(tmp_path / "two.tar", [("0", {"a.c": b"2", "b": b"1"})])
    assert one.path.read_bytes() == two.path.read_bytes()
    with tarfile.open(one.path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["0.a.c", "0.b"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == 0o444
        assert member.isreg()
        assert not member.pax_headers


def test_a_member_costs_one_header_block(tmp_path: Path) -> None:
    size = write(tmp_path / "a.tar", [(str(number), {"cls": b"1"}) for number in range(100)]).size
    assert size <= 100 * 1024 + tarfile.RECORDSIZE


def test_an_error_inside_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    before = write(tmp_path / "a.tar").path.read_bytes()

    def broken() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield "1", {"txt": b"new"}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "a.tar", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == before


def test_a_tar_is_closed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to rename an open file."""
    replace = Path.replace

    def check(self: Path, target: Path) -> Path:
        assert tar._file.closed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", check)
    with TarWriter(tmp_path / "a.tar") as tar:
        tar.add("0", {"txt": b"1"})
    assert len(list(read_tar(tmp_path / "a.tar"))) == 1


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*a\.tar: [\w ]+; choose another --run folder, then"):
        write(tmp_path / "file" / "a.tar")
    with pytest.raises(StorageError, match=r"cannot write .*a\.json"):
        write_json(tmp_path / "file" / "a.json", {})


def test_write_bytes_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    for data in (b"old", b"new"):
        write_bytes(tmp_path / "a" / "b.txt", data)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("b.txt", b"new")]


@pytest.mark.parametrize("end", [512 * 3 + 100, 512 * 7, 512 * 7 + 1, -1, -512])
def test_a_tar_that_is_cut_off(tmp_path: Path, end: int) -> None:
    samples = [(str(number), {"bin": bytes([number]) * 700}) for number in range(5)]
    path = write(tmp_path / "a.tar", samples).path
    whole = path.read_bytes()
    content = whole[: 5 * 3 * 512]  # a header and two blocks of data each; what follows is padding
    path.write_bytes(content[:end])
    with pytest.raises(CorruptFile, match=r"a\.tar cannot be read: .*key") as caught:
        index_tar(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_tar_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(CorruptFile, match="no key could be read"):
        index_tar(tmp_path / "a.tar")
    (tmp_path / "c.tar").write_bytes(gzip.compress(write(tmp_path / "whole.tar").path.read_bytes()))
    with pytest.raises(CorruptFile, match=r"c\.tar cannot be read: it is compressed, and must be decompressed first"):
        index_tar(tmp_path / "c.tar")
    with pytest.raises(MissingArtifact, match=r"b\.tar"):
        index_tar(tmp_path / "b.tar")


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    assert list(index_tar(write(tmp_path / "a.tar", []).path)) == []


STRANGE = [
    "._0.jpg",
    "0.jpg",
    "LICENSE",
    "._0.txt",
    "0.txt",
    "part/.DS_Store",
    "part/1.jpg",
    "part/README",
    "part/1.txt",
]


def test_files_that_belong_to_no_sample_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in STRANGE:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"12"))
    found = index_tar(tmp_path / "a.tar")
    assert [(key, list(members)) for key, members in found] == [("0", ["jpg", "txt"]), ("part/1", ["jpg", "txt"])]
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in theirs if sample["__key__"] != "part/"] == [key for key, _ in found]
    assert list(iter_samples(tmp_path / "a.tar")) == list(found)


def test_nobody_is_told_to_delete_a_file_that_is_no_run_s(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(CorruptFile, match="replace it, or leave it out") as caught:
        index_tar(tmp_path / "a.tar")
    assert "delete it" not in str(caught.value)
    (tmp_path / "run.yaml").write_text("seed: 0")
    for folder in ("images", "shards/train"):
        path = tmp_path / folder / "000000.tar"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"no tar at all" * 100)
        with pytest.raises(CorruptFile, match=r"delete it; .*: synthgen status"):
            index_tar(path)


def test_tars_of_others_are_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as tar:  # PAX records, float times, user names
        for number in range(3):
            tar.write({"__key__": f"part/{number:03d}", "txt": "a disc", "mask.png": b"12"})
    assert [(key, dict(members)) for key, members in read_tar(tmp_path / "w.tar")] == [
        (f"part/{number:03d}", {"mask.png": b"12", "txt": b"a disc"}) for number in range(3)
    ]
    with tarfile.open(tmp_path / "t.tar", "w") as plain:
        folder = tarfile.TarInfo("part")
        folder.type = tarfile.DIRTYPE
        plain.addfile(folder)
        member = tarfile.TarInfo("part/7.JPG")
        member.size = 3
        plain.addfile(member, io.BytesIO(b"abc"))
    assert list(read_tar(tmp_path / "t.tar")) == [("part/7", {"jpg": b"abc"})]
