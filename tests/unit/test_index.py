"""The index of a tar gives back what it was given, in few bytes."""

import io
import pickle
import random
import tarfile
import tracemalloc

import pytest

from synthgen.errors import CorruptFile
from synthgen.stores.index import Member, TarIndex
from synthgen.stores.tar import index_tar, read_tar


def write(path, names, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 37 % 1500
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def read_plainly(path):
    """The same in lists and dictionaries, of a tar in which every name has one dot or more."""
    samples = []
    with tarfile.open(path) as tar:
        for info in tar.getmembers():
            folder, _, base = info.name.rpartition("/")
            stem, _, name = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1][name.lower()] = Member(info.offset_data, info.size)
    return samples


def same(found, wanted):
    """Order counts, of samples and of members."""
    return [(key, list(members.items())) for key, members in found] == [
        (key, list(members.items())) for key, members in wanted
    ]


ENDINGS = ["jpg", "txt", "mask.png", "JSON", "cls", "seg.tif", "ö.npz"]
STEMS = ["0", "a b", "ä", "日本語", "🐕", "part/1", "teil/ü", "n" * 150]


@pytest.mark.parametrize("seed", range(8))
def test_an_index_matches_the_tar(tmp_path, seed):
    """Keys of any script, members in any order, and missing in some samples."""
    draw = random.Random(seed)
    names = []
    for number in range(60):
        key = draw.choice(STEMS) + f"{number}"
        names += [f"{key}.{ending}" for ending in draw.sample(ENDINGS, draw.randint(1, len(ENDINGS)))]
    path = write(tmp_path / "a.tar", names)
    found, wanted = index_tar(path), read_plainly(path)
    assert len(found) == len(wanted) == 60
    assert same(found, wanted)
    for number in draw.sample(range(-60, 60), 30):
        assert same([found[number]], [wanted[number]])
        assert found.key(number) == wanted[number][0]
    for key, members in draw.sample(wanted, 10):  # which are in no order
        assert found.find(key) == members
    assert found.find("absent") is None
    assert index_tar(path) == found == pickle.loads(pickle.dumps(found))
    assert [key for key, _ in read_tar(path, keys={wanted[7][0], wanted[9][0]})] == [wanted[7][0], wanted[9][0]]


def test_numbers_out_of_range(tmp_path):
    found = index_tar(write(tmp_path / "a.tar", ["0.jpg", "1.jpg"]))
    for number in (2, -3):
        with pytest.raises(IndexError):
            found[number]
        with pytest.raises(IndexError):
            found.key(number)


def test_sorted_keys_are_found_by_bisection(monkeypatch):
    looks, found = [], TarIndex.build((f"{number:010d}", {"jpg": Member(number, 1)}) for number in range(1000))
    read = TarIndex.key
    monkeypatch.setattr(TarIndex, "key", lambda index, number: looks.append(number) or read(index, number))
    assert found.find("0000000700") == {"jpg": Member(700, 1)}
    assert len(looks) < 15


def test_offsets_are_exact_in_tars_of_any_size():
    """What is kept in a byte, two, four or eight reads the same."""
    for largest in (0, 255, 256, 2**16 - 1, 2**16, 2**32 - 1, 2**32, 2**50):
        samples = [("0", {"jpg": Member(3, largest)}), ("1", {"jpg": Member(largest, 7)})]
        assert list(TarIndex.build(samples)) == samples


def test_many_lists_of_names():
    samples = [(f"k{number}", {f"n{number}": Member(number, 1)}) for number in range(300)]
    assert list(TarIndex.build(samples)) == samples


def test_errors_name_the_last_key_that_was_read(tmp_path, monkeypatch):
    for names, said in [
        (["a.jpg", "ä.jpg", "ä.JPG"], "sample ä has two members 'jpg'; the last key read is ä;"),
        (["a.jpg", "ä.jpg", "a.txt"], "the key 'a' occurs twice, the second time after 'ä';"),
        (["a.jpg", "b.jpg", "../c.jpg"], "control characters; the last key read is b;"),
        (["../c.jpg"], "control characters; no key could be read;"),
    ]:
        with pytest.raises(CorruptFile, match=said):
            index_tar(write(tmp_path / "a.tar", names))
    monkeypatch.setattr("synthgen.stores.tar.MAX_BYTES", 30)
    with pytest.raises(CorruptFile, match="37 bytes; 30 are the most; no key could be read"):
        list(read_tar(write(tmp_path / "a.tar", ["a.txt", "a.jpg"])))


def test_a_sample_of_five_members_takes_less_than_64_bytes(tmp_path):
    """And as much when it is sent to a process; a dictionary of its members takes 900."""
    names = [f"{number:010d}.{name}" for number in range(1000) for name in ("cls", "jpg", "json", "mask.png", "txt")]
    path = write(tmp_path / "a.tar", names, tarfile.USTAR_FORMAT)
    index_tar(path)
    tracemalloc.start()
    found = index_tar(path)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 64 * len(found)
    assert len(pickle.dumps(found)) < 64 * len(found)
    assert most < 400 * len(found)  # headers are not kept while it is made
