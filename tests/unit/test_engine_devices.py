"""GPUs that break, and workers that do not fit together: who makes the units then, and what is said.

Processes are forked here, which takes milliseconds, except in the one test that begins them as they always begin.
"""

import builtins
import errno
import json
import logging
import multiprocessing as mp
import os
import pickle
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar

import pytest

from synthgen.engines import _worker_pool, accelerate, local
from synthgen.engines._work import DeviceFailed
from synthgen.engines._worker_pool import MAX_CONSECUTIVE_FAILURES
from synthgen.engines.accelerate import Accelerate
from synthgen.engines.local import Local
from synthgen.errors import MissingWeights, StorageError, SynthgenError, TooLittleMemory, UnitsFailed
from synthgen.progress import Progress
from synthgen.records import Report
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages import Stage

TWICE = "tried twice on one device, which failed"
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


@dataclass(frozen=True)
class Devices(Stage):
    """Units that need a device; ``tried.jsonl`` tells who opened the stage, and who tried which unit."""

    name: ClassVar = "numbers"
    reads: ClassVar = ()
    writes: ClassVar = ("numbers",)

    units: int = 8
    dead: str = ""  # the device on which nothing can be done, not even opened
    sick: str = ""  # the device on which a process makes one unit and then no more
    broken: str = ""  # the device on which units fail
    poison: tuple[int, ...] = ()  # units on which every device fails
    once: tuple[int, ...] = ()  # units on which a device fails the first time
    crowd: int = 0  # workers that do not fit together: of more, those from this rank on are killed while they load,
    # and the others begin when that was seen
    full: int = 0  # the same on a device that has room for so many (below 0: for none), and says so
    away: bool = False  # what is done cannot be looked up
    kills: tuple[int, ...] = ()  # units that kill their worker
    hangs: tuple[int, ...] = ()  # units that are not done before anybody loses patience
    barred: bool = False  # it may not read what it needs
    unsent: bool = False  # it cannot be opened, for a reason that cannot be sent between processes

    def plan(self, run):
        return list(range(self.units))

    def size(self, run, unit):
        return 1

    def done(self, run, unit):
        if self.away and mp.parent_process():
            raise StorageError("the store does not answer")
        return super().done(run, unit)

    @contextmanager
    def open(self, run, worker):
        add_line(run, rank=worker.rank, device=worker.device, process=os.getpid())
        if worker.device == self.dead:
            raise RuntimeError(ILLEGAL)
        if self.barred:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "weights")
        if self.unsent:
            raise Unsent("no", "weights")
        if self.crowd and worker.world_size > self.crowd and worker.rank >= self.crowd:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full and worker.rank >= max(0, self.full):
            raise TooLittleMemory("cuda:0 has too little memory")
        made = []

        def work(unit):
            before = [line["unit"] for line in lines(run) if "unit" in line]
            add_line(run, unit=unit, rank=worker.rank, device=worker.device, pid=os.getpid())
            if self.crowd and worker.world_size > self.crowd:
                await_the_ends(run, self.crowd, worker.world_size)
            if unit in self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            if unit in self.hangs:
                time.sleep(30)
            fails = unit in self.poison or (unit in self.once and unit not in before)
            if fails or worker.device == self.broken or (worker.device == self.sick and made):
                raise RuntimeError(ILLEGAL)
            with run.write("numbers", unit) as numbers:
                numbers.add(f"{unit:06d}0000", {"txt": b"x"})
            made.append(unit)
            worker.progress.advance(1)
            return Report(unit, 1)

        yield work


class Unsent(Exception):
    def __init__(self, what, which):
        super().__init__(what)


def add_line(run, **what):
    with (run.path / "tried.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def lines(run):
    path = run.path / "tried.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def loads(run):
    return [line["device"] for line in lines(run) if "unit" not in line and "device" in line]


def await_the_ends(run, first, size):
    """Return when the parent has seen that the workers of the ranks from ``first`` on are gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        begun = {line["rank"]: line["process"] for line in lines(run) if "process" in line}
        if set(range(first, size)) <= set(begun) and not any(there_is(begun[rank]) for rank in range(first, size)):
            return
        time.sleep(0.005)


def there_is(process):
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def tries(run, unit):
    return [line["device"] for line in lines(run) if line.get("unit") == unit]


def failure(run, unit):
    """What is written down of a unit that failed."""
    return json.loads(run.tar("numbers", unit).with_suffix(".failed.json").read_text())


@pytest.fixture
def forked(monkeypatch):
    context = mp.get_context("fork")
    monkeypatch.setattr(_worker_pool.mp, "get_context", lambda name: context)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "r")


def with_devices(monkeypatch, *names):
    for engine in (local, accelerate):
        monkeypatch.setattr(engine, "devices_for", lambda stage: list(names))


# -- which errors are of a device


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("AcceleratorError", ILLEGAL),
        ("AcceleratorError", "whatever it says"),
        ("RuntimeError", ILLEGAL),
        ("RuntimeError", "CUDA driver error: unknown error"),
        ("RuntimeError", "HIP error: invalid device function"),
        ("RuntimeError", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        ("RuntimeError", "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnCreate(handle)`"),
    ],
)
def test_what_a_broken_device_says_is_known(kind, text):
    failed = DeviceFailed.from_error(named(kind)(text), "cuda:3")
    assert failed.device == "cuda:3"
    assert str(failed).startswith("cuda:3 of ")
    assert "CUDA_VISIBLE_DEVICES" in str(failed)
    assert "\n" not in str(failed)
    assert DeviceFailed.from_error(failed, "cuda:3") is failed


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        ("AcceleratorError", "CUDA error: out of memory"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("RuntimeError", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (
            "RuntimeError",
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if the input is not contiguous",
        ),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"),
        ("RuntimeError", "bad row"),
        ("RuntimeError", "Expected all tensors to be on the same device, but found cpu and cuda:0"),
        ("ValueError", "a caption that says: CUDA error"),
        ("StorageError", "cannot write x: CUDA error is the name of a folder; free some space"),
        ("MemoryError", ""),
    ],
)
def test_what_is_wrong_with_a_unit_is_not_held_against_the_device(kind, text):
    assert DeviceFailed.from_error(named(kind)(text), "cuda:3") is None


def named(kind):
    """The error of that name; torch is imported here, and so not by the workers of this module."""
    import torch

    return {**vars(builtins), "StorageError": StorageError}.get(kind) or getattr(torch, kind)


def test_it_can_be_sent_to_another_process():
    failed = DeviceFailed("cuda:3", "node7", "RuntimeError: CUDA error", "where")
    again = pickle.loads(pickle.dumps(failed))
    assert (str(again), again.device, again.problem, again.trace) == (str(failed), "cuda:3", failed.problem, "where")
    assert again.problem == "cuda:3 of node7 failed (RuntimeError: CUDA error)"
    assert again.exit_code == 2


# -- several devices


@pytest.mark.parametrize("trouble", ["sick", "broken", "dead"])
def test_a_device_that_breaks_costs_no_unit(run, monkeypatch, forked, trouble, caplog):
    with_devices(monkeypatch, "bad:0", "good:1", "good:2")
    assert run_stage(Devices(units=24, **{trouble: "bad:0"}), run, Local()).samples == 24
    assert run.failures("numbers") == {}
    made = [line for line in lines(run) if "unit" in line]
    for unit in {line["unit"] for line in made if line["device"] == "bad:0"}:  # at first; and never there again
        assert "bad:0" not in tries(run, unit)[1:]
    if trouble != "sick":  # which makes a unit each time, and so may go on
        assert loads(run).count("bad:0") <= {"broken": 3, "dead": 1}[trouble]
    assert "worker 0 " in caplog.text
    assert "bad:0 of " in caplog.text


def test_processes_that_begin_as_they_always_do(run, monkeypatch):
    with_devices(monkeypatch, "one:0", "other:1")
    assert run_stage(Devices(units=4, once=(0,)), run, Local()).samples == 4
    assert len(set(tries(run, 0))) == 2
    assert run.failures("numbers") == {}


def test_the_log_of_the_worker_has_the_traceback(run, monkeypatch, forked):
    with_devices(monkeypatch, "bad:0", "good:1")
    run_stage(Devices(units=12, broken="bad:0"), run, Local())
    log = [json.loads(line) for line in (run.path / "logs/numbers-0.jsonl").read_text().splitlines()]
    left = [line for line in log if "is left to another worker" in line["message"]]
    assert left
    assert all("raise RuntimeError" in line["trace"] and "unit" in line for line in left)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_that_breaks_every_device_is_the_one_that_failed(run, monkeypatch, forked, workers):
    with_devices(monkeypatch, "good:0", "good:1")
    says = r"1 of 8 units failed; unit 000003: two devices failed on it, the last one: good:\d of .*illegal memory"
    with pytest.raises(UnitsFailed, match=says):
        run_stage(Devices(poison=(3,)), run, Local(workers=workers))
    assert sorted(tries(run, 3)) == ["good:0", "good:1"]
    assert run.units("numbers") == [0, 1, 2, 4, 5, 6, 7]
    assert "raise RuntimeError" in failure(run, 3)["trace"]
    assert not failure(run, 3)["device_suspect"]


def test_every_device_broken_ends_the_command(run, monkeypatch, forked):
    with_devices(monkeypatch, "bad:0", "bad:0")
    with pytest.raises(DeviceFailed, match=r"^bad:0 of "):
        run_stage(Devices(units=40, broken="bad:0"), run, Local())
    assert len(loads(run)) <= 6
    assert run.failures("numbers") == {}


# -- one device


def test_one_device_that_fails_once_is_gone_on_with_in_a_fresh_process(run, monkeypatch, forked, caplog):
    with_devices(monkeypatch, "only:0")
    assert run_stage(Devices(once=(3,)), run, Local()).samples == 8
    assert loads(run) == ["only:0"] * 3  # this process, a fresh one, and one for the unit itself
    here = [line["unit"] for line in lines(run) if line.get("pid") == os.getpid()]
    assert here == [0, 1, 2, 3]
    assert "going on in a fresh process" in caplog.text


def test_one_device_that_stays_broken_ends_the_command_with_one_line(run, monkeypatch, forked):
    with_devices(monkeypatch, "only:0")
    with pytest.raises(DeviceFailed) as caught:
        run_stage(Devices(units=40, broken="only:0"), run, Local())
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("only:0 of ")
    assert "give the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(loads(run)) == 1 + MAX_CONSECUTIVE_FAILURES
    assert run.failures("numbers") == {}
    assert run_stage(Devices(units=40), run, Local()).samples == 40  # another machine, say


def test_one_device_on_which_nothing_can_be_opened_is_named(run, monkeypatch):
    with_devices(monkeypatch, "only:0")
    with pytest.raises(DeviceFailed, match=r"^only:0 of .*RuntimeError: CUDA error: an illegal .*nvidia-smi"):
        run_stage(Devices(dead="only:0"), run, Local())
    assert loads(run) == ["only:0"]


def test_a_unit_that_breaks_the_only_device_is_told_and_the_rest_is_made(run, monkeypatch, forked):
    with_devices(monkeypatch, "only:0")
    with pytest.raises(UnitsFailed, match=f"1 of 8 units failed; unit 000003: {TWICE}: only:0 of "):
        run_stage(Devices(poison=(3,)), run, Local())
    assert tries(run, 3) == ["only:0"] * 2
    assert run.units("numbers") == [0, 1, 2, 4, 5, 6, 7]
    assert failure(run, 3)["device_suspect"]


def test_where_a_fresh_process_cannot_open_the_stage_the_device_is_told(run, monkeypatch, forked):
    with_devices(monkeypatch, "only:0")

    @dataclass(frozen=True)
    class Full(Devices):
        @contextmanager
        def open(self, run, worker):
            if loads(run):
                raise SynthgenError("too little memory")  # which the first process still holds
            with super().open(run, worker) as work:
                yield work

    with pytest.raises(DeviceFailed, match=r"^only:0 of "):
        run_stage(Full(once=(3,)), run, Local())
    assert run.units("numbers") == [0, 1, 2]


# -- workers that are killed


def test_workers_that_do_not_fit_together_are_left_out_and_told(run, monkeypatch, forked, caplog):
    with_devices(monkeypatch, *["cpu"] * 4)
    assert run_stage(Devices(units=12, crowd=2), run, Local()).samples == 12
    assert len(loads(run)) == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "worker 3 is left out: it ended while it loaded what numbers needs (killed, or out of memory)" in caplog.text
    assert "2 of 4 workers go on" in caplog.text


def test_workers_whose_device_is_full_are_left_out_while_others_work(run, monkeypatch, forked, caplog):
    with_devices(monkeypatch, *["cpu"] * 3)
    assert run_stage(Devices(units=12, full=1), run, Local()).samples == 12
    assert len(loads(run)) == 3
    assert "loaded what numbers needs (cuda:0 has too little memory)" in caplog.text


@dataclass(frozen=True)
class Network(Devices):
    """``missing`` weights cannot be downloaded."""

    accelerated: ClassVar = True

    missing: bool = False

    @contextmanager
    def open(self, run, worker):
        with super().open(run, worker) as work:
            if self.missing:
                raise MissingWeights("no weights; fetch them")
            add_line(run, opened=worker.rank)
            yield work


def test_the_first_worker_loads_a_network_alone(run, monkeypatch, forked):
    with_devices(monkeypatch, "gpu:0", "gpu:1", "gpu:2")
    assert run_stage(Network(units=12), run, Local()).samples == 12
    first, second = lines(run)[:2]
    assert (first["device"], second) == ("gpu:0", {"opened": 0})
    assert sorted(loads(run)) == ["gpu:0", "gpu:1", "gpu:2"]


def test_weights_that_cannot_be_downloaded_are_one_error_of_one_worker(run, monkeypatch, forked):
    with_devices(monkeypatch, "gpu:0", "gpu:1", "gpu:2")
    with pytest.raises(MissingWeights, match=r"^no weights; fetch them$"):
        run_stage(Network(missing=True), run, Local())
    assert loads(run) == ["gpu:0"]


@pytest.mark.parametrize("settings", [{"full": 1}, {"dead": "gpu:0"}, {"kills": (0,)}])
def test_if_the_first_worker_ends_another_one_is_started(run, monkeypatch, forked, settings):
    with_devices(monkeypatch, "gpu:0", "gpu:1", "gpu:2")
    with suppress(UnitsFailed):
        run_stage(Network(units=12, **settings), run, Local())
    assert len(run.units("numbers")) >= 11
    assert "gpu:1" in loads(run)


def test_if_no_device_has_room_for_a_network_the_command_ends(run, monkeypatch, forked):
    with_devices(monkeypatch, "gpu:0", "gpu:1")
    with pytest.raises(TooLittleMemory, match="cuda:0 has too little memory"):
        run_stage(Network(full=-1), run, Local())
    assert loads(run) == ["gpu:0", "gpu:1"]


def test_a_model_that_no_worker_has_room_for_ends_the_command(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with pytest.raises(TooLittleMemory, match="cuda:0 has too little memory"):
        run_stage(Devices(full=-1), run, Local())
    assert len(loads(run)) == 2


def test_an_error_beside_the_units_ends_the_command(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with pytest.raises(StorageError, match="the store does not answer"):
        run_stage(Devices(away=True), run, Local())
    assert len(loads(run)) == 2


def test_an_error_of_the_system_keeps_its_kind(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with pytest.raises(PermissionError, match="Permission denied: 'weights'"):
        run_stage(Devices(barred=True), run, Local())


def test_a_unit_that_kills_its_workers_is_told_and_the_others_are_made(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with pytest.raises(UnitsFailed, match="1 of 8 units failed; unit 000002: a worker process ended"):
        run_stage(Devices(kills=(2,)), run, Local())
    assert run.units("numbers") == [0, 1, 3, 4, 5, 6, 7]
    assert len(tries(run, 2)) == 2


def test_when_every_unit_kills_its_worker_the_command_ends(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with pytest.raises(SynthgenError, match=r"ended while it worked on unit 0000\d\d .*also when it was alone"):
        run_stage(Devices(units=40, kills=tuple(range(40))), run, Local())
    assert len(loads(run)) == 3 * MAX_CONSECUTIVE_FAILURES


def test_a_reason_that_cannot_be_sent_is_told_in_words(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with pytest.raises(RuntimeError, match=r"^Unsent: no\n"):
        run_stage(Devices(unsent=True), run, Local())


def test_who_stops_listening_waits_for_what_is_being_made(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    with run.claim(Devices(units=40)) as claimed:
        reports = Local().map(Devices(units=40), claimed, range(40), Progress())
        next(reports)
        reports.close()
    assert not mp.active_children()
    assert not run.failures("numbers")
    made = [line["unit"] for line in lines(run) if "unit" in line]
    assert len(made) < 40
    assert run.units("numbers") == sorted(made)


def test_a_limit_on_processes_is_one_line_and_leaves_no_worker(run, monkeypatch, forked):
    with_devices(monkeypatch, "cpu", "cpu")
    process = _worker_pool.mp.get_context("spawn").Process
    start = process.start

    def limited(self):
        if mp.active_children():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(self)

    monkeypatch.setattr(process, "start", limited)
    with pytest.raises(
        SynthgenError, match=r"worker 1 cannot be started .*Resource temporarily unavailable.*ulimit -u"
    ):
        run_stage(Devices(), run, Local())
    assert not mp.active_children()


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests were started as a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_worker_hangs_kills_it(run, monkeypatch, forked, interruptible):
    with_devices(monkeypatch, "cpu", "cpu")
    stage = Devices(hangs=(0,))
    with run.claim(stage) as claimed:
        reports = Local().map(stage, claimed, range(8), Progress())
        next(reports)
        workers, interrupt = mp.active_children(), (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.3, signal.pthread_kill, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            reports.close()
    for worker in workers:
        worker.join(5)
    assert not mp.active_children()


def test_an_error_with_something_that_cannot_be_sent_is_told_in_words():
    error = ConnectionError("no answer")
    error.response = lambda: None
    sent = pickle.loads(pickle.dumps(_worker_pool._picklable(error)))
    assert str(sent) == "ConnectionError: no answer"


# -- several processes, each with its share


def set_place(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def test_a_process_whose_device_stays_broken_ends_and_leaves_its_share(run, monkeypatch, forked):
    set_place(monkeypatch, 0, 2)
    with_devices(monkeypatch, "bad:0")
    with pytest.raises(DeviceFailed, match=r"^bad:0 of "):
        run_stage(Devices(units=12, broken="bad:0"), run, Accelerate())
    assert len(loads(run)) == 1 + MAX_CONSECUTIVE_FAILURES
    assert {line["rank"] for line in lines(run)} == {0}
    assert run.failures("numbers") == {}
    set_place(monkeypatch, 1, 2)
    with_devices(monkeypatch, "good:1")
    assert run_stage(Devices(units=12, broken="bad:0"), run, Accelerate()).samples == 12


def test_a_process_whose_device_failed_once_makes_its_share_and_helps(run, monkeypatch, forked):
    set_place(monkeypatch, 0, 2)
    with_devices(monkeypatch, "only:0")
    assert run_stage(Devices(once=(2, 5)), run, Accelerate()).samples == 8
    assert run.failures("numbers") == {}


def test_what_failed_on_the_device_of_one_process_is_tried_by_another(run, monkeypatch, forked):
    with_devices(monkeypatch, "good:1")

    class Rival(Accelerate):
        def map(self, stage, run, units, progress):
            for report in super().map(stage, run, units, progress):
                yield report
                if report.unit == 3:  # the last of its own: meanwhile process 0 has given up two units
                    for unit in (0, 2):
                        run.fail(stage, Report(unit, error="bad:0 of node failed", device_suspect=True))

    set_place(monkeypatch, 1, 2)
    with pytest.raises(UnitsFailed, match=f"1 of 4 units failed; unit 000002: also {TWICE}: good:1 of "):
        run_stage(Devices(units=4, poison=(2,)), run, Rival())
    assert run.units("numbers") == [0, 1, 3]
    assert list(run.failures("numbers")) == [2]
    assert tries(run, 0) == ["good:1"]
    assert tries(run, 2) == ["good:1"] * 2
    assert not failure(run, 2)["device_suspect"]  # so that no third process tries it
