"""Folders of images: their order, and what a dataset of many keeps in memory."""

import gc
import tracemalloc

import numpy as np
import pytest

from synthgen.datasets import CaptionedFolder, FolderDataset, folders
from synthgen.errors import MissingArtifact
from synthgen.image import encode_png


def test_images_are_sorted_folder_by_folder_and_named_without_extension(tmp_path):
    names = ["a/b.png", "a/deep/x.v2.PNG", "a-b.png", "a.png"]  # as paths sort, and not as texts: "-" and "." < "/"
    for row, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_png(np.full((2, 2, 3), row, np.uint8)))
    (tmp_path / "list.csv").write_text("file_name,text\na.png,one\nabsent.png,two\na/b.png,three\n")
    images = FolderDataset(tmp_path)
    assert [images.file(row) for row in range(4)] == [tmp_path / name for name in names]
    assert [images[row].key for row in range(4)] == ["a/b", "a/deep/x.v2", "a-b", "a"]
    assert [int(images[row].image[0, 0, 0]) for row in range(4)] == [0, 1, 2, 3]
    assert [images.label(row) for row in range(4)] == ["a", "a", None, None]
    listed = CaptionedFolder(tmp_path, tmp_path / "list.csv")
    assert [(listed.key(row), listed.captions(row)) for row in range(2)] == [("a/b", ("three",)), ("a", ("one",))]
    (tmp_path / "list.csv").write_text("file_name,text\nphotos/a.png,one\n")
    with pytest.raises(MissingArtifact, match=r"listed in .*list\.csv: its first entry is .*/photos/a\.png$"):
        CaptionedFolder(tmp_path, tmp_path / "list.csv")


def test_an_image_takes_little_memory(tmp_path, monkeypatch):
    """A ``Path`` would take 270 bytes."""
    names = [f"n{row % 100:08d}/image_{row:08d}.jpg" for row in range(5000)]
    monkeypatch.setattr(folders, "walk_files", lambda folder, hidden: (folder / name for name in names))
    tracemalloc.start()
    images = FolderDataset(tmp_path)
    gc.collect()
    with_images = tracemalloc.get_traced_memory()[0]
    assert len(images) == 5000
    del images
    gc.collect()
    freed = with_images - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 5000 * 50 < freed < 5000 * 150
