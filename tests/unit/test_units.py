"""Images and maps of a unit come from one worker, whoever else has died in the middle or works on the same unit."""

from __future__ import annotations

import errno
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from synthgen import codecs
from synthgen.errors import StorageError
from synthgen.records import Generation
from synthgen.run import Run
from synthgen.stages._generations import write_unit
from tests.factories import make_generation, make_run

KINDS = ("one", "other")  # of device: they round differently


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With settings, and no unit 7."""
    return make_run(tmp_path / "run", units=1, unit_size=1, masks=False)


def drawn(kind: str) -> Iterator[list[Generation]]:
    yield [make_generation("0000070000", ("disc",), 32, seed=KINDS.index(kind))[0]]


def kinds(run: Run) -> tuple[str, str]:
    """Of which device images and maps are."""
    ((key, image),), ((_, maps),) = (list(run.read(name, 7)) for name in ("images", "maps"))
    _, pixels, _ = codecs.decode_image(key, image)
    found = [next(drawn(kind))[0] for kind in KINDS]
    of_image = next(kind for kind, one in zip(KINDS, found, strict=True) if np.array_equal(one.image, pixels))
    of_maps = next(kind for kind, one in zip(KINDS, found, strict=True) if codecs.encode_maps(one.maps) == maps)
    return of_image, of_maps


def state(run: Run) -> list[tuple[int, int]]:
    paths = (run.tar(name, 7).with_suffix(ending) for name in ("images", "maps") for ending in (".tar", ".json"))
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


def test_a_batch_is_freed_while_the_next_one_is_drawn(run: Run) -> None:
    freed: list[bool] = []

    def batches() -> Iterator[list[Generation]]:
        made = [next(drawn("one"))]
        image = weakref.ref(made[0][0].image)
        yield made.pop()
        for _ in range(3000):  # until the other thread has written it
            if image() is None:
                break
            time.sleep(0.01)
        freed.append(image() is None)

    write_unit(run, 7, batches(), lambda count: None)
    assert freed == [True]


@pytest.mark.parametrize("lost", ["images", "maps"])
def test_half_a_unit_from_another_device_is_replaced(run: Run, lost: str) -> None:
    write_unit(run, 7, drawn("one"), lambda count: None)
    run.tar(lost, 7).with_suffix(".json").unlink()  # killed between the two marks, or one was damaged and deleted
    write_unit(run, 7, drawn("other"), lambda count: None)
    assert kinds(run) == ("other", "other")


@pytest.mark.parametrize("lost", ["images", "maps"])
def test_half_a_unit_with_the_same_bytes_is_kept(run: Run, lost: str) -> None:
    write_unit(run, 7, drawn("one"), lambda count: None)
    before = state(run)
    run.tar(lost, 7).with_suffix(".json").unlink()
    write_unit(run, 7, drawn("one"), lambda count: None)
    kept = slice(2, 4) if lost == "images" else slice(0, 2)
    assert state(run)[kept] == before[kept]
    assert kinds(run) == ("one", "one")


def test_a_complete_unit_is_kept(run: Run) -> None:
    write_unit(run, 7, drawn("one"), lambda count: None)
    before = state(run)
    write_unit(run, 7, drawn("other"), lambda count: None)
    assert state(run) == before


@pytest.mark.parametrize("after", ["images", "maps"])
def test_two_writers_of_a_unit_leave_the_files_of_one(run: Run, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other comes in right after the first of the two has come down, or when both have."""
    from synthgen.units import UnitWriter

    leave = UnitWriter.__exit__

    def leave_and_let_in(self: UnitWriter, *given: object) -> None:
        leave(self, *given)  # type: ignore[arg-type]
        if self.artifact == after:
            monkeypatch.setattr(UnitWriter, "__exit__", leave)
            write_unit(run, 7, drawn("other"), lambda count: None)

    monkeypatch.setattr(UnitWriter, "__exit__", leave_and_let_in)
    write_unit(run, 7, drawn("one"), lambda count: None)
    first, second = kinds(run)
    assert first == second


def test_a_full_disk_leaves_no_partial_unit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*images/000007\.tar: No space left"):
        write_unit(run, 7, drawn("one"), lambda count: None)
    assert not [path for name in ("images", "maps") for path in run.folder(name).glob("*000007*")]
