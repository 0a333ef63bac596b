"""A unit of an artifact: its tar is written whole, and then the done mark that says so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from synthgen.entries import failure_notes
from synthgen.stores import listing, read_many, stamps
from synthgen.stores._failures import is_of_system, unreadable
from synthgen.stores._lock import locked
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import TarWriter, write_json
from synthgen.untrusted import MAX_JSON, read_file, read_json

if TYPE_CHECKING:
    from synthgen.run import Run

__all__ = [
    "UnitWriter",
    "checked_mark",
    "counts_of",
    "is_finished",
    "iter_marks",
    "read_failures",
    "read_mark",
    "rows_of",
    "units_in",
]


def checked_mark(value: Any) -> dict[str, Any]:
    """A done mark, if it is one.

    Raises:
        ValueError: it is none of synthgen's.
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
        raise ValueError("it is no done mark")
    return value


def read_mark(path: Path) -> dict[str, Any] | None:
    """The done mark at ``path``, or None where there is none.

    Raises:
        StorageError: it is there, and the system does not let it be read.
    """
    try:
        return checked_mark(read_json(read_file(path, MAX_JSON)))
    except OSError as error:
        if is_of_system(error):
            raise unreadable(path, error) from None
        return None
    except ValueError:
        return None


def iter_marks(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The done marks of all units in a folder whose tars are there and as long as their marks say.

    They are read together, but all of a large run would take much memory.
    """
    sizes = listing(folder)
    for name, mark in _read_marks(folder, [name for name in sizes if _is_mark(name)]):
        if mark is not None and sizes.get(f"{name[:-5]}.tar") == mark["bytes"]:
            yield int(name[:-5]), mark


def rows_of(mark: Mapping[str, Any]) -> int:
    """How many samples a unit was made of, by its done mark: those in its tar, and those that failed."""
    failed = mark.get("failed")
    return int(mark.get("count", 0)) + (len(failed) if isinstance(failed, dict) else 0)


def is_finished(tar: Path, fingerprint: str, least: int = 0) -> bool:
    """Whether a unit is whole, and made of ``least`` samples or more with the settings of ``fingerprint``."""
    mark = read_mark(tar.with_suffix(".json"))
    if mark is None or mark["fingerprint"] != fingerprint or rows_of(mark) < least:
        return False
    try:
        return tar.stat().st_size == int(mark["bytes"])
    except (FileNotFoundError, NotADirectoryError):
        return False


def units_in(folder: Path) -> dict[int, tuple[str, int]]:
    """The units in a folder that have done marks, in order: fingerprint and count; ("", 0) where a mark is unreadable.

    The marks are read again only when one of the files has changed.
    """
    files = ((name, *stamp) for name, stamp in stamps(folder).items() if _is_mark(name))
    return dict(_units_in(folder, tuple(sorted(files))))


def counts_of(folder: Path, units: Sequence[int]) -> dict[int, int]:
    """How many samples the tars of these units hold, by their done marks; units without one are left out."""
    if len(units) == 1:  # a worker asks for one after another, while the marks of others change
        mark = read_mark(folder / f"{units[0]:06d}.json")
        return {} if mark is None else {units[0]: int(mark["count"])}
    found = units_in(folder)
    return {unit: found[unit][1] for unit in units if unit in found}


@lru_cache(maxsize=4)
def _units_in(folder: Path, files: tuple[tuple[str, int, int], ...]) -> dict[int, tuple[str, int]]:
    found = {int(name[:-5]): ("", 0) for name, *_ in files}
    for name, mark in _read_marks(folder, [name for name, *_ in files]):
        if mark is not None:
            found[int(name[:-5])] = (mark["fingerprint"], mark["count"])
    return dict(sorted(found.items()))


def _is_mark(name: str) -> bool:
    return name.endswith(".json") and name[:-5].isdecimal()


def _read_marks(folder: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Done marks by their files' names; None for what is no mark."""
    for name, data in read_many(folder, sorted(names), MAX_JSON):
        try:
            yield name, checked_mark(read_json(data))
        except ValueError:
            yield name, None


def read_failures(folder: Path) -> dict[int, str]:
    """The units in a folder that have notes of a failure, each with its reason."""
    found = {}
    for path in failure_notes(folder):
        unit = path.name.partition(".")[0]
        if not (unit.isascii() and unit.isdecimal()):  # not one of ours
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
        self.about: dict[str, Any] = {}  # what else its done mark is to tell
        self.second = ""  # the other artifact of the unit, where there is one that is written after this one
        self.first: UnitWriter | None = None  # that of the other, where it is written before this one
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
        """Count a remark, such as "dropped", for ``status`` and ``view``."""
        self.notes[remark] = self.notes.get(remark, 0) + count

    def fail(self, key: str, reason: str) -> None:
        """Leave a sample out and keep its reason in the done mark; it is counted in the notes."""
        self.failed[key] = reason
        self.note("failed samples")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        path = self._tar.path
        with ExitStack() as stack:
            if kind is None and not isinstance(path, RemotePath):  # in a store there is no lock
                stack.enter_context(locked(path.with_name(f".{path.stem}.lock")))
            self._end(kind, error, trace)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        path = self._tar.path
        try:
            if kind is None:
                self._tar.seal()
            made = kind is None and self._is_made()
            if kind is None and not made:
                self.run.keep_settings(self.artifact, self._entry)
        except BaseException as failed:  # the disk is full, say: nothing half written stays
            self._tar.__exit__(type(failed), failed, failed.__traceback__)
            raise
        if made:  # by another worker, meanwhile
            self._tar.discard()
        elif kind is None:
            path.with_suffix(".json").unlink(missing_ok=True)  # it speaks of another tar
        self._tar.__exit__(kind, error, trace)
        if kind is None and not made:
            mark = {
                "count": self._tar.count,
                "bytes": self._tar.size,
                "sha256": self._tar.sha256,
                "seconds": round(time.perf_counter() - self._started, 3),
                "fingerprint": self._fingerprint,
                "notes": self.notes,
                **({"failed": self.failed} if self.failed else {}),
                **self.about,
            }
            write_json(path.with_suffix(".json"), mark)
        if kind is None:
            path.with_suffix(".failed.json").unlink(missing_ok=True)

    def _is_made(self) -> bool:
        """Whether what is there stays: it has the same bytes, or those of another kind of device, and is whole.

        A unit of fewer samples than these, of a run that has grown since, is replaced; one of more never is.

        Of two artifacts of one unit, such as images and their maps, both come from one worker. So what another left of
        one alone is replaced if its bytes differ, and the second is kept only beside the first that belongs to it.
        """
        rows = self.count + len(self.failed)
        there = self.run.has_unit(self.artifact, self.unit, self._fingerprint, rows)
        if not self.second and self.first is None:
            return there
        if self.first is not None:
            if self.first.sha256 != self._sha256_of(self.first.artifact):
                return True
        elif there:
            mark = self.run.mark(self.artifact, self.unit)
            if mark is not None and rows_of(mark) > rows:
                return True
            if mark is not None and self.run.has_unit(self.second, self.unit, self._fingerprint, mark["count"]):
                return True
        return there and self.sha256 == self._sha256_of(self.artifact)

    @property
    def sha256(self) -> str:
        """That of the tar, once it is sealed."""
        return self._tar.sha256

    def _sha256_of(self, artifact: str) -> str:
        mark = self.run.mark(artifact, self.unit)
        return str(mark["sha256"]) if mark else ""
