"""One moment: a run as it was when a stage began, the command that is disturbed, and the same command after that."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.line import Line, begun, sums
from tests.faults.zygote import Ended, Running, Zygote

__all__ = ["Late", "Place", "Scene", "Undisturbed", "Wrong", "run_undisturbed"]

PAGE = 4096  # bytes; a file takes whole ones
PATIENCE = 120.0  # seconds


class Late(Exception):
    """The command had ended before it could be disturbed."""


class Wrong(Exception):
    """The disturbed command ended as it must not."""


@dataclass(frozen=True)
class Place:
    """Where a fault strikes: a stage of a line, and what is damaged there if anything is."""

    line: str
    stage: str
    target: str = ""  # a pattern of files under the run


@dataclass
class Undisturbed:
    """A line that nothing happened to."""

    line: Line
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)  # from a stage's first file to its end
    pages: dict[str, int] = field(default_factory=dict)  # that a stage adds
    sums: dict[str, str] = field(default_factory=dict)

    def before(self, stage: str) -> Path:
        """The run as it was when ``stage`` began."""
        return self.folder / f"before-{stage}"


def run_undisturbed(line: Line, box: Path, zygote: Zygote) -> Undisturbed:
    """Run a line, a stage at a time, and keep what there was between them."""
    whole = Undisturbed(line, box / f"whole-{line.name}")
    whole.folder.mkdir()
    scene = Scene(whole, zygote, whole.folder, Random(0))
    (scene.folder / "line.yaml").write_text(line.file)
    scene.run.mkdir()
    for stage in line.stages:
        shutil.copytree(scene.run, whole.before(stage))
        before, running = pages(scene.run), scene.start("--only", stage)
        scene.wait_for_beginning(running, stage)
        started = time.monotonic()
        ended = running.wait()
        whole.seconds[stage] = time.monotonic() - started
        if ended.status:
            raise RuntimeError(f"{stage} ended with {ended.status} though nothing disturbed it: {ended.said}")
        whole.pages[stage] = pages(scene.run) - before
    whole.sums = sums(scene.run)
    return whole


class Scene:
    """A folder with a run in it, on which one thing goes wrong."""

    def __init__(self, whole: Undisturbed, zygote: Zygote, folder: Path, rng: Random, share: float = 0.0) -> None:
        self.whole, self.zygote, self.folder, self.rng = whole, zygote, folder, rng
        self.share = share  # how far the stage has come, or how much of the room is left
        self.damaged: set[str] = set()  # files that were spoilt on purpose, as they stand under the run
        self.env: dict[str, str] = {}
        self.fetch: Callable[[], None] = lambda: None  # put the run here, from where it was made
        self._mounted = False
        self._last: Running | None = None

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def restore(self, stage: str) -> None:
        """Put the run there as it was when ``stage`` began."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "line.yaml").write_text(self.whole.line.file)
        if self.run.exists():
            shutil.rmtree(self.run)
        shutil.copytree(self.whole.before(stage), self.run)

    def close(self) -> None:
        """End what still runs, and take everything away."""
        if self._last is not None and not self._last.ended:
            with contextlib.suppress(ProcessLookupError):
                self._last.kill()
            self._last.wait()
        if self._mounted:
            subprocess.run(["umount", self.folder], check=True)
        shutil.rmtree(self.folder)

    # -- commands

    def start(self, *more: str, file_size: int = 0) -> Running:
        """Begin the line's command."""
        said = self.folder.with_name(f"{self.folder.name}.said")
        arguments = ["run", "line.yaml", *more]
        self._last = self.zygote.start(arguments, self.folder, said, file_size=file_size, env=self.env)
        return self._last

    def wait_for_beginning(self, running: Running, stage: str) -> None:
        """Wait until the stage has put down its first file, or the command has ended without."""
        while not begun(self.run, self.whole.line, stage):
            if running.ends_within(0.002):
                break

    def wait_for_moment(self, running: Running, stage: str) -> None:
        """Wait until the stage has come as far as ``share`` says, going by how long it takes undisturbed.

        Raises:
            Late: it has ended.
        """
        self.wait_for_beginning(running, stage)
        if running.ends_within(self.share * self.whole.seconds[stage]):
            raise Late

    def mend(self) -> Ended:
        """Run the command until it ends well; where it names a damaged file to delete, do so."""
        for _ in range(4):
            ended = self.start().wait()
            named = set(re.findall(r"[\w./-]+\.(?:tar|safetensors)\b", ended.last_line))
            todo = [self.folder / name for name in named if (self.folder / name).is_file()]
            if not ended.refused or not self.damaged or "delete" not in ended.last_line or not todo:
                break
            for path in todo:
                self.damaged.add(path.relative_to(self.run).as_posix())
                path.unlink()
        return ended

    def spared(self, name: str) -> bool:
        """Whether a file may be made again: it was spoilt on purpose, or belongs to the same unit or training."""
        return _unit(name) in {_unit(damaged) for damaged in self.damaged}

    def spared_in_logs(self, stage: str, unit: int) -> bool:
        """Whether a unit may be made again."""
        if stage == "shards":  # numbered through train, then val
            tars = [path for split in ("train", "val") for path in sorted(self.run.glob(f"shards/{split}/*.tar"))]
            return self.spared(tars[unit].relative_to(self.run).as_posix())
        return any(self.spared(f"{name}/{unit:06d}.tar") for name in self.whole.line.stages[stage])

    # -- tools of the kinds

    def pick(self, pattern: str) -> Path:
        """One of the run's files of that pattern, as the seed has it."""
        return self.rng.choice(sorted(path for path in self.run.glob(pattern)))

    def children(self, pid: int) -> list[int]:
        """The processes that a process has begun itself."""
        found = []
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
        return found

    def make_small(self, room: int) -> bool:
        """Let the folder be a file system of its own with so many pages; False where this user may not mount one."""
        self.folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room * PAGE}", "tmpfs", str(self.folder)]
        self._mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        return self._mounted

    def make_large(self) -> None:
        """Free some space."""
        if self._mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", self.folder], check=True)


def pages(folder: Path) -> int:
    """How many pages the files in a folder take."""
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def _unit(name: str) -> tuple[str, str]:
    """What a file is a part of: ``shards/train``, ``000001``; or a training as a whole."""
    folder, _, file = name.rpartition("/")
    if name.startswith("pretrain/") and "checkpoints" not in name:
        return folder, ""
    return folder, file.partition(".")[0].removesuffix("_stats")
