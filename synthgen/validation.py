"""Check that WebDataset tars, whoever wrote them, can be read by webdataset, wids, Hugging Face datasets and open_clip.

The rules are those of docs/format.md; what breaks a reader is an error, what some readers do not like is a warning.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from synthgen.errors import MissingArtifact, SynthgenError, one_line
from synthgen.image import decode_labels, decode_rgb
from synthgen.json_types import common_type, has_null, is_mixed, type_of
from synthgen.progress import Progress
from synthgen.stores import listing, open_binary, parse_location
from synthgen.stores.checksum import sha256_of
from synthgen.stores.tar import iter_samples, read_member
from synthgen.text import counted
from synthgen.untrusted import MAX_BYTES, read_file, read_json

__all__ = ["Finding", "Validation", "render", "validate_shards"]

IMAGES = ("jpg", "jpeg", "png", "webp")
IGNORED_LABEL = 255  # in masks: pixels without a label
_CODE = ("pyd", "pickle", "pkl", "pth", "pt")  # members that run code when a reader decodes them
_DIFFERENT = "samples have different members, which Hugging Face datasets refuses or drops"
_CHANGED = "the json changes its keys or types, which tables cannot hold"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError)
Level = Literal["error", "warning"]


@dataclass
class Finding:
    """One kind of problem: how often it occurs, and where first."""

    level: Level
    problem: str
    first: str  # the file, and the sample in it
    count: int = 1

    def __str__(self) -> str:
        often = f" ({self.count:,} times)" if self.count > 1 else ""
        return f"{self.level}: {self.problem}; first in {self.first}{often}"


@dataclass
class Validation:
    """The result of :func:`validate_shards`."""

    tars: int = 0
    samples: int = 0
    members: tuple[str, ...] = ()  # of each sample
    findings: list[Finding] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return all(finding.level != "error" for finding in self.findings)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"valid": self.valid, **asdict(self)}

    def add(self, level: Level, problem: str, where: str, count: int = 1) -> None:
        """Count a problem; equal ones are one finding."""
        for finding in self.findings:
            if finding.problem == problem:
                finding.count += count
                return
        self.findings.append(Finding(level, problem, where, count))


@dataclass
class _Tar:
    """What one tar holds."""

    path: Path
    keys: array[int] = field(default_factory=lambda: array("Q"))  # 64-bit hashes, which take less memory than keys
    members: tuple[str, ...] = ()
    type: Any = None  # of the json, see synthgen.json_types
    found: Validation = field(default_factory=Validation)


def validate_shards(folder: str | Path, *, decode: bool = True, progress: Progress | None = None) -> Validation:
    """Check all tars of a data set.

    Args:
        folder: of tars, of folders of tars such as ``train`` and ``val``, or a single tar.
        decode: decode every image and mask; without, only their presence is checked.
        progress: advanced by one per tar.

    Raises:
        MissingArtifact: there is no tar.
    """
    root = parse_location(folder)
    splits = _splits(root)
    tars = [path for paths in splits.values() for path in paths]
    result = Validation(tars=len(tars))
    checked = list[_Tar]()
    progress = progress or Progress()
    progress.start("validate", len(tars), 0)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and hashing release the interpreter lock
            for tar in pool.map(lambda path: _check_tar(path, root, decode), tars):
                checked.append(tar)
                progress.advance(1)
    finally:
        progress.stop()
    for tar in checked:
        result.samples += len(tar.keys)
        for finding in tar.found.findings:
            result.add(finding.level, finding.problem, finding.first, finding.count)
    _compare(checked, root, result)
    counts = {tar.path: len(tar.keys) for tar in checked}
    for place, paths in splits.items():
        _check_names(place, paths, root, result)
    if root.is_dir():
        for place, paths in splits.items():
            _check_sizes(place, {path.name: counts[path] for path in paths}, root, result)
        _check_manifest(root, counts, result)
        _check_card(root, splits, result)
    result.findings.sort(key=lambda finding: finding.level)
    return result


def render(found: Validation) -> str:
    """The result as text: what there is, and a line per finding."""
    members = ", ".join(found.members) or "none"
    head = f"{counted(found.samples, 'samples')} in {counted(found.tars, 'tars')}; members of the first: {members}"
    return "\n".join([head, *map(str, found.findings), "valid" if found.valid else "not valid"])


def _splits(root: Path) -> dict[Path, list[Path]]:
    """The folders with tars, each with its tars in order."""
    if root.is_file():
        return {root.parent: [root]}
    if not root.is_dir():
        raise MissingArtifact(f"there is no folder {root}; give a folder of tars, or a tar")
    found = {place: sorted(place.glob("*.tar")) for place in (root, *sorted(root.iterdir())) if place.is_dir()}
    if not any(found.values()):
        raise MissingArtifact(f"there are no tars in {root} or in its folders")
    return {place: paths for place, paths in found.items() if paths}


# -- samples


def _check_tar(path: Path, root: Path, decode: bool) -> _Tar:
    tar = _Tar(path)
    name = _relative(path, root)
    try:
        with open_binary(path) as file:
            for key, places in iter_samples(path):
                members = {member: read_member(file, place) for member, place in places.items()}
                _check_sample(tar, f"{name}, sample {key}", members, decode)
                tar.keys.append(_hashed(key))
    except (SynthgenError, ValueError) as error:
        tar.found.add("error", "the tar cannot be read to its end", f"{name}: {one_line(error)}")
    if not tar.keys:
        tar.found.add("error", "a tar holds no samples", name)
    _check_stats(tar, root)
    return tar


def _check_stats(tar: _Tar, root: Path) -> None:
    """The number of samples and the sha256 in the ``_stats.json`` of a tar, if there is one."""
    stats = _described(tar.path.with_name(f"{tar.path.stem}_stats.json"), tar.found, root)
    if stats is None:
        return
    written = stats.get("successes", stats.get("count", len(tar.keys)))  # img2dataset counts failed downloads too
    if written != len(tar.keys) or ("sha256" in stats and sha256_of(tar.path) != stats["sha256"]):
        problem = "a tar has another number of samples or another sha256 than its _stats.json"
        tar.found.add("error", problem, _relative(tar.path, root))


def _check_sample(tar: _Tar, where: str, members: Mapping[str, bytes], decode: bool) -> None:
    found, names = tar.found, tuple(sorted(members))
    if not tar.keys:
        tar.members = names
    elif names != tar.members:
        found.add("error", _DIFFERENT, where)
    images = [name for name in names if name in IMAGES]
    if len(images) != 1:
        found.add("error", f"a sample has {len(images)} images (members {', '.join(IMAGES)}), not one", where)
    if any(name.rpartition(".")[2] in _CODE for name in names):
        found.add("error", f"members of the types {', '.join(_CODE)} run code when they are decoded", where)
    for name, check in _MEMBERS.items():
        if name in members and (problem := check(members[name])):
            found.add("error", problem, where)
    if not members.get("txt", b"a caption").strip():
        found.add("warning", "a txt is empty, so the image has no caption", where)
    meta = _object(members.get("json"))
    if meta is not None:
        tar.type, conflict = common_type(tar.type, type_of(meta))
        if conflict:
            found.add("error", _CHANGED, f"{where}: {conflict}")
        if is_mixed(tar.type):
            found.add("error", "a list in the json has items of several types, which tables cannot hold", where)
        if has_null(meta):
            found.add("warning", "the json has null values; a table infers its types from the first samples", where)
    if decode and len(images) == 1:
        _check_pixels(found, where, members[images[0]], members.get("mask.png"), meta)


def _check_pixels(found: Validation, where: str, image: bytes, mask: bytes | None, meta: Any) -> None:
    try:
        size = decode_rgb(image).shape[:2]
    except OSError as error:
        found.add("error", "an image cannot be decoded", f"{where}: {error}")
        return
    if mask is None:
        return
    try:
        labels = decode_labels(mask)
    except OSError as error:
        found.add("error", "a mask.png cannot be decoded", f"{where}: {error}")
        return
    if labels.shape != size:
        found.add("error", "a mask.png has another size than its image", where)
    words = meta.get("words") if meta else None
    if isinstance(words, list) and np.any((labels > len(words)) & (labels != IGNORED_LABEL)):
        found.add("error", "a mask.png has labels above the number of words in the json", where)


def _text_problem(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        return "a txt is not UTF-8"
    return ""


def _class_problem(data: bytes) -> str:
    return "" if re.fullmatch(rb"\s*-?\d{1,18}\s*", data) else "a cls is not a whole number"


def _json_problem(data: bytes) -> str:
    return "" if _object(data) is not None else "a json is not a JSON object"


_MEMBERS: dict[str, Callable[[bytes], str]] = {"txt": _text_problem, "cls": _class_problem, "json": _json_problem}


def _object(data: bytes | None) -> dict[str, Any] | None:
    try:
        value = None if data is None else read_json(data, finite=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# -- the set as a whole


def _compare(tars: list[_Tar], root: Path, result: Validation) -> None:
    """Members and types of all tars, and keys that occur twice."""
    kind = None
    for tar in tars:
        name = _relative(tar.path, root)
        if not tar.keys:
            continue
        result.members = result.members or tar.members
        if tar.members != result.members:
            result.add("error", _DIFFERENT, name)
        kind, conflict = common_type(kind, tar.type)
        if conflict:
            result.add("error", _CHANGED, f"{name}: {conflict}")
    keys = np.concatenate([np.frombuffer(tar.keys, np.uint64) for tar in tars if tar.keys] or [np.zeros(0, np.uint64)])
    order = np.argsort(keys, kind="stable")
    repeated = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if len(repeated):
        first = int(repeated.min())
        for tar in tars:
            if first < len(tar.keys):
                break
            first -= len(tar.keys)
        key, _ = next(islice(iter_samples(tar.path), first, None))
        where = f"{_relative(tar.path, root)}, sample {key}"
        result.add("error", "a key occurs twice, which wids and NeMo Curator refuse", where, len(repeated))


def _check_names(place: Path, paths: list[Path], root: Path, result: Validation) -> None:
    """Names that a brace pattern covers."""
    parts = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in paths]
    if not all(parts) or len({(part[1], len(part[2])) for part in parts if part}) > 1:
        problem = "the names of the tars are not one prefix and a number, so no {000000..000009} covers them"
        result.add("warning", problem, _relative(paths[0], root))
        return
    numbers = sorted(int(part[2]) for part in parts if part)
    for before, after in pairwise(numbers):
        if after > before + 1:
            problem = "the numbers of the tars have gaps, which stops readers of {000000..000009}"
            result.add("error", problem, f"{_relative(place, root)}: {before + 1}", after - before - 1)


def _check_sizes(place: Path, counts: Mapping[str, int], root: Path, result: Validation) -> None:
    """The numbers of samples in ``sizes.json``, if it is there."""
    sizes = _described(place / "sizes.json", result, root)
    if sizes is not None and sizes != dict(counts):
        problem = "sizes.json does not list the tars and their numbers of samples"
        result.add("error", problem, _relative(place / "sizes.json", root))


def _check_manifest(root: Path, counts: Mapping[Path, int], result: Validation) -> None:
    """The tars that dataset.json and the wids indexes list."""
    rows = _objects((_described(root / "dataset.json", result, root) or {}).get("shards"))
    own = rows and all("file" in row for row in rows)  # and not another program's
    if own and {root / str(row["file"]): row.get("samples") for row in rows} != dict(counts):
        result.add("error", "the list of tars and samples is not that of the folder", "dataset.json")
    for path in sorted(root.glob("index*.json")):
        index = _described(path, result, root) or {}
        if index.get("__kind__") != "wids-shard-index-v1":
            continue
        for row in _objects(index.get("shardlist")):
            tar = root / str(index.get("base", "")) / str(row.get("url"))
            if counts.get(tar, row.get("nsamples")) != row.get("nsamples") or not tar.is_file():
                problem = "a wids index lists a tar that is missing or has another number of samples"
                result.add("error", problem, f"{path.name}: {row.get('url')}")


def _check_card(root: Path, splits: Mapping[Path, list[Path]], result: Validation) -> None:
    """A folder with parquet files needs a card, or Hugging Face datasets reads these instead of the tars."""
    if not any(name.endswith(".parquet") for place in splits for name in listing(place)):
        return
    for folder in (root, root.parent):  # the card of a split is above it
        with suppress(OSError):
            if re.search(r"^\s*data_files:", read_file(folder / "README.md").decode(errors="replace"), re.MULTILINE):
                return
    problem = "no data_files in README.md, so load_dataset reads the parquet files instead of the tars"
    result.add("warning", problem, "README.md")


def _described(path: Path, result: Validation, root: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file, or it is none, which is a finding."""
    try:
        value = read_json(read_file(path, MAX_BYTES), MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _UNREADABLE:
        value = None
    if not isinstance(value, dict):
        result.add("error", "a file that describes the tars is not a JSON object", _relative(path, root))
        return None
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; none if it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _relative(path: Path, root: Path) -> str:
    return path.name if path == root or root.is_file() else path.relative_to(root).as_posix()


def _hashed(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
