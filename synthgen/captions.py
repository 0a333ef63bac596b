"""Read captions of the images in a folder: text files beside them, a Hugging Face metadata table, or COCO captions."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from synthgen.errors import MissingArtifact, PromptError
from synthgen.untrusted import read_file, read_json, read_lines, shortened, visible

__all__ = ["LONGEST", "TABLES", "TEXT_KEYS", "Caption", "iter_listing", "read_beside", "read_listing"]

TABLES = ("metadata.jsonl", "metadata.csv")  # file names expected in a folder of images and its subfolders
TEXT_KEYS = ("text", "caption", "prompt")  # names of the caption in tables and json members; the first that exists
LONGEST = 10_000  # characters of a caption; text encoders read a few hundred
_MAX_COCO = 2**29  # bytes of a COCO captions file; the largest, of 2017, has 92 million


@dataclass(frozen=True, slots=True)
class Caption:
    """The captions of one image, its words and its label."""

    texts: tuple[str, ...] = ()  # none, one or several
    words: tuple[str, ...] = ()  # the words to mask, if they are listed
    label: str | None = None


def read_listing(path: Path, folder: Path | None = None) -> dict[str, Caption]:
    """The captions in a file, by the path of each image under ``folder`` (by default the file's own).

    ``.jsonl`` has an object per line and ``.csv`` a header and a row per image, both with ``file_name`` and ``text``
    (or ``caption``, or ``prompt``), and optionally ``words`` (a list; in a csv separated by semicolons) and ``label``.
    Column names of a csv may be in any case, and spaces may follow its commas.
    ``.json`` is COCO's captions file, with ``images`` and ``annotations``; its names are always relative to ``folder``.

    Raises:
        MissingArtifact: there is no such file.
        PromptError: it cannot be read, or names a file twice or one outside the folder; names the line.
    """
    found: dict[str, Caption] = {}
    for where, name, caption in iter_listing(path, folder):
        if name in found:
            raise PromptError(f"{path}, {where}: the file {shortened(name)!r} is listed twice")
        found[name] = caption
    return found


def iter_listing(path: Path, folder: Path | None = None) -> Iterator[tuple[str, str, Caption]]:
    """The rows of :func:`read_listing`, one at a time: the row's place in the file, its image and its caption.

    Raises:
        MissingArtifact, PromptError: as for :func:`read_listing`, when the row is reached; duplicates are not detected.
    """
    readers, kind = {".jsonl": _json_rows, ".csv": _csv_rows, ".json": _coco_rows}, path.suffix.lower()
    if kind not in readers:
        raise PromptError(f"{path} is not a list of captions; give a .jsonl, a .csv, or COCO's captions as .json")
    own = folder is not None and kind != ".json" and path.is_relative_to(folder)
    under = path.parent.relative_to(folder).as_posix() if folder and own else "."
    try:
        for where, row in readers[kind](path):
            try:
                read = (PurePosixPath(under) / inside(row.get("file_name"))).as_posix(), _caption(row)
            except ValueError as error:
                raise PromptError(f"{path}, {where}: {error}") from None
            yield where, *read
    except FileNotFoundError:
        raise MissingArtifact(f"there is no file {path}; give one with --metadata FILE") from None
    except csv.Error as error:
        quotes = "; put quotes around a whole text and double those within it" if '"' in str(error) else ""
        raise PromptError(f"{path} cannot be read: {' '.join(str(error).split())}{quotes}") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PromptError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def read_beside(image: Path) -> Caption:
    """The first non-empty line of the ``.txt`` beside an image; an empty caption if there is no such file.

    Raises:
        PromptError: the file cannot be read.
    """
    path = image.with_suffix(".txt")
    if path.exists() and not path.is_file():  # a pipe may never end
        raise PromptError(f"{path} cannot be read: it is not a regular file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
        if "\0" in text:
            raise PromptError(f"{path} is not UTF-8 text, as it holds zero bytes; save it as UTF-8")
        lines = (visible(line).strip() for line in text.splitlines())
        return Caption(tuple(line for line in lines if line)[:1])
    except FileNotFoundError:
        return Caption()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {' '.join(str(error).split())}; save it as UTF-8") from None


def inside(name: Any) -> PurePosixPath:
    """A file name as a path that stays inside its folder.

    Raises:
        ValueError: ``name`` is not a file name, or leads outside the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("'file_name' must be the name of a file")
    path = PurePosixPath(name.replace("\\", "/"))
    if (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or PureWindowsPath(name).drive
        or visible(name) != name
    ):
        raise ValueError(f"the file name {shortened(name)!r} does not lead to a file in its folder")
    return path


def _caption(row: Mapping[str, Any]) -> Caption:
    texts, words, label = row.get("texts"), row.get("words") or [], row.get("label")
    if texts is None:
        text = next((row[key] for key in TEXT_KEYS if row.get(key)), None)
        texts = [] if text is None else [text]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("the caption must be a text")
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError("'words' must be a list of words of the caption")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise ValueError("'label' must be a text or a whole number")
    stripped = (" ".join(visible(text).split()) for text in texts)
    shown = None if label is None else visible(str(label)).strip() or None
    return Caption(tuple(text for text in stripped if text), tuple(visible(word) for word in words), shown)


# -- readers of each format: the place of each row, and the row


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = read_json(line, unique_keys=True)
        except ValueError as error:
            raise PromptError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}, line {number}: expected an object with file_name and text")
        yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = csv.DictReader(read_lines(path), strict=True, skipinitialspace=True)
    columns = [name.strip().lower() for name in rows.fieldnames or ()]
    while columns and not columns[-1]:  # values in unnamed last columns count as too many fields
        columns.pop()
    rows.fieldnames = columns
    if "file_name" not in columns:
        raise PromptError(f"{path} has no column 'file_name'; its first line must name the columns, with commas")
    if twice := next((name for name in ("file_name", *TEXT_KEYS, "words", "label") if columns.count(name) > 1), None):
        raise PromptError(f"{path} has two columns {twice!r}; keep one")
    others = [name for name in columns if name and name != "file_name"]
    if others and not {*TEXT_KEYS, "label"} & {*others}:  # file_name alone just selects the images
        raise PromptError(
            f"{path} has no column 'text', 'caption', 'prompt' or 'label', but {shortened(', '.join(others))}; name "
            "the column of the captions 'text', or keep only 'file_name' if there are none"
        )
    for row in rows:
        where, more = f"line {rows.line_num}", row.pop(None, ())
        if any(field.strip() for field in more):
            raise PromptError(f"{path}, {where}: it has more fields than columns; put quotes around a text with commas")
        listed = [word.strip() for word in (row.get("words") or "").split(";")]
        yield where, {**row, "words": [word for word in listed if word]}


def _coco_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = read_json(read_file(path, _MAX_COCO), _MAX_COCO)
    images, annotations = (_rows(path, content, name) for name in ("images", "annotations"))
    captions = [row for row in annotations if "caption" in row]
    if not captions:
        raise PromptError(f"{path} has no captions; of COCO's files, give captions_*.json")
    ids = Counter(str(image.get("id")) for image in images)
    if twice := next((name for name, count in ids.items() if count > 1), None):
        raise PromptError(f"{path} has two images with the id {shortened(twice)}; captions name images by their id")
    texts: dict[str, list[Any]] = {}
    for row in sorted(captions, key=lambda row: row["id"] if isinstance(row.get("id"), int) else 0):
        texts.setdefault(str(row.get("image_id")), []).append(row["caption"])
    for number, image in enumerate(images, start=1):
        yield f"image {number}", {"file_name": image.get("file_name"), "texts": texts.get(str(image.get("id")), [])}


def _rows(path: Path, content: Any, name: str) -> list[dict[str, Any]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PromptError(f"{path} is not COCO's captions: it has no list {name!r} of objects")
    return rows
