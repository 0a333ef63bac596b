"""What a plan measures: a few images, their masks, a shard and some training steps, made in a run that is deleted.

Each stage works in a fresh process, as a worker of its own would: first on one image, which warms everything up and
tells how much can be afforded, then in a few rounds that count.
"""

from __future__ import annotations

import gc
import math
import multiprocessing as mp
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE
from typing import TYPE_CHECKING, Any

from synthgen.devices import devices_for
from synthgen.errors import SynthgenError
from synthgen.prompts import Survey
from synthgen.run import Run
from synthgen.stages import Stage, Worker
from synthgen.stores.tar import index_tar

if TYPE_CHECKING:
    from synthgen.stages.generate import Generate
    from synthgen.stages.pretrain import Pretrain
    from synthgen.stages.shards import Shards

__all__ = ["MEASURED", "ROUNDS", "SECONDS", "Sample", "TarFiles", "Took", "TrainingFiles", "sampled"]

ROUNDS = 3  # that are timed
SECONDS = 60.0  # that the rounds of a stage should take, unless somebody asks for more
_FEW = 32  # images of the first training steps
_TEMPLATES = 8  # that the sample uses at most


@dataclass(frozen=True, slots=True)
class Took:
    """What a stage took for its part of the sample."""

    rounds: tuple[float, ...]  # seconds a sample, in each round
    samples: int  # in all rounds
    batch: int  # samples that were worked on together
    start_seconds: float  # from a new process to its first sample
    device: str
    memory: int  # bytes at the peak: of torch's on a GPU, else of the process beyond its start

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is that of a GPU."""
        return self.device.startswith("cuda")

    @property
    def basis(self) -> str:
        """What the figures stand on."""
        return f"{self.samples} images in {len(self.rounds)} round{'s' if len(self.rounds) > 1 else ''}"


@dataclass(frozen=True, slots=True)
class TarFiles:
    """What an artifact's files take: tars of samples, each with small files beside it."""

    content: tuple[float, ...]  # bytes of a sample, headers too, in each tar of the sample
    beside: float  # bytes beside a tar
    beside_each: float  # and for each of its samples

    def total(self, tars: Mapping[int, int], content: float) -> float:
        """Bytes of all ``tars``, samples in one → number of such, with ``content`` bytes a sample."""
        return sum(
            number
            * (
                math.ceil((count * content + 2 * BLOCKSIZE) / RECORDSIZE) * RECORDSIZE
                + self.beside
                + self.beside_each * count
            )
            for count, number in tars.items()
        )


@dataclass(frozen=True, slots=True)
class TrainingFiles:
    """What a training leaves behind, in bytes."""

    checkpoint: int  # each
    encoder: int  # each snapshot
    record: float  # each line of the metrics
    rest: int  # once: the encoder and all that lies beside it


@contextmanager
def sampled(survey: Survey, suffix: str, *, seed: int, most: int, seconds: float = SECONDS) -> Iterator[Sample]:
    """A sample of the prompts in a temporary folder, which is deleted in the end.

    Args:
        survey: what the prompt file holds.
        suffix: of the prompt file, which says how its lines are written.
        seed: of the run.
        most: images.
        seconds: that the rounds of a stage should take.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="synthgen-plan-") as folder:
        yield Sample(Path(folder), survey, suffix, seed, most, seconds)


@dataclass(frozen=True)
class Sample:
    """Two runs: ``probe`` with one image, ``rounds`` with a unit for each round."""

    folder: Path
    survey: Survey
    suffix: str
    seed: int
    most: int
    seconds: float

    def take(self, stage: Stage) -> Took:
        """Let ``stage`` work on the sample, after those that make what it reads.

        Raises:
            SynthgenError: it cannot, for the reason that it would give in a run.
        """
        return _in_a_process(MEASURED[stage.name], stage, self)

    def run(self, name: str) -> Run:
        """``probe`` or ``rounds``."""
        return Run.create(self.folder / name, seed=self.seed)

    def tar_files(self, artifact: str) -> TarFiles:
        """What the files of an artifact take."""
        (single,) = self.run("probe").folder(artifact).rglob("*.tar")
        tars = sorted(self.run("rounds").folder(artifact).rglob("*.tar"))
        held = [_content(tar) for tar in tars]
        counts = [count for _, count in held]
        count, alone = max(counts), _beside(single)
        each = (_beside(tars[counts.index(count)]) - alone) / (count - 1) if count > 1 else 0.0
        return TarFiles(tuple(content / count for content, count in held), alone - each, each)

    def training_files(self, stage: Pretrain) -> TrainingFiles:
        """What a training leaves behind."""
        folder = self.run("rounds").folder(*stage.artifacts())
        (checkpoint,) = (folder / "checkpoints").glob("*.safetensors")
        metrics, encoder = folder / "metrics.jsonl", folder / "encoder.safetensors"
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        rest = sum(sizes.values()) - sizes[checkpoint] - sizes[metrics]
        lines = metrics.read_bytes().count(b"\n")
        return TrainingFiles(sizes[checkpoint], sizes[encoder], sizes[metrics] / lines, rest)

    def drawing(self, stage: Generate, images: int, batch: int) -> Generate:
        """``stage`` with so many images of prompts of the sample, in units of one batch."""
        templates = self.survey.templates
        few = _spread(templates, min(_TEMPLATES, images))
        lines = _spread(self.survey.lines, -(-images // max(1, len(few))))
        prompts, template = self.folder / f"prompts{self.suffix}", self.folder / "templates.txt"
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        template.write_text("\n".join(few) + "\n", encoding="utf-8")
        return replace(
            stage,
            prompts=str(prompts),
            template=str(template) if few else "",
            images_per_prompt=images,
            limit=images,
            unit_size=batch,
            batch_size=batch,
        )


def _spread(items: tuple[str, ...], count: int) -> list[str]:
    """``count`` of the items, evenly apart; all, where there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _content(tar: Path) -> tuple[int, int]:
    """Bytes of a tar's samples, headers too, and how many there are."""
    samples = index_tar(tar)
    sizes = [member.size for _, members in samples for member in members.values()]
    return sum(BLOCKSIZE + -(-size // BLOCKSIZE) * BLOCKSIZE for size in sizes), len(samples)


def _beside(tar: Path) -> int:
    """Bytes of the files beside a tar that belong to it."""
    return sum(path.stat().st_size for path in tar.parent.glob(f"{tar.stem}[._]*") if path != tar)


# -- a process for each stage


def _in_a_process(measure: Callable[..., Took], stage: Stage, sample: Sample) -> Took:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, measure, stage, sample, time.time()))
    process.start()
    theirs.close()
    try:
        answer: Took | SynthgenError = ours.recv()
    except EOFError:
        answer = SynthgenError("its process was killed, or out of memory")
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(answer, SynthgenError):
        raise answer
    return answer


def _answer(pipe: Any, measure: Callable[..., Took], stage: Stage, sample: Sample, spawned: float) -> None:
    try:
        pipe.send(measure(stage, sample, _Meter(spawned)))
    except SynthgenError as error:
        pipe.send(error)
    except Exception as error:  # as engines tell what goes wrong with a unit
        pipe.send(SynthgenError(f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"))


class _Meter:
    """Time and memory of this process; made before anything heavy is imported."""

    def __init__(self, spawned: float) -> None:
        self._spawned, self._before = spawned, _resident()["VmRSS"]
        self.start_seconds = 0.0

    def work(self, stage: Stage, run: Run, tick: Callable[[int], None] = lambda count: None) -> list[float]:
        """Do ``stage``; the seconds of each unit."""
        stage = stage.complete()
        taken = []
        with run.claim(stage) as claimed:
            stage.prepare(claimed)
            worker = Worker(device=devices_for(stage)[0], tick=tick)
            with stage.open(claimed, worker) as work:
                self.start_seconds = self.start_seconds or time.time() - self._spawned
                for unit in stage.plan(claimed):
                    started = time.perf_counter()
                    work(unit)
                    taken.append(time.perf_counter() - started)
            stage.finish(claimed)
        gc.collect()  # what was loaded for one image need not stay beside what is loaded for many
        return taken

    def memory(self, device: str) -> int:
        """Bytes at the peak."""
        if device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_reserved(device))
        return _resident()["VmHWM"] - self._before


def _resident() -> dict[str, int]:
    """Main memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak (elsewhere than on Linux both)."""
    try:
        told = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        pairs = (line.split(":") for line in told.splitlines() if line.startswith("Vm"))
        return {name: int(value.split()[0]) * 1024 for name, value in pairs}
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"VmRSS": peak, "VmHWM": peak}


# -- what each stage does with the sample


def _generate(stage: Generate, sample: Sample, meter: _Meter) -> Took:
    device = devices_for(stage)[0]
    (seconds,) = meter.work(sample.drawing(stage, 1, 1), sample.run("probe"))
    affordable = int(min(sample.most, sample.seconds / seconds))
    batch, rounds = rounds_of(min(stage.batch_size, stage.unit_size), sample.most, affordable, device)
    images = batch * rounds
    taken = meter.work(sample.drawing(stage, images, batch), sample.run("rounds"))
    each = tuple(seconds / batch for seconds in taken)
    return Took(each, images, batch, meter.start_seconds, device, meter.memory(device))


def rounds_of(batch_size: int, most: int, affordable: int, device: str) -> tuple[int, int]:
    """How many images to draw together, and how often, if there may be ``most`` and time is for ``affordable``.

    On a GPU the batch is the pipeline's own, because memory depends on it; on a CPU that may take too long.
    """
    batch = min(batch_size, most if device.startswith("cuda") else max(1, affordable // ROUNDS))
    return batch, max(1, min(ROUNDS, affordable // batch))


def _masks(stage: Stage, sample: Sample, meter: _Meter) -> Took:
    meter.work(stage, sample.run("probe"))
    run = sample.run("rounds")
    return _took(meter, meter.work(stage, run), [len(run.keys("masks", unit)) for unit in run.units("masks")])


def _shards(stage: Shards, sample: Sample, meter: _Meter) -> Took:
    run = sample.run("rounds")
    stage = replace(
        stage, val_ratio=0.0, samples_per_shard=max(len(run.keys("images", unit)) for unit in run.units("images"))
    )
    meter.work(stage, sample.run("probe"))
    taken = meter.work(stage, run)
    return _took(meter, taken, [stage.size(run, shard) for shard in stage.plan(run)])


def _took(meter: _Meter, taken: list[float], counts: list[int]) -> Took:
    each = tuple(seconds / count for seconds, count in zip(taken, counts, strict=True))
    return Took(each, sum(counts), 1, meter.start_seconds, "cpu", meter.memory("cpu"))


def _pretrain(stage: Pretrain, sample: Sample, meter: _Meter) -> Took:
    device, whole = devices_for(stage)[0], stage.batch_size
    if not stage.data:
        stage = replace(stage, data=(str(_repeated(sample, whole)),))
    shares = stage.accumulate
    few = max(shares, min(whole, _FEW) // shares * shares)
    (seconds,) = _steps(stage, few, 2, sample.run("probe"), meter)
    if device.startswith("cuda") or ROUNDS * whole * seconds < sample.seconds:
        few = whole
    taken = _steps(stage, few, ROUNDS + 2, sample.run("rounds"), meter)[:-1]  # the last step writes a checkpoint
    return Took(tuple(taken), few * len(taken), few, meter.start_seconds, device, meter.memory(device))


def _steps(stage: Pretrain, batch: int, count: int, run: Run, meter: _Meter) -> list[float]:
    """Seconds an image of each of ``count`` training steps of ``batch`` images but the first."""
    stage = replace(
        stage,
        samples_seen=count * batch,
        batch_size=batch,
        log_every=1,  # so that a GPU is waited for
        save_every=10**9,
        snapshots=0,
        trackers=(),
    )
    ends: list[float] = []
    meter.work(stage, run, lambda images: ends.append(time.perf_counter()))
    return [(after - before) / batch for before, after in pairwise(ends)]


def _repeated(sample: Sample, images: int) -> Path:
    """A folder in which the sample's shards stand as often as makes so many images."""
    folder = sample.folder / "data"
    folder.mkdir(exist_ok=True)
    tars = sorted(sample.run("rounds").folder("shards").glob("train/*.tar"))
    held = sum(_content(tar)[1] for tar in tars)
    for turn in range(-(-images // held)):
        for number, tar in enumerate(tars):
            link = folder / f"{turn * len(tars) + number:06d}.tar"
            if not link.exists():
                link.symlink_to(tar)
    return folder


#: How each stage is measured; what is not here is not.
MEASURED: dict[str, Callable[..., Took]] = {
    "generate": _generate,
    "masks": _masks,
    "shards": _shards,
    "pretrain": _pretrain,
}
