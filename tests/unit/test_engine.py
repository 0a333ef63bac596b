"""One unit that fails, a worker that dies, a disk that is full: the rest is done, and the reason is told."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest

from synthgen.engines.local import Local
from synthgen.errors import MissingWeights, UnitsFailed
from synthgen.records import Report
from synthgen.run import Run
from synthgen.runner import Progress, run_stage
from synthgen.stages import Stage


@dataclass(frozen=True)
class Numbers(Stage):
    name: ClassVar = "numbers"
    reads: ClassVar = ()
    writes: ClassVar = ("numbers",)

    units: int = 4
    trouble: str = ""

    def plan(self, run):
        return list(range(self.units))

    def size(self, run, unit):
        return 2

    @contextmanager
    def open(self, run, worker):
        if self.trouble == "open":
            raise MissingWeights("no weights; fetch them")

        def work(unit):
            healed = (run.path / "healed").exists()
            if unit == 2 and self.trouble == "raise" and not healed:
                raise RuntimeError("bad\nrow")
            if unit == 2 and self.trouble == "die" and not healed:
                os.kill(os.getpid(), signal.SIGKILL)
            with run.write("numbers", unit) as numbers:
                for row in range(2):
                    numbers.add(f"{unit:06d}{row:04d}", {"txt": b"x" * 5000})
                    worker.tick(1)
            return Report(unit, 2)

        yield work


class Counting(Progress):
    def __init__(self):
        self.total = self.seen = 0

    def start(self, stage, total, done):
        self.total, self.seen = total, done

    def advance(self, count):
        self.seen += count


@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_unit_does_not_end_the_job_and_is_retried_alone(tmp_path, workers):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed, match="1 of 4 units failed; unit 000002: RuntimeError: bad row") as caught:
        run_stage(Numbers(trouble="raise"), run, Local(workers=workers))
    assert caught.value.exit_code == 3
    assert run.units("numbers") == [0, 1, 3]
    assert run.failures("numbers") == {2: "RuntimeError: bad row"}
    (run.path / "healed").touch()
    summary = run_stage(Numbers(trouble="raise"), run, Local(workers=workers))
    assert (summary.done_before, summary.samples) == (3, 2)
    assert run.failures("numbers") == {}


def test_a_killed_worker_is_told_and_the_rest_can_be_made(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed, match="a worker process ended"):
        run_stage(Numbers(trouble="die"), run, Local(workers=2))
    (run.path / "healed").touch()
    run_stage(Numbers(trouble="die"), run, Local(workers=2))
    assert run.units("numbers") == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stage_that_cannot_be_opened_says_why_once(tmp_path, workers):
    with pytest.raises(MissingWeights, match=r"^no weights; fetch them$"):
        run_stage(Numbers(trouble="open"), Run.create(tmp_path / "r"), Local(workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_every_sample(tmp_path, workers):
    progress = Counting()
    run_stage(Numbers(), Run.create(tmp_path / "r"), Local(workers=workers), progress)
    assert progress.seen == progress.total == 8


def test_a_full_disk_is_one_line_and_leaves_earlier_results(tmp_path):
    script = """
import resource, signal, sys
from pathlib import Path
from synthgen.engines.local import Local
from synthgen.errors import UnitsFailed
from synthgen.run import Run
from synthgen.runner import run_stage
from tests.unit.test_engine import Numbers
run = Run.create(Path(sys.argv[1]))
run_stage(Numbers(units=2), run, Local(workers=1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # a tar needs more
run.tar("numbers", 1).unlink()
try:
    run_stage(Numbers(units=2), run, Local(workers=1))
except UnitsFailed as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "r")], capture_output=True, text=True, check=True
    )
    assert "StorageError: cannot write" in told.stdout
    assert "free some space" in told.stdout
    assert told.stdout.count("\n") == 1
    run = Run.open(tmp_path / "r")
    assert run.tar("numbers", 0).stat().st_size == 20480
    assert not list(run.folder("numbers").glob(".*"))


@pytest.mark.parametrize("bad", [-1])
def test_bad_worker_counts_are_refused(bad):
    with pytest.raises(ValueError, match="workers must be"):
        Local(workers=bad)
