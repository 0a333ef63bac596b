"""Mutated inputs, one after another: each must be read, or refused in one line, soon, and touch nothing else."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from synthgen.errors import SynthgenError
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import READERS, check, prepare

__all__ = ["Outcome", "campaign"]

SLOWEST = 1.0  # seconds of this process's own time that one input may take
_TOUCHING = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
)
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)


@dataclass
class Outcome:
    """What became of the inputs of one reader."""

    name: str
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0  # seconds
    wrong: list[str] = field(default_factory=list)


class Watch:
    """Sees every file that is opened for writing, moved or removed, every program begun and every connection made."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Called by Python itself."""
        if self.inside is None:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {args!r:.100}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and os.fspath(args[0]) != "/dev/null":
                self.note(event, args[0])
        elif event in _TOUCHING:
            self.note(event, args[0])

    def note(self, event: str, name: Any) -> None:
        """Keep what is not inside."""
        inside, self.inside = self.inside, None
        try:
            if inside is not None and not Path(os.fsdecode(name)).resolve().is_relative_to(inside):
                self.seen.append(f"{event} {name!r:.100}")
        finally:
            self.inside = inside


_WATCH = Watch()


def campaign(
    box: Path,
    *,
    inputs: int,
    seed: int = 0,
    only: Sequence[str] = (),
    number: int | None = None,
    keep: Path | None = None,
) -> list[Outcome]:
    """``inputs`` mutated files, dealt out over the readers; the same seed gives the same ones.

    A file that goes wrong is kept in ``keep``, and named with what brings it back.
    """
    prepare(box)
    readers = [reader for reader in READERS if not only or reader.name in only]
    outcomes = []
    for place, reader in enumerate(readers):
        outcome = Outcome(reader.name)
        outcomes.append(outcome)
        path = box / reader.place
        before = path.read_bytes() if path.exists() else None
        check(reader, box)
        share = len(range(place, inputs, len(readers)))
        for index in range(share) if number is None else [number]:
            rng = Random(f"{seed}:{reader.name}:{index}")
            data = mutate(rng.choice(reader.valid), reader.valid, reader.kind, rng)
            path.write_bytes(data)
            wrong = _try(reader.read, path, box, outcome)
            if wrong:
                outcome.wrong.append(f"{reader.name} {index}: {wrong}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{reader.name.replace(' ', '-')}-{seed}-{index}{path.suffix}").write_bytes(data)
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
    shutil.rmtree(box)
    return outcomes


def _try(read: Any, path: Path, box: Path, outcome: Outcome) -> str:
    """Read one file; why that went wrong, or nothing."""
    _WATCH.inside, _WATCH.seen = box.resolve(), []
    started, wrong = time.process_time(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
        outcome.read += 1
    except SynthgenError as error:
        outcome.refused[type(error).__name__] += 1
        if "\n" in str(error):
            wrong = f"more than one line: {str(error)!r:.200}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = f"{type(error).__name__}: {error!s:.200}"
    finally:
        _WATCH.inside = None
    took = time.process_time() - started
    outcome.worst = max(outcome.worst, took)
    if took > SLOWEST:
        wrong = wrong or f"took {took:.2f} s"
    if _WATCH.seen:
        wrong = f"touched what is not its own: {_WATCH.seen[0]}"
    return wrong
