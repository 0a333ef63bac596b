"""A unit of an artifact: its tar is written whole, and then the done mark that says so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from synthgen.stores.tar import TarWriter, write_json

if TYPE_CHECKING:
    from synthgen.run import Run

__all__ = ["UnitWriter", "checked_mark"]


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
        self._fingerprint = self.run.artifact(self.artifact)["fingerprint"]
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
        try:
            made = kind is None and self._is_made()
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

        Of two artifacts of one unit, such as images and their maps, both come from one worker. So what another left of
        one alone is replaced if its bytes differ, and the second is kept only beside the first that belongs to it.
        """
        there = self.run.has_unit(self.artifact, self.unit, self._fingerprint)
        if not self.second and self.first is None:
            return there
        self._tar.seal()
        if self.first is not None:
            if self.first.sha256 != self._sha256_of(self.first.artifact):
                return True
        elif there and self.run.has_unit(self.second, self.unit, self._fingerprint):
            return True
        return there and self.sha256 == self._sha256_of(self.artifact)

    @property
    def sha256(self) -> str:
        """That of the tar, once it is sealed."""
        return self._tar.sha256

    def _sha256_of(self, artifact: str) -> str:
        mark = self.run.mark(artifact, self.unit)
        return str(mark["sha256"]) if mark else ""
