"""Folders of images as samples, and the captions beside them."""

from __future__ import annotations

from pathlib import Path

from synthgen.captions import TABLES, read_beside, read_listing
from synthgen.datasets.samples import IMAGES, ImageDataset, Sample, telling
from synthgen.errors import MissingArtifact, PromptError
from synthgen.image import decode_rgb
from synthgen.stores import parse_location, walk_files
from synthgen.untrusted import read_file

__all__ = ["CaptionedFolder", "FolderDataset"]


class FolderDataset(ImageDataset):
    """Images in a folder; the name of a subfolder is the class. The key is the path in the folder, without its ending.

    Images are turned upright as their EXIF says. Links to folders are followed (see
    :func:`~synthgen.stores.walk_files`). Files and folders whose names begin with a dot are left out.

    Raises:
        MissingArtifact: there are no images in it.
        CorruptFile: an image cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = parse_location(path)
        endings = {*(f".{name}" for name in IMAGES), ".bmp", ".gif"}
        self._files, self._tables = list[Path](), list[Path]()
        for file in walk_files(self.path, hidden=False):
            if file.suffix.lower() in endings:
                self._files.append(file)
            elif file.name in TABLES:
                self._tables.append(file)
        self._files.sort()
        if not self._files:
            kinds = ", ".join(sorted(endings))
            raise MissingArtifact(f"there are neither tars nor images ({kinds}) in {self.path}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        file, key = self._files[index], self.key(index)
        with telling(file, key):
            return Sample(key, decode_rgb(read_file(file), upright=True), self.label(index))

    def key(self, index: int) -> str:
        """The path in the folder, without its ending."""
        return self._files[index].relative_to(self.path).with_suffix("").as_posix()

    def label(self, index: int) -> str | None:
        """The name of the first folder on the way to the image."""
        folders = self._files[index].relative_to(self.path).parts[:-1]
        return folders[0] if folders else None

    def has_masks(self) -> bool:
        """Image folders have none."""
        return False


class CaptionedFolder(FolderDataset):
    """Images in a folder with their captions.

    If ``metadata``, a file, is given (see :func:`~synthgen.captions.read_listing`), only images that it lists count,
    and entries without an image are ignored. Without it: ``metadata.jsonl`` or ``metadata.csv`` in
    the folder or in folders in it, and for an image that these do not name, the ``.txt`` beside it.

    Raises:
        MissingArtifact: there are no images, or none that ``metadata`` lists.
        PromptError: captions cannot be read, or a table in the folder names an image that is not there.
    """

    def __init__(self, path: str | Path, metadata: str | Path = "") -> None:
        super().__init__(path)
        by_name = {file.relative_to(self.path).as_posix(): file for file in self._files}
        if metadata:
            listed = read_listing(parse_location(metadata), self.path)
            self._files = [file for name, file in by_name.items() if name in listed]
            if not self._files:
                raise MissingArtifact(f"no image of {self.path} is listed in {metadata}; its file names are relative")
            self.said = [listed[name] for name in by_name if name in listed]
            return
        listed = {}
        for table in sorted(self._tables):
            found = read_listing(table, self.path)
            if absent := next((name for name in found if name not in by_name), None):
                raise PromptError(f"{table} names {absent!r}, and there is no such image in {self.path}")
            listed |= found
        self.said = [listed[name] if name in listed else read_beside(file) for name, file in by_name.items()]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image; the first one is used."""
        return self.said[index].texts

    def marked(self, index: int) -> tuple[str, ...]:
        """The words that a table lists."""
        return self.said[index].words

    def label(self, index: int) -> str | None:
        """The label that a table gives, else the name of the first folder on the way to the image."""
        return self.said[index].label or super().label(index)
