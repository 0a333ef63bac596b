"""The Ray engine on this machine: ``make ray``. Two machines are two sets of Ray's processes here."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest

from synthgen import api
from synthgen.config import Choice
from synthgen.engines import ENGINES
from synthgen.engines._work import DeviceFailed
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingWeights, SynthgenError, UnitsFailed
from synthgen.run import Run
from synthgen.runner import run_stage
from tests.factories import Drawn
from tests.unit.test_engine import Counting, Numbers, Together
from tests.unit.test_engine_devices import Devices, lines, loads, tries

ray = pytest.importorskip("ray")
Ray = ENGINES.load("ray")
pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Slow(Drawn):
    """Drawn samples; each unit says which machine began it, and takes half a second."""

    name: ClassVar = "generate"

    @contextmanager
    def open(self, run, worker):
        with super().open(run, worker) as draw:

            def work(unit):
                node = ray.get_runtime_context().get_node_id()
                with open(run.path / "begun.jsonl", "a") as file:
                    file.write(json.dumps({"unit": unit, "node": node, "pid": os.getpid()}) + "\n")
                time.sleep(0.5)
                return draw(unit)

            yield work


def begun(run):
    path = run.path / "begun.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def contents(run):
    return {path.relative_to(run.path): path.read_bytes() for path in sorted(run.path.glob("*/*.tar"))}


@pytest.fixture
def cluster():
    """A head that does no work, and two machines with one CPU each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [found.add_node(num_cpus=1) for _ in range(2)]
    ray.init(found.address, log_to_driver=False)
    yield found, nodes
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="class")
def here():
    """Ray on this machine alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("here")
class TestHere:
    def test_the_shipped_model_makes_the_same_bytes_as_in_this_process(self, tmp_path, monkeypatch):
        (tmp_path / "p.txt").write_text("a photo of a [dog]\na photo of a [pizza]\n")
        monkeypatch.chdir(tmp_path)  # the file is named as seen from here
        small = {"prompts": "p.txt", "images_per_prompt": 2, "unit_size": 2}
        small["backbone"] = Choice("tiny", {"num_steps": 2})
        alone, spread = Run.create("alone"), Run.create("spread")
        for run, engine in ((alone, Local(workers=1)), (spread, Ray(workers=2))):
            api.generate(run, engine=engine, **small)
            api.masks(run, engine=engine)
        assert len(contents(alone)) == 6
        assert contents(spread) == contents(alone)

    def test_more_workers_than_the_cluster_has_room_for_do_no_harm(self, tmp_path):
        progress = Counting()
        run = Run.create(tmp_path / "r")
        assert run_stage(Numbers(units=9), run, Ray(workers=7), progress).samples == 18
        assert progress.seen == progress.total == 18

    def test_one_bad_unit_does_not_end_the_job_and_is_retried_alone(self, tmp_path):
        run = Run.create(tmp_path / "r")
        with pytest.raises(UnitsFailed, match="1 of 4 units failed; unit 000002: RuntimeError: bad row"):
            run_stage(Numbers(trouble="raise"), run, Ray(workers=2))
        (run.path / "healed").touch()
        assert run_stage(Numbers(trouble="raise"), run, Ray(workers=2)).samples == 2

    def test_a_killed_worker_is_begun_again_and_has_its_unit_again(self, tmp_path):
        run = Run.create(tmp_path / "r")
        assert run_stage(Numbers(trouble="die once"), run, Ray(workers=2)).units == 4
        assert run.units("numbers") == [0, 1, 2, 3]

    def test_a_unit_that_kills_every_worker_is_told_alone(self, tmp_path):
        run = Run.create(tmp_path / "r")
        with pytest.raises(UnitsFailed, match="1 of 4 units failed; unit 000002: its worker was lost 2 times"):
            run_stage(Numbers(trouble="die"), run, Ray(workers=2, retries=1))
        assert run.units("numbers") == [0, 1, 3]

    def test_workers_that_end_while_they_load_end_the_call(self, tmp_path):
        run = Run.create(tmp_path / "r")
        told = (
            r"^every Ray worker ended while it loaded what numbers needs, the last one 3 times in a row: [^\n]*model$"
        )
        with pytest.raises(SynthgenError, match=told):
            run_stage(Numbers(trouble="die at once"), run, Ray(workers=2, retries=2))
        assert len(list(run.path.glob("begun-*"))) == 6

    def test_a_worker_that_ends_while_it_loads_is_left_out(self, tmp_path, caplog):
        run = Run.create(tmp_path / "r")
        assert run_stage(Numbers(units=40, trouble="die alone"), run, Ray(workers=2, retries=0)).samples == 80
        assert "worker 0 is left out: it ended while it loaded; killed, or out of memory" in caplog.text

    def test_a_worker_whose_device_failed_is_begun_again_and_its_unit_made(self, tmp_path):
        run = Run.create(tmp_path / "r")
        assert run_stage(Devices(once=(2, 3)), run, Ray(workers=2)).samples == 8
        first, second = (line["pid"] for line in lines(run) if line.get("unit") == 2)
        assert first != second

    def test_a_unit_on_which_every_device_fails_is_told_alone(self, tmp_path):
        run = Run.create(tmp_path / "r")
        says = "1 of 8 units failed; unit 000002: its worker was lost 2 times: cpu of .* failed .*CUDA error"
        with pytest.raises(UnitsFailed, match=says):
            run_stage(Devices(poison=(2,)), run, Ray(workers=2, retries=1))
        assert len(tries(run, 2)) == 2

    def test_devices_that_stay_broken_end_the_call(self, tmp_path):
        run = Run.create(tmp_path / "r")
        with pytest.raises(DeviceFailed, match=r"^cpu of .*give the same command again"):
            run_stage(Devices(units=40, broken="cpu"), run, Ray(workers=2, retries=1))
        assert len(loads(run)) <= 4
        assert len(run.failures("numbers")) <= 2

    def test_devices_on_which_nothing_can_be_opened_end_the_call(self, tmp_path):
        run = Run.create(tmp_path / "r")
        with pytest.raises(DeviceFailed, match=r"^cpu of "):
            run_stage(Devices(dead="cpu"), run, Ray(workers=2, retries=0))
        assert run.failures("numbers") == {}

    def test_a_stage_that_cannot_be_opened_says_why_once(self, tmp_path):
        with pytest.raises(MissingWeights, match=r"^no weights; fetch them$"):
            run_stage(Numbers(trouble="open"), Run.create(tmp_path / "r"), Ray(workers=2))

    def test_another_address_than_the_one_joined_is_refused(self):
        with pytest.raises(ConfigError, match="is connected to the Ray cluster at"):
            Ray(address="127.0.0.1:9").connect()

    def test_training_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="accelerate launch -m synthgen numbers"):
            run_stage(Together(), Run.create(tmp_path / "r"), Ray())


def test_a_machine_lost_in_the_middle_costs_no_unit(cluster, tmp_path):
    found, nodes = cluster
    run, alone = Run.create(tmp_path / "r"), Run.create(tmp_path / "alone")
    stage = Slow(units=12, unit_size=2)
    killed = threading.Thread(target=kill_when_both_work, args=(run, nodes[1]))
    killed.start()
    summary = run_stage(stage, run, Ray(address=found.address))
    killed.join()
    run_stage(Drawn(units=12, unit_size=2), alone, Local(workers=1))
    assert contents(run) == contents(alone)
    lost = [line for line in begun(run) if line["node"] == nodes[1].node_id]
    redone = len(begun(run)) - 12
    print(
        f"\n12 units on 2 machines, {nodes[1].node_id[:8]} killed after it began {len(lost)}: all made, "
        f"{redone} begun twice, in {summary.seconds:.1f} s; the bytes are those of one process"
    )
    assert lost
    assert len(lost) < 12
    assert redone == 1  # what was in flight


def kill_when_both_work(run, node):
    """SIGKILL to every process of a machine, as when its power fails."""
    deadline = time.monotonic() + 120
    while len({line["node"] for line in begun(run)}) < 2 or len(begun(run)) < 4:
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
    workers = {line["pid"] for line in begun(run) if line["node"] == node.node_id}
    for processes in node.all_processes.values():
        for process in processes:
            os.kill(process.process.pid, signal.SIGKILL)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def test_an_address_where_nothing_is_says_what_to_do():
    with pytest.raises(ConfigError, match=r"no Ray cluster could be joined at 127\.0\.0\.1:9.*ray start --head"):
        Ray(address="127.0.0.1:9").connect()


@pytest.mark.parametrize("bad", [{"workers": -1}, {"cpus": 0.0}, {"gpus": -2.0}, {"retries": -1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        Ray(**bad)
