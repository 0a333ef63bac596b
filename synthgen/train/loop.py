"""The training loop: seed, forward, backward, step; a record per step, and a checkpoint every ``save_every`` steps.

Exact resume: the order of samples, their views, and a method's random draws for them are functions of (seed, epoch,
number). So a training that resumes from a checkpoint repeats the arithmetic of an uninterrupted one. On CPUs with the
same number of threads the weights are bit-identical; on GPUs if their kernels are deterministic. Several processes give
the losses of one, up to the order of sums.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from synthgen.datasets import ImageDataset
from synthgen.errors import SynthgenError
from synthgen.loader import Batch, Order, loader, prefetch
from synthgen.methods import Method, StepOutput
from synthgen.models.layers import Block, CrossBlock
from synthgen.stores import AppendFile
from synthgen.stores.tar import storage_error, write_bytes
from synthgen.train.checkpoint import Checkpoints
from synthgen.train.optim import OptimSettings, build_optimizer, learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Record", "Training", "last_loss", "seed_everything"]


@dataclass(frozen=True)
class Record:
    """The record of one step."""

    step: int  # steps done, including this one
    samples: int  # images of this step, over all processes
    figures: dict[str, float] = field(default_factory=dict)  # filled every ``log_every`` steps


def seed_everything(*parts: int) -> None:
    """Seed all global random generators that a method may use with a mix of ``parts``."""
    seed = int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # on every device


@dataclass
class Training:
    """A training of ``method`` on ``samples``, from its newest checkpoint to its last step."""

    method: Method
    samples: ImageDataset
    order: Order
    optim: OptimSettings
    accelerator: Accelerator
    checkpoints: Checkpoints
    metrics_path: Path
    save_every: int = 200  # steps
    log_every: int = 10
    num_workers: int = 0
    compile: bool = False  # compile the transformer blocks with torch.compile
    before_save: Callable[[], None] = lambda: None  # called before each checkpoint; raises to stop the training

    def __post_init__(self) -> None:
        if self.compile:
            for module in self.method.modules():
                if isinstance(module, Block | CrossBlock):
                    module.compile()
        on_cpu = self.accelerator.device.type == "cpu"  # where torch would loop over tensors; on GPUs it batches them
        optimizer = build_optimizer(self.method, self.optim, fused=on_cpu)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.method, optimizer)
        state = self.checkpoints.resume(self.method, self.optimizer.optimizer)
        self.step = int(state.get("step", 0))
        self._check_same_step()
        self.seconds = float(state.get("seconds", 0.0))
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._metrics = AppendFile(self.metrics_path)
        self._waited = 0.0  # seconds spent waiting for data since the last record
        self._first_bad = torch.full((), self.order.steps, device=self.accelerator.device)

    def run(self) -> Iterator[Record]:
        """Train ``method`` in place and yield a record per step.

        Raises:
            SynthgenError: the loss is not a finite number; names the step.
            CorruptFile: a sample cannot be read.
            StorageError: a checkpoint or a record cannot be written.
        """
        main = self.accelerator.is_main_process
        if main:
            self._delete_later_records()
        self.method.train()
        batches = iter(self._loader()) if self.num_workers else prefetch(self._loader())
        started, logged, logged_step = time.perf_counter() - self.seconds, time.perf_counter(), self.step
        for step in range(self.step, self.order.steps):
            outputs = self._step(step, batches)
            self.step = step + 1
            last = self.step == self.order.steps
            figures: dict[str, float] = {}
            if self.step % self.log_every == 0 or last:
                self._check_finite()
                figures = self._figures(outputs, step)
                now = time.perf_counter()
                images = (self.step - logged_step) * self.order.batch_size
                figures |= {
                    "images_per_second": round(images / (now - logged), 2),
                    "waiting": round(self._waited / (now - logged), 4),  # share of the time spent waiting for data
                    "seconds": round(now - started, 3),
                }
                logged, logged_step, self._waited = now, self.step, 0.0
                if main:
                    self._append({"step": self.step, "epoch": step // self.order.steps_per_epoch, **figures})
                self.accelerator.log(figures, step=self.step)
            self.seconds = time.perf_counter() - started
            if self.step % self.save_every == 0 or last:
                self._check_finite()
                if main:
                    self._save()
            yield Record(self.step, self.order.batch_size, figures)

    def _loader(self) -> Any:
        process = self.accelerator.process_index
        order = replace(self.order, start=self.step, rank=process, world_size=self.accelerator.num_processes)
        config = self.method.encoder.config
        return loader(
            self.samples,
            order,
            self.method.views(),
            mean=config.mean,
            std=config.std,
            seed=self.order.seed,
            num_workers=self.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            second=self.method.second_views(),
        )

    def _step(self, step: int, batches: Iterator[Batch]) -> list[StepOutput]:
        rate, progress = learning_rate(self.optim, step, self.order.steps), step / max(1, self.order.steps - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        outputs = []
        for part in range(self.order.parts):
            before = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - before
            batch = batch.to(self.accelerator.device)
            seed_everything(self.order.seed, step, part, self.accelerator.process_index)
            with self.accelerator.accumulate(self.wrapped):
                output: StepOutput = self.wrapped(batch, progress)
                self.accelerator.backward(output.loss)
                if self.accelerator.sync_gradients and self.optim.max_norm:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.optim.max_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            # kept on the device: reading it at each step would make the host wait for the GPU
            outputs.append(StepOutput(output.loss.detach(), output.metrics))
            bad = torch.where(output.loss.detach().isfinite(), self.order.steps, step)
            self._first_bad = torch.minimum(self._first_bad, bad)
        self.method.after_step(progress)
        return outputs

    def _check_same_step(self) -> None:
        """Check that all processes resume from the same step; their gradients would be averaged regardless.

        Raises:
            SynthgenError: processes would resume from different steps; names the steps.
        """
        own = torch.tensor([self.step], device=self.accelerator.device)
        steps = sorted(set(self.accelerator.gather(own).tolist()))
        if len(steps) > 1:
            raise SynthgenError(
                f"the processes of this training would go on from different steps ({', '.join(map(str, steps))}), as "
                f"not all of them see the same {self.checkpoints.folder}; put the run where every machine sees it"
            )

    def _check_finite(self) -> None:
        bad = int(self.accelerator.gather(self._first_bad).min())
        if bad < self.order.steps:
            raise SynthgenError(
                f"the loss is not a finite number at step {bad + 1} (learning rate "
                f"{learning_rate(self.optim, bad, self.order.steps):.2g}); lower base_learning_rate, set max_norm, "
                "or use precision bf16 or no"
            )

    def _figures(self, outputs: list[StepOutput], step: int) -> dict[str, float]:
        """The loss and the metrics, averaged over the parts of the step and over processes, and the learning rate."""
        named = [{"loss": output.loss, **output.metrics} for output in outputs]
        values = torch.stack([torch.stack([value.float() for value in part.values()]) for part in named])
        means = self.accelerator.gather(values).mean(0)
        figures = {name: _rounded(float(value)) for name, value in zip(named[0], means, strict=True)}
        return {**figures, "learning_rate": _rounded(learning_rate(self.optim, step, self.order.steps))}

    def _save(self) -> None:
        self.before_save()
        scaler = self.accelerator.scaler
        state = {} if scaler is None else {"scaler": scaler.state_dict()}
        self._metrics.flush()  # before the checkpoint: a resumed training never writes older records again
        self.checkpoints.save(self.method, self.optimizer.optimizer, self.step, seconds=round(self.seconds, 3), **state)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self._metrics.add(json.dumps(record))
        except OSError as error:
            raise storage_error(self.metrics_path, error) from error

    def _delete_later_records(self) -> None:
        """Delete the records after the checkpoint, which will be written again."""
        if not self.metrics_path.is_file():
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # incomplete line of a process that was killed while writing
        write_bytes(self.metrics_path, "".join(kept).encode())


def last_loss(path: Path) -> float:
    """The loss of the last record in a training's metrics; NaN if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return float(json.loads(lines[-1])["loss"]) if lines else float("nan")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else value
