"""Folders of images as samples, and the captions beside them."""

from __future__ import annotations

from pathlib import Path

from synthgen.captions import TABLES, read_beside, read_listing
from synthgen.datasets.samples import IMAGES, ImageDataset, Sample, sample_errors
from synthgen.errors import MissingArtifact, PromptError
from synthgen.image import decode_rgb
from synthgen.stores import parse_location, walk_files
from synthgen.untrusted import read_file, shortened

__all__ = ["CaptionedFolder", "FolderDataset"]


class FolderDataset(ImageDataset):
    """Images in a folder; the first subfolder is the class, and the key is the path in the folder without extension.

    Images are turned upright according to their EXIF orientation. Links to folders are followed (see
    :func:`~synthgen.stores.walk_files`). Files and folders whose names begin with a dot are left out.

    Raises:
        MissingArtifact: there are no images in it.
        CorruptFile: an image cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = parse_location(path)
        extensions = {*(f".{name}" for name in IMAGES), ".bmp", ".gif"}
        self._names = list[str]()  # paths in the folder: for millions of images, Path objects take too much memory
        self._tables = list[Path]()
        for file in walk_files(self.path, hidden=False):
            if file.suffix.lower() in extensions:
                self._names.append(file.relative_to(self.path).as_posix())
            elif file.name in TABLES:
                self._tables.append(file)
        self._names.sort(key=lambda name: name.split("/"))
        if not self._names:
            kinds = ", ".join(sorted(extensions))
            raise MissingArtifact(f"there are neither tars nor images ({kinds}) in {self.path}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        file, key = self.file(index), self.key(index)
        with sample_errors(file, key):
            return Sample(key, decode_rgb(read_file(file), upright=True), self.label(index))

    def file(self, index: int) -> Path:
        """The file of an image."""
        return self.path / self._names[index]

    def key(self, index: int) -> str:
        """The path in the folder, without extension."""
        return self._names[index].rpartition(".")[0]

    def label(self, index: int) -> str | None:
        """The name of the first folder in the path of the image."""
        folder, slash, _ = self._names[index].partition("/")
        return folder if slash else None

    def has_masks(self) -> bool:
        """Image folders have none."""
        return False


class CaptionedFolder(FolderDataset):
    """Images in a folder with their captions.

    If ``metadata``, a file, is given (see :func:`~synthgen.captions.read_listing`), the dataset has only the images
    that it lists; entries without an image are ignored. Without it, captions come from ``metadata.jsonl`` or
    ``metadata.csv`` in the folder or its subfolders, and for an image that these do not list from the ``.txt`` beside
    it.

    Raises:
        MissingArtifact: there are no images, or none that ``metadata`` lists.
        PromptError: captions cannot be read, or a table in the folder lists an image that does not exist.
    """

    def __init__(self, path: str | Path, metadata: str | Path = "") -> None:
        super().__init__(path)
        if metadata:
            listed = read_listing(parse_location(metadata), self.path)
            self._names = [name for name in self._names if name in listed]
            if not self._names:
                first = f": its first entry is {shortened(str(self.path / next(iter(listed))))}" if listed else ""
                raise MissingArtifact(f"no image of {self.path} is listed in {metadata}{first}")
        else:
            listed, names = {}, set(self._names)
            for table in sorted(self._tables):
                found = read_listing(table, self.path)
                if absent := next((name for name in found if name not in names), None):
                    raise PromptError(f"{table} names {absent!r}, and there is no such image in {self.path}")
                if twice := next((name for name in found if name in listed), None):
                    raise PromptError(f"{table} lists {twice!r}, which another table lists as well; keep one")
                listed |= found
        self._captions = [listed[name] if name in listed else read_beside(self.path / name) for name in self._names]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image; the first one is used."""
        return self._captions[index].texts

    def words(self, index: int) -> tuple[str, ...]:
        """The words to mask, if a table lists them."""
        return self._captions[index].words

    def label(self, index: int) -> str | None:
        """The label in a table, else the name of the first folder in the path of the image."""
        return self._captions[index].label or super().label(index)
