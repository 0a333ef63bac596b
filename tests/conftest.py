"""Every test runs offline, on one thread, with checked array shapes."""

from __future__ import annotations

import os
import socket

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false"
)

import pytest
from jaxtyping import install_import_hook

_CHECKED = (
    "records attention refiners codecs graphcut mask_shape mask_quality models methods "
    "loader datasets augment evaluators train export"
)
_hook = install_import_hook([f"synthgen.{name}" for name in _CHECKED.split()], "beartype.beartype")

_real_connect = socket.socket.connect


def _refuse(self, address, *args):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(f"a test tried to reach {address}")
    return _real_connect(self, address, *args)


socket.socket.connect = _refuse


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """A folder with a small Stable Diffusion of random weights."""
    from tests.models import make_stable_diffusion

    return make_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def server():
    """An object store on the loopback, over real HTTP."""
    from tests.store_server import start_store

    with start_store() as store, store.enter():
        yield store


@pytest.fixture
def store(server, tmp_path, monkeypatch):
    """It, empty, without waits between requests, and with a cache of this test's own; a test may let it fail."""
    from synthgen.stores import remote

    monkeypatch.setenv("SYNTHGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    server.kinds = ("500", "503", "cut")
    server.faults.clear()
    server.requests.clear()
    server.lines.clear()
    server.draws.seed(server.seed)
    yield server
    server.fault_rate = 0
    for key in server.objects():
        server.delete(key)
