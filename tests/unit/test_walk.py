"""Walking through a tar finds what its index has, whoever wrote it, and holds nothing."""

import io
import tarfile
import tracemalloc

import pytest

from synthgen.errors import CorruptShard, MissingArtifact
from synthgen.stores import walk
from synthgen.stores.tar import TarWriter, index_tar
from synthgen.stores.walk import iter_samples


def write(path, names, format=tarfile.USTAR_FORMAT, **header):
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if info.isdir() else 100 * number % 1500
            for field, value in header.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


NAMES = ["a.jpg", "._a.json", "a.json", "deep/", "deep/b.PNG", "deep/README", "deep/b.seg.png", "c.jpg", "LICENSE"]
LONG = ["d" * 90 + "/" + "e" * 90 + ".jpg", "n" * 200 + ".jpg", "n" * 200 + ".txt", "ä.jpg"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_is_found_is_what_the_index_has(tmp_path, format, monkeypatch):
    path = write(tmp_path / "a.tar", NAMES, format, mtime=1.5)  # of which PAX makes a header of its own
    found = list(index_tar(path))
    monkeypatch.setattr(walk, "index_tar", lambda path: pytest.fail("it was not read header by header"))
    assert list(iter_samples(path)) == found
    assert [key for key, _ in found] == ["a", "deep/b", "c"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_do_not_fit_a_header_are_found_too(tmp_path, format):
    path = write(tmp_path / "a.tar", [*NAMES, *LONG, "z.jpg"], format)
    assert list(iter_samples(path)) == list(index_tar(path))


@pytest.mark.parametrize("cut", [0, 100, 700, 2048, 5000, -512, -1])
def test_a_damaged_tar_is_refused_as_by_the_index(tmp_path, cut):
    data = write(tmp_path / "whole.tar", NAMES).read_bytes()
    path = tmp_path / "a.tar"
    path.write_bytes(data[:cut] if cut else b"")
    assert told(index_tar, path) == told(iter_samples, path)


def told(read, path):
    """What is read, or the error."""
    try:
        return list(read(path))
    except CorruptShard as error:
        return str(error)


def test_names_that_lead_out_are_refused(tmp_path):
    for name in ("../a.jpg", "/a.jpg", "a\x07.jpg"):
        with pytest.raises(CorruptShard, match="cannot be the name of a file"):
            list(iter_samples(write(tmp_path / "a.tar", [name])))
    with pytest.raises(MissingArtifact):
        list(iter_samples(tmp_path / "absent.tar"))


def test_samples_are_not_held(tmp_path):
    with TarWriter(tmp_path / "a.tar") as tar:
        for row in range(20_000):
            tar.add(f"{row:010d}", {"jpg": b"x", "txt": b"y"})
    tracemalloc.start()
    count = sum(1 for _ in iter_samples(tmp_path / "a.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 200_000
