"""A process that has imported everything and opened nothing: every command begins as a copy of it, in milliseconds.

``python -m tests.faults.zygote`` reads requests from its standard input, a line of JSON each, and answers each with two
lines: the process's id when it has begun, and its exit status when it has ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

__all__ = ["Ended", "Running", "Zygote"]

#: What the stages import when they begin to work.
WARM = (
    "accelerate.tracking",
    "diffusers.guiders",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddpm",
    "pandas",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic.main",
    "scipy.ndimage",
    "synthgen.__main__",
    "synthgen.backbones.tiny",
    "synthgen.card",
    "synthgen.console",
    "synthgen.datasets",
    "synthgen.diffusion.backbone",
    "synthgen.engines.local",
    "synthgen.evaluators.knn",
    "synthgen.evaluators.linear_probe",
    "synthgen.evaluators.retrieval",
    "synthgen.methods.mae",
    "synthgen.models.transformers_vit",
    "synthgen.pipeline",
    "synthgen.refiners.attentioncut",
    "synthgen.stages.attend",
    "synthgen.stages.evaluate",
    "synthgen.stages.generate",
    "synthgen.stages.masks",
    "synthgen.stages.pretrain",
    "synthgen.stages.shards",
    "synthgen.status.text",
    "synthgen.train.loop",
    "transformers.models.clip.modeling_clip",
    "transformers.models.vit.modeling_vit",
)
_OF_ARROW = "jemalloc_bg_thd"  # tidies up memory; its library sees to it that a copy does without


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int  # its exit code, or minus the signal that killed it
    said: str  # on both streams
    seconds: float

    @property
    def last_line(self) -> str:
        """The last thing that it said."""
        return next((line for line in reversed(self.said.splitlines()) if line.strip()), "")

    @property
    def refused(self) -> bool:
        """Whether it ended with an error for a person to act on, in one line."""
        return self.status in (2, 3) and self.last_line.startswith("synthgen: ") and "Traceback" not in self.said


class Running:
    """A command under way, the head of its own process group."""

    def __init__(self, zygote: Zygote, pid: int, said: Path) -> None:
        self.pid, self._zygote, self._said = pid, zygote, said
        self._begun, self.ended = time.monotonic(), False

    def kill(self) -> None:
        """SIGKILL to the process and all of its workers."""
        os.killpg(self.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends in that time, which is waited for."""
        return self._zygote.speaks_within(seconds)

    def wait(self) -> Ended:
        """Wait for its end."""
        status, self.ended = os.waitstatus_to_exitcode(self._zygote.hear()["status"]), True
        return Ended(status, self._said.read_text(errors="replace"), time.monotonic() - self._begun)


class Zygote:
    """Begins ``synthgen`` commands, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.hear()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait()
        _pipe(self._process.stdout).close()

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        said: Path,
        *,
        file_size: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> Running:
        """Begin ``synthgen ARGUMENTS`` in ``folder``, what it says going to ``said``.

        No file of it may grow beyond ``file_size`` bytes (0: any may).
        """
        request = {"arguments": list(arguments), "folder": str(folder), "said": str(said), "file_size": file_size}
        _pipe(self._process.stdin).write(json.dumps({**request, "env": dict(env or {})}).encode() + b"\n")
        return Running(self, self.hear()["pid"], said)

    def hear(self) -> dict[str, int]:
        """The next line that the zygote says."""
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"the zygote ended with {self._process.wait()}")
        answer: dict[str, int] = json.loads(line)
        return answer

    def speaks_within(self, seconds: float) -> bool:
        """Whether there is a line to hear in that time."""
        return bool(select.select([_pipe(self._process.stdout)], [], [], max(seconds, 0))[0])


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


# -- in the process itself


def serve() -> None:
    """Begin what is asked for until nobody asks any more."""
    for name in WARM:
        importlib.import_module(name)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len([name for name in threads if name != _OF_ARROW]) > 1:
        raise RuntimeError(f"threads run after the imports ({threads}); a copy would have only one")
    gc.freeze()  # a copy shares the pages that its collector leaves alone
    _say(pid=os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _become(**request)
        _say(pid=pid)
        _say(status=os.waitpid(pid, 0)[1])


def _say(**answer: int) -> None:
    print(json.dumps(answer), flush=True)


def _become(arguments: list[str], folder: str, said: str, file_size: int, env: dict[str, str]) -> None:
    """Be ``python -m synthgen ARGUMENTS``; never returns."""
    os.setsid()
    os.chdir(folder)
    os.environ |= env
    empty, output = os.open(os.devnull, os.O_RDONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number, stream in ((empty, 0), (output, 1), (output, 2)):
        os.dup2(number, stream)
    sys.argv = ["synthgen", *arguments]
    command: Any = sys.modules["synthgen.__main__"]
    sys.modules["__main__"] = command  # what workers that are spawned import
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error from the write instead of a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    command.main()


if __name__ == "__main__":
    serve()
