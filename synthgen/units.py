"""Units: the tars of an artifact, each with a done mark.

A unit is a number, the same in ``images``, ``maps`` and ``masks``. Its tar appears whole (``000012.tar``), and then the
done mark beside it (``000012.json``): a unit without one, or with one of other settings, is made again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from synthgen.entries import FAILED, failure_files
from synthgen.stores import listing, read_many, stat_files
from synthgen.stores._failures import is_system_error, unreadable
from synthgen.stores._lock import locked
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import TarWriter, write_json
from synthgen.untrusted import MAX_JSON, read_file, read_json

if TYPE_CHECKING:
    from synthgen.run import Run

__all__ = [
    "UnitWriter",
    "is_finished",
    "iter_marks",
    "list_units",
    "num_attempted",
    "read_failures",
    "read_mark",
    "sample_counts",
    "validate_mark",
]


def validate_mark(value: Any) -> dict[str, Any]:
    """``value``, if it is a done mark.

    Raises:
        ValueError: it is not.
    """
    counts = ("count", "bytes")
    if (
        not isinstance(value, dict)
        or not all(isinstance(value.get(name), str) for name in ("fingerprint", "sha256"))
        or not all(isinstance(value.get(name), int) and 0 <= value[name] < 2**63 for name in counts)
        or not all(isinstance(value.get(name, 0), int | float) for name in ("seconds", "duration"))
        or not isinstance(notes := value.get("notes", {}), dict)
        or not all(isinstance(count, int) for count in notes.values())
        or not isinstance(value.get("failed", {}), dict | int)
    ):
        raise ValueError("it is not a done mark")
    return value


def read_mark(path: Path) -> dict[str, Any] | None:
    """The done mark at ``path``, or None if there is none, or no valid one.

    Raises:
        StorageError: the system cannot read the file.
    """
    try:
        return validate_mark(read_json(read_file(path, MAX_JSON)))
    except OSError as error:
        if is_system_error(error):
            raise unreadable(path, error) from None
        return None
    except ValueError:
        return None


def iter_marks(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and done mark of each unit in a folder whose tar has the length in its mark.

    Marks are read in batches and yielded one by one, as those of a large run would fill the memory.
    """
    sizes = listing(folder)
    for name, mark in _read_marks(folder, [name for name in sizes if _is_mark(name)]):
        if mark is not None and sizes.get(f"{name[:-5]}.tar") == mark["bytes"]:
            yield int(name[:-5]), mark


def num_attempted(mark: Mapping[str, Any]) -> int:
    """How many samples a unit was made of: those in its tar, and those that failed."""
    failed = mark.get("failed")
    return int(mark.get("count", 0)) + (len(failed) if isinstance(failed, dict) else 0)


def is_finished(tar: Path, fingerprint: str, min_samples: int = 0) -> bool:
    """Whether a unit is complete, has this fingerprint, and was made of at least ``min_samples`` samples."""
    mark = read_mark(tar.with_suffix(".json"))
    if mark is None or mark["fingerprint"] != fingerprint or num_attempted(mark) < min_samples:
        return False
    try:
        return tar.stat().st_size == int(mark["bytes"])
    except (FileNotFoundError, NotADirectoryError):
        return False


def list_units(folder: Path) -> dict[int, tuple[str, int]]:
    """Fingerprint and count of each unit in a folder that has a done mark, in order; ("", 0) for an invalid mark.

    The marks are read again only if one of the files has changed.
    """
    files = ((name, *stamp) for name, stamp in stat_files(folder).items() if _is_mark(name))
    return dict(_list_units(folder, tuple(sorted(files))))


def sample_counts(folder: Path, units: Sequence[int]) -> dict[int, int]:
    """How many samples the tars of these units hold; units without a done mark are left out."""
    if len(units) == 1:  # workers ask for one unit at a time, while other marks change
        mark = read_mark(folder / f"{units[0]:06d}.json")
        return {} if mark is None else {units[0]: int(mark["count"])}
    found = list_units(folder)
    return {unit: found[unit][1] for unit in units if unit in found}


@lru_cache(maxsize=4)
def _list_units(folder: Path, files: tuple[tuple[str, int, int, int], ...]) -> dict[int, tuple[str, int]]:
    found = {int(name[:-5]): ("", 0) for name, *_ in files}
    for name, mark in _read_marks(folder, [name for name, *_ in files]):
        if mark is not None:
            found[int(name[:-5])] = (mark["fingerprint"], mark["count"])
    return dict(sorted(found.items()))


def _is_mark(name: str) -> bool:
    return name.endswith(".json") and name[:-5].isdecimal()


def _read_marks(folder: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each file name with its done mark; None for an invalid one."""
    for name, data in read_many(folder, sorted(names), MAX_JSON):
        try:
            yield name, validate_mark(read_json(data))
        except ValueError:
            yield name, None


def read_failures(folder: Path) -> dict[int, str]:
    """The units in a folder that have failure files, each with its reason."""
    found = {}
    for path in failure_files(folder):
        unit = path.name.partition(".")[0]
        if not (unit.isascii() and unit.isdecimal()):  # not a file of synthgen
            continue
        try:
            found[int(unit)] = str(read_json(read_file(path, MAX_JSON))["error"])
        except (OSError, ValueError, LookupError, TypeError):
            found[int(unit)] = f"{path} cannot be read"
    return found


class UnitWriter:
    """Write one unit of an artifact: the tar, then its done mark (see :meth:`Run.write`)."""

    def __init__(self, run: Run, artifact: str, unit: int) -> None:
        self.run, self.artifact, self.unit = run, artifact, unit
        self.notes: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.about: dict[str, Any] = {}  # further fields of the done mark
        self.followed_by = ""  # the artifact that belongs to this one and is written after it: "maps" for "images"
        self.follows: UnitWriter | None = None  # the writer of the artifact that this one belongs to
        self._tar = TarWriter(run.tar(artifact, unit))

    def __enter__(self) -> UnitWriter:
        self._entry = self.run.artifact(self.artifact)
        self._fingerprint = self._entry["fingerprint"]
        self._started = time.perf_counter()
        self._tar.__enter__()
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample."""
        self._tar.add(key, members)

    @property
    def count(self) -> int:
        """Samples added so far."""
        return self._tar.count

    def note(self, remark: str, count: int = 1) -> None:
        """Count a remark, such as "dropped", which ``status`` and ``view`` show."""
        self.notes[remark] = self.notes.get(remark, 0) + count

    def fail(self, key: str, reason: str) -> None:
        """Leave a sample out; its reason goes to the done mark."""
        self.failed[key] = reason
        self.note("failed samples")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._tar.__exit__(kind, error, trace)
            return
        path = self._tar.path
        with nullcontext() if isinstance(path, RemotePath) else locked(path.with_name(f".{path.stem}.lock")):
            self._commit()

    def _commit(self) -> None:
        """Rename the tar and write its done mark, unless another worker has made the unit."""
        path = self._tar.path
        mark = path.with_suffix(".json")
        try:
            self._tar.seal()
            made = self._is_made()
            if made:
                self._tar.discard()
            else:
                self.run.ensure_settings(self.artifact, self._entry)
                if self.followed_by and self._sha256_of(self.artifact) not in ("", self.sha256):
                    # the maps there are of other images
                    self.run.tar(self.followed_by, self.unit).with_suffix(".json").unlink(missing_ok=True)
                mark.unlink(missing_ok=True)
        except BaseException as failed:  # for example the disk is full: leave no partial file
            self._tar.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._tar.__exit__(None, None, None)
        if not made:
            content = {
                "count": self._tar.count,
                "bytes": self._tar.size,
                "sha256": self._tar.sha256,
                "seconds": round(time.perf_counter() - self._started, 3),
                "fingerprint": self._fingerprint,
                "notes": self.notes,
                **({"failed": self.failed} if self.failed else {}),
                **self.about,
            }
            write_json(mark, content)
        path.with_suffix(FAILED).unlink(missing_ok=True)

    def _is_made(self) -> bool:
        """Whether to keep the existing unit: it is complete, and has the same bytes or those of another kind of device.

        A unit with fewer samples is replaced (the run has grown), one with more never is.

        Images and maps of a unit must come from one worker. So if a killed worker left only one of them, it is replaced
        if its bytes differ; and maps are kept only if the images that they belong to were kept too.
        """
        attempted = self.count + len(self.failed)
        is_complete = self.run.has_unit(self.artifact, self.unit, self._fingerprint, attempted)
        if self.follows is not None:
            if self.follows.sha256 != self._sha256_of(self.follows.artifact):  # those of another worker were kept
                return True
        elif not self.followed_by:
            return is_complete
        elif is_complete and (mark := self.run.mark(self.artifact, self.unit)) is not None:
            if num_attempted(mark) > attempted:
                return True
            if self.run.has_unit(self.followed_by, self.unit, self._fingerprint, mark["count"]):
                return True
        return is_complete and self.sha256 == self._sha256_of(self.artifact)

    @property
    def sha256(self) -> str:
        """The checksum of the tar, once it is sealed."""
        return self._tar.sha256

    def _sha256_of(self, artifact: str) -> str:
        mark = self.run.mark(artifact, self.unit)
        return str(mark["sha256"]) if mark else ""
