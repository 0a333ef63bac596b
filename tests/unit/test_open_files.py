"""Files that stay open between reads."""

import os
import pickle

import pytest

from synthgen.stores import open_files, parse_location
from synthgen.stores.cache import cache_folder
from synthgen.stores.open_files import OpenFiles
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import write_bytes


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / name for name in "abc"]
    for path in found:
        path.write_bytes(path.name.encode() * 10)
    return found


def test_a_file_is_opened_once_and_the_first_is_closed_for_the_next(paths, monkeypatch):
    monkeypatch.setattr(open_files, "_MAX_OPEN", 2)
    files = OpenFiles()
    first, second = files[paths[0]], files[paths[1]]
    assert files[paths[0]] is first
    third = files[paths[2]]
    assert first.closed
    assert not second.closed
    assert third.read(1) == b"c"
    assert files[paths[0]].read(1) == b"a"


def test_a_copy_opens_its_own(paths):
    files = OpenFiles()
    files[paths[0]].seek(5)
    again = pickle.loads(pickle.dumps(files))
    assert again[paths[0]].tell() == 0
    assert files[paths[0]].tell() == 5


def test_a_forked_process_opens_its_own(paths):
    files = OpenFiles()
    files[paths[0]].seek(5)
    child = os.fork()
    if not child:  # a place that is shared would be moved for both
        os._exit(files[paths[0]].tell())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert files[paths[0]].tell() == 5


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        OpenFiles()[tmp_path / "none"]


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Three files in a store, and the names of those it was asked about."""
    asked, version = [], RemotePath.version

    def counted(self):
        asked.append(self.name)
        return version(self)

    monkeypatch.setattr(RemotePath, "version", counted)
    monkeypatch.setattr(open_files, "_MAX_OPEN", 1)
    monkeypatch.setenv("SYNTHGEN_CACHE", str(tmp_path / "cache"))
    found = [parse_location(f"memory://{tmp_path.name}/{name}") for name in "abc"]
    for path in found:
        write_bytes(path, path.name.encode())
    return found, asked


def test_a_copy_is_opened_again_without_a_request(remote):
    (paths, asked), files = remote, OpenFiles()
    assert [files[path].read() for path in paths] == [b"a", b"b", b"c"]
    asked.clear()
    for known in (files, pickle.loads(pickle.dumps(files))):
        assert [known[path].read() for path in paths] == [b"a", b"b", b"c"]
    assert asked == []


def test_a_copy_that_was_dropped_is_made_again(remote):
    (paths, asked), files = remote, OpenFiles()
    for path in paths:
        files[path].read()
    for copy in (cache_folder() / "files").iterdir():
        copy.unlink()
    asked.clear()
    assert [files[path].read() for path in paths] == [b"a", b"b", b"c"]
    assert set(asked) == {"a", "b", "c"}


def test_a_copy_that_is_opened_again_is_the_last_to_be_dropped(remote):
    (paths, _), files = remote, OpenFiles()
    for path in paths:
        os.utime(files[path].name, (1000, 1000))
    files[paths[0]].read()
    times = [files._copies[path].stat().st_mtime for path in paths]
    assert times[0] > times[1] == times[2] == 1000
