"""One unit that fails, a worker that dies, a disk that is full: the rest is done, and the reason is told."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest

from synthgen.config import Choice
from synthgen.engines import accelerate, default_engine
from synthgen.engines.accelerate import Accelerate
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingWeights, SynthgenError, UnitsFailed
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.runner import Summary, run_stage
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
        if self.trouble == "die at once":
            run.path.joinpath(f"begun-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "die alone" and worker.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "die before" and worker.world_size > 1:
            os.kill(os.getpid(), signal.SIGKILL)

        def work(unit):
            healed = (run.path / "healed").exists()
            if unit == 2 and self.trouble == "raise" and not healed:
                raise RuntimeError("bad\nrow")
            if unit == 2 and self.trouble == "die" and not healed:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "die once" and not healed:
                (run.path / "healed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with run.write("numbers", unit) as numbers:
                for row in range(2):
                    numbers.add(f"{unit:06d}{row:04d}", {"txt": b"x" * 5000})
                    worker.progress.advance(1)
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


def test_a_unit_that_kills_its_worker_is_told_alone_and_the_rest_is_made(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed, match="1 of 4 units failed; unit 000002: a worker process ended"):
        run_stage(Numbers(trouble="die"), run, Local(workers=2))
    assert run.units("numbers") == [0, 1, 3]
    (run.path / "healed").touch()
    run_stage(Numbers(trouble="die"), run, Local(workers=2))
    assert run.units("numbers") == [0, 1, 2, 3]


def test_workers_that_end_while_they_load_end_the_command_at_once(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(
        SynthgenError, match=r"ended while it loaded what numbers needs \(killed, or out of mem"
    ) as caught:
        run_stage(Numbers(units=12, trouble="die at once"), run, Local(workers=2))
    assert not isinstance(caught.value, UnitsFailed)
    assert len(list(run.path.glob("begun-*"))) <= 3  # two, and one alone: not one for every unit
    assert not run.folder("numbers").exists()  # no unit is said to have failed, and other settings may be given


def test_workers_that_fit_one_at_a_time_make_what_they_can(tmp_path):
    run = Run.create(tmp_path / "r")
    run_stage(Numbers(units=2, trouble="die before"), run, Local(workers=2))
    assert run.units("numbers") == [0, 1]


def test_a_worker_that_is_killed_once_costs_nothing_but_time(tmp_path):
    run = Run.create(tmp_path / "r")
    run_stage(Numbers(trouble="die once"), run, Local(workers=2))
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


# -- several processes, each with its share


def set_place(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def lines(run, rank):
    text = (run.path / "logs" / f"numbers-{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_process_makes_its_share_first_and_then_what_others_left(tmp_path, monkeypatch):
    run, made = Run.create(tmp_path / "r"), []
    set_place(monkeypatch, 1, 3)
    run_stage(Numbers(units=7), run, Accelerate())
    made = [line["unit"] for line in lines(run, 1) if "unit" in line]
    assert made == [1, 4, 5, 2, 6, 3, 0]  # its own; then from the next process on, the last of each first
    assert run.units("numbers") == list(range(7))


def test_what_another_process_has_made_is_counted_and_not_made_again(tmp_path, monkeypatch):
    run, progress = Run.create(tmp_path / "r"), Skipping()

    class Rival(Accelerate):
        def map(self, stage, run, units, progress):
            for report in Local(workers=1).map(stage, run, [0, 1], Progress()):
                assert not report.error
            yield from super().map(stage, run, units, progress)

    set_place(monkeypatch, 0, 2)
    summary = run_stage(Numbers(), run, Rival(), progress)
    assert (summary.done_before, summary.samples) == (0, 4)
    assert (progress.seen, progress.skipped, progress.total) == (4, 4, 8)


def test_what_others_have_made_is_looked_for_together(tmp_path, monkeypatch):
    run, progress, asked = Run.create(tmp_path / "r"), Skipping(), []
    meanwhile = iter([[], [9, 1], [5], []])  # what the other process makes before each look at what is left

    class Watched(Numbers):
        def todo(self, run):
            for report in Local(workers=1).map(Numbers(), run, next(meanwhile), Progress()):
                assert not report.error
            return [unit for unit in self.plan(run) if not Stage.done(self, run, unit)]

        def done(self, run, unit):
            asked.append(unit)
            return super().done(run, unit)

    set_place(monkeypatch, 0, 2)
    monkeypatch.setattr(accelerate, "_MIN_CHUNK", 2)
    monkeypatch.setattr(accelerate, "_MAX_LOOKUPS", 2)
    run_stage(Watched(units=10), run, Accelerate(), progress)
    assert next(meanwhile, None) is None
    assert asked == [0, 2, 4, 6, 8, 7, 3]  # one by one only before they are worked on
    assert run.units("numbers") == list(range(10))
    assert (progress.skipped, progress.seen) == (2 * 3, 2 * 7)


class Skipping(Counting):
    skipped = 0

    def skip(self, count):
        self.skipped += count


def test_a_unit_that_failed_in_its_own_process_is_told_by_all_and_tried_once(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "r")

    class Rival(Accelerate):
        def map(self, stage, run, units, progress):
            for report in super().map(stage, run, units, progress):
                yield report
                if report.unit == 3:  # the last of its own: meanwhile process 0 has met the bad unit
                    run.fail(stage, Report(2, error="RuntimeError: bad row", trace="where"))

    set_place(monkeypatch, 1, 2)
    with pytest.raises(UnitsFailed, match="1 of 4 units failed; unit 000002: RuntimeError: bad row"):
        run_stage(Numbers(trouble="raise"), run, Rival())
    assert 2 not in [line.get("unit") for line in lines(run, 1)]
    assert json.loads(run.tar("numbers", 2).with_suffix(".failed.json").read_text())["trace"] == "where"
    with pytest.raises(UnitsFailed, match="1 of 4"):  # the same command tries it again
        run_stage(Numbers(trouble="raise"), run, Accelerate())
    assert [line["level"] for line in lines(run, 1) if line.get("unit") == 2] == ["warning"]


def test_a_failure_file_that_vanishes_is_no_failure(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "r")
    for unit in (2, 3):
        run.fail(Numbers(), Report(unit, error="RuntimeError: bad row"))
    gone = run.tar("numbers", 4).with_suffix(".failed.json")  # another process makes the unit just then
    listed = accelerate.failure_files
    monkeypatch.setattr(accelerate, "failure_files", lambda folder: [gone, folder / "x.failed.json", *listed(folder)])
    files = accelerate._failure_files(Numbers(), run)
    assert set(files) == {2, 3}
    assert accelerate._read_failure(files[2][0], 2) == Report(2, error="RuntimeError: bad row")
    files[2][0].unlink()
    files[3][0].write_text("{}")
    assert accelerate._read_failure(files[2][0], 2) is accelerate._read_failure(files[3][0], 3) is None


@pytest.mark.parametrize(("rank", "size", "says"), [("2", "2", "numbers go from 0 to 1"), ("x", "2", "whole number")])
def test_a_process_without_a_place_is_told(monkeypatch, rank, size, says):
    set_place(monkeypatch, rank, size)
    with pytest.raises(ConfigError, match=says):
        default_engine()


def test_under_accelerate_launch_its_engine_is_the_default(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert default_engine() == "local"
    set_place(monkeypatch, 0, 2)
    assert default_engine() == "accelerate"


def test_processes_that_are_killed_leave_their_share_to_the_others(tmp_path):
    script = """
import sys
from pathlib import Path
from synthgen.run import Run
from synthgen.runner import run_stage
from tests.unit.test_engine import Numbers
run_stage(Numbers(units=12, trouble="die once"), Run.create(Path(sys.argv[1])))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "r")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "3"},
        )
        for rank in range(3)
    ]
    ends = sorted(process.wait(timeout=120) for process in processes)
    assert ends in ([-signal.SIGKILL, 0, 0], [-signal.SIGKILL, -signal.SIGKILL, 0])
    assert Run.open(tmp_path / "r").units("numbers") == list(range(12))


# -- engines and stages


@dataclass(frozen=True)
class Together(Numbers):
    collective: ClassVar = True


@dataclass(frozen=True, kw_only=True)
class Dealing:
    collective: ClassVar = False


def test_a_stage_that_is_one_piece_of_work_is_refused_before_it_begins(tmp_path):
    run = Run.create(tmp_path / "r")
    with pytest.raises(ConfigError, match="accelerate launch -m synthgen numbers"):
        run_stage(Together(units=1), run, Dealing())
    assert [path.name for path in run.path.iterdir()] == ["run.yaml"]


def test_an_engine_may_be_given_by_name_and_options(tmp_path):
    run = Run.create(tmp_path / "r")
    run_stage(Numbers(units=1), run, "local")
    run_stage(Numbers(units=1), run, Choice("local", {"workers": 1}))
    with pytest.raises(ConfigError, match="did you mean 'workers'"):
        run_stage(Numbers(units=1), run, Choice("local", {"worker": 1}))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_log_of_each_worker_tells_what_became_of_every_unit(tmp_path, workers):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed):
        run_stage(Numbers(trouble="raise"), run, Local(workers=workers))
    found = [
        line
        for rank in range(workers)
        if (run.path / f"logs/numbers-{rank}.jsonl").exists()
        for line in lines(run, rank)
    ]
    ends = {line["unit"]: line for line in found if "unit" in line}
    assert {unit: line["level"] for unit, line in ends.items()} == {0: "info", 1: "info", 2: "warning", 3: "info"}
    assert ends[2]["message"] == "unit 000002 failed: RuntimeError: bad row"
    assert "raise RuntimeError" in ends[2]["trace"]
    assert ends[0].keys() >= {"time", "stage", "rank", "samples", "seconds", "host", "pid"}


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    run = Run.create(tmp_path / "r")
    (run.path / "logs").write_text("no folder")
    assert run_stage(Numbers(), run, Local(workers=1)).samples == 8


# -- on the command line and in pipeline files


def told_by(monkeypatch, capsys, *arguments):
    """What the command line says in one line of error."""
    from synthgen.__main__ import main

    monkeypatch.setattr(sys, "argv", ["synthgen", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "loca"], "unknown engine 'loca'; did you mean 'local'?"),
        (["--address", "auto"], "engine local.address: unknown setting"),
        (["--engine", "accelerate", "--workers", "2"], "engine accelerate.workers: unknown setting"),
        (["--set", "engine.wokers=2"], "did you mean 'workers'?"),
        (["--set", "engine.workers=-2"], "workers must be"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(monkeypatch, capsys, tmp_path, options, says):
    Run.create(tmp_path / "r")
    (tmp_path / "line.yaml").write_text(f"run: {tmp_path / 'r'}\nstages: {{masks: {{}}}}\n")
    assert says in told_by(monkeypatch, capsys, "masks", "--run", tmp_path / "r", *options)
    assert says in told_by(monkeypatch, capsys, "run", tmp_path / "line.yaml", *options)


def test_options_of_the_command_line_go_to_the_engine_of_the_file(monkeypatch, tmp_path):
    from synthgen import cli, pipeline

    seen = []

    def execute(self, engine, progress):
        seen.append(self.resolve_engine(engine))
        return iter([Summary("masks")])

    monkeypatch.setattr(pipeline.Pipeline, "execute", execute)
    Run.create(tmp_path / "r")
    line = tmp_path / "line.yaml"
    line.write_text(f"run: {tmp_path / 'r'}\nengine: {{name: ray, gpus: 0.5}}\nstages: {{masks: {{}}}}\n")
    rest = {"engine": None, "workers": 0, "address": None, "settings": None, "dry_run": False}
    for options in ({}, {"workers": 8}, {"engine": "local", "workers": 2}):
        cli.run_file(line, **rest | options)
    assert seen == [
        Choice("ray", {"gpus": 0.5}),
        Choice("ray", {"gpus": 0.5, "workers": 8}),
        Choice("local", {"workers": 2}),
    ]
