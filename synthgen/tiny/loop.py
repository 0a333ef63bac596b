"""The training loop of the tiny model: on CPU cores or a GPU, budgeted in minutes or steps, resumable."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Budget", "Settings", "State", "optimise", "rank_seed"]

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """When training ends: after ``minutes`` of wall clock (over all runs that it was resumed in) or after ``steps``."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        shares = [0.0]
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes))
        if self.steps is not None:
            shares.append(step / self.steps)
        return min(max(shares), 1.0)


@dataclass(frozen=True)
class Settings:
    """How a model is optimised."""

    learning_rate: float
    batch_size: int  # samples a step and process; only counted here
    warmup_steps: int = 100
    steady: float = 0.0  # share of the budget at the full learning rate, before the cosine
    final_rate: float = 0.02  # of the learning rate, at the end of the cosine
    weight_decay: float = 0.01
    max_norm: float = 1.0
    ema: float = 0.999
    log_every: int = 20  # steps
    save_every: float = 120.0  # seconds
    show_every: float = 900.0  # seconds


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rank_seed(*parts: int) -> int:
    """Mix numbers and this process's rank into one seed, so that no two processes draw the same data."""
    seed = rank() + 1
    for part in parts:
        seed = (seed * 1_000_003 + part) % (2**61 - 1)
    return seed


class State:
    """What a resumed run needs: weights, their moving average, AdamW's moments, and how far it got."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(
            self.params.values(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.step, self.seconds, self.samples = 0, 0.0, 0

    def update_ema(self, decay: float) -> None:
        """Move the averages on by a step; the first steps count more, for there is little to average."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.params.values()), 1 - decay)

    def save(self, path: Path) -> None:
        """Write all of it to one file, which is there whole or not at all."""
        tensors = {f"ema.{name}": p for name, p in self.ema.items()}
        for name, p in self.params.items():
            tensors[f"model.{name}"] = p.detach()
            moments = self.optimizer.state[p]
            for key, moment in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
                tensors[f"{key}.{name}"] = moments[moment] if moments else torch.zeros_like(p)  # no step was taken yet
        counts = {"step": str(self.step), "seconds": str(self.seconds), "samples": str(self.samples)}
        partial = path.with_suffix(".partial")
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=counts)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Take up what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file, torch.no_grad():
            counts = file.metadata()
            self.step, self.seconds = int(counts["step"]), float(counts["seconds"])
            self.samples = int(counts["samples"])
            for name, p in self.params.items():
                p.copy_(file.get_tensor(f"model.{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema.{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": file.get_tensor(f"mean.{name}"),
                    "exp_avg_sq": file.get_tensor(f"square.{name}"),
                }


def optimise(
    model: nn.Module,
    losses: Callable[[int], Losses],
    out: Path,
    budget: Budget,
    settings: Settings,
    show: Callable[[dict[str, Tensor]], dict[str, float]],
) -> dict[str, Tensor]:
    """Train ``model`` until the budget is spent and return the moving average of its parameters.

    ``losses(step)`` gives the terms of one batch, the one named "loss" to be minimised. ``show(ema)`` draws a sample
    sheet and returns figures for the log. The folder ``out`` gets ``state.safetensors``, from which a stopped run goes
    on, and ``metrics.jsonl``.
    """
    out.mkdir(parents=True, exist_ok=True)
    state, path = State(model, settings), out / "state.safetensors"
    if path.is_file():
        state.load(path)
    progress = budget.progress(state.step, state.seconds)
    clock = saved = shown = time.monotonic() - state.seconds
    saved = shown = time.monotonic()
    while progress < 1:
        rate = settings.learning_rate * schedule(state.step, progress, settings)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        terms = losses(state.step)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        progress = average_gradients(state.params, budget.progress(state.step + 1, time.monotonic() - clock))
        norm = nn.utils.clip_grad_norm_(state.params.values(), settings.max_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.samples += settings.batch_size * world()
        state.seconds = time.monotonic() - clock
        state.update_ema(settings.ema)
        if rank() == 0:
            if state.step % settings.log_every == 0 or progress >= 1:
                figures = {name: round(value.item(), 5) for name, value in terms.items()}
                write_log(out, state, rate=round(rate, 7), norm=round(float(norm), 4), **figures)
            if time.monotonic() - saved > settings.save_every or progress >= 1:
                state.save(path)
                saved = time.monotonic()
            if time.monotonic() - shown > settings.show_every or progress >= 1:
                write_log(out, state, **show(state.ema))
                shown = time.monotonic()
    return state.ema


def schedule(step: int, progress: float, settings: Settings) -> float:
    """Linear warm-up, the full rate for the share ``steady`` of the budget, then a cosine down to ``final_rate``."""
    falling = max(0.0, progress - settings.steady) / (1 - settings.steady)
    cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * falling))
    return min(1.0, (step + 1) / settings.warmup_steps) * cosine


def average_gradients(params: dict[str, nn.Parameter], progress: float) -> float:
    """Average the gradients over the processes; return the mean progress, so that all of them stop together."""
    if not dist.is_initialized():
        return progress
    gradients = [p.grad for p in params.values() if p.grad is not None]
    flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([progress], device=gradients[0].device)])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, torch.split(flat[:-1], [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(flat[-1])


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def write_log(out: Path, state: State, **figures: float) -> None:
    row = {"step": state.step, "seconds": round(state.seconds, 1), "samples": state.samples, **figures}
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + os.linesep)
