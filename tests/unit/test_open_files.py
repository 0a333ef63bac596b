"""Files that stay open between two readings."""

import os
import pickle

import pytest

from synthgen.stores import open_files
from synthgen.stores.open_files import OpenFiles


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / name for name in "abc"]
    for path in found:
        path.write_bytes(path.name.encode() * 10)
    return found


def test_a_file_is_opened_once_and_the_first_is_closed_for_the_next(paths, monkeypatch):
    monkeypatch.setattr(open_files, "_MOST", 2)
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


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        OpenFiles()[tmp_path / "none"]
