"""What a training says where the processes around it are not what it can use."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from synthgen.errors import ConfigError
from synthgen.train import launch

ALONE = """
from synthgen.errors import ConfigError
from synthgen.train.launch import num_processes
try:
    print(num_processes())
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {}])
def test_one_of_several_processes_without_an_address_is_refused_in_one_line(variables):
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=clean | variables, capture_output=True, text=True, check=True
    )
    assert ("one of several processes" in done.stdout) == bool(variables), done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_model_in_shards_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(launch, "Accelerator", lambda **given: SimpleNamespace(distributed_type=kind, num_processes=1))
    with pytest.raises(ConfigError, match=rf"configured for {kind.value}; choose plain data parallelism"):
        launch.accelerated(tmp_path, cpu=True, precision="no", accumulate=1, trackers=(), settings={})
