"""What stands in a tar is found header by header as tarfile finds it, whoever wrote it, and nothing is held."""

import io
import random
import tarfile
import tracemalloc

import pytest

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.stores import headers
from synthgen.stores.tar import TarWriter, index_tar, iter_samples


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


def files(path, by_tarfile=False):
    """What is in a tar, or the error; all of it by tarfile, or only what is not plain."""
    with open(path, "rb") as file, pytest.MonkeyPatch.context() as patch:
        if by_tarfile:
            patch.setattr(headers, "_parse_plain", lambda file, place: None)
        try:
            return list(headers.iter_files(file))
        except (tarfile.TarError, ValueError, OSError, OverflowError, LookupError) as error:
            return type(error), str(error)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_headers_are_read_as_by_tarfile(tmp_path, format, monkeypatch):
    path = write(tmp_path / "a.tar", NAMES, format, mtime=1.5)  # of which PAX makes a header of its own
    wanted = files(path, by_tarfile=True)
    monkeypatch.setattr(headers, "_iter_with_tarfile", lambda *given: pytest.fail("it was not read header by header"))
    assert files(path) == wanted
    found = list(iter_samples(path))
    assert list(index_tar(path)) == found
    assert [key for key, _ in found] == ["a", "deep/b", "c"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_do_not_fit_a_header_are_found_too(tmp_path, format):
    long = LONG if format != tarfile.USTAR_FORMAT else LONG[:1]  # a folder that has a place of its own there
    path = write(tmp_path / "a.tar", [*NAMES, *long, "z.jpg"], format)
    assert files(path) == files(path, by_tarfile=True)
    assert [name for name, _, _ in files(path)] == [name for name in [*NAMES, *long, "z.jpg"] if name != "deep/"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(10))
def test_a_changed_header_is_read_as_by_tarfile_or_refused(tmp_path, format, seed):
    """One byte of its name, size, kind, magic or prefix is another, with its checksum made right again or not."""
    draw = random.Random(seed)
    data = bytearray(write(tmp_path / "a.tar", [*NAMES[:3], "z.jpg"], format, mtime=1.5).read_bytes())
    starts = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    for start in starts:
        changed = data.copy()
        changed[start + draw.choice([*range(10), *range(124, 136), *range(148, 158), 257, 262, 263, 345, 346])] = (
            draw.choice(b"\0 /.05679+-_xgLKS17\x80\xff")
        )
        if draw.random() < 0.7:
            checksum = 256 + sum(changed[start : start + 512]) - sum(changed[start + 148 : start + 156])
            changed[start + 148 : start + 156] = b"%06o\0 " % checksum
        path = tmp_path / "b.tar"
        path.write_bytes(changed)
        assert files(path) == files(path, by_tarfile=True)


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
    except CorruptFile as error:
        return str(error)


def test_names_outside_the_folder_are_refused(tmp_path):
    for name in ("../a.jpg", "/a.jpg", "a\x07.jpg"):
        with pytest.raises(CorruptFile, match="leads out of its folder or has control characters"):
            list(iter_samples(write(tmp_path / "a.tar", [name])))
    with pytest.raises(MissingArtifact):
        list(iter_samples(tmp_path / "absent.tar"))


def test_samples_are_not_kept_in_memory(tmp_path):
    with TarWriter(tmp_path / "a.tar") as tar:
        for row in range(20_000):
            tar.add(f"{row:010d}", {"jpg": b"x", "txt": b"y"})
    tracemalloc.start()
    count = sum(1 for _ in iter_samples(tmp_path / "a.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 200_000
