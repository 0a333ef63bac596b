"""The training loop of the tiny model: AdamW with EMA weights, on CPU cores or a GPU, resumable from a checkpoint."""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Budget", "Losses", "Settings", "TrainState", "add_budget_options", "fit", "parse_budget", "rank_seed"]

Losses = dict[str, Tensor]  # "loss", which is minimised, and other scalars for the log


@dataclass(frozen=True)
class Budget:
    """When training ends: after ``minutes`` of wall clock, summed over resumed runs, or after ``steps``."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        ratios = [0.0]
        if self.minutes is not None:
            ratios.append(seconds / (60 * self.minutes))
        if self.steps is not None:
            ratios.append(step / self.steps)
        return min(max(ratios), 1.0)


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--minutes`` and ``--steps``."""
    parser.add_argument("--minutes", type=float, help="train for this long, earlier runs included")
    parser.add_argument("--steps", type=int, help="train for this many steps, earlier runs included")


def parse_budget(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Budget:
    """The budget on the command line; exits with an error if there is none or it is not positive."""
    limits = [limit for limit in (args.minutes, args.steps) if limit is not None]
    if not limits:
        parser.error("give --minutes or --steps")
    if min(limits) <= 0:
        parser.error("--minutes and --steps must be positive")
    return Budget(args.minutes, args.steps)


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a training run."""

    learning_rate: float
    batch_size: int  # per step and process
    warmup_steps: int = 100
    constant_ratio: float = 0.0  # share of the budget at the full learning rate, before the cosine decay
    final_lr_ratio: float = 0.02  # of the full learning rate, at the end of the decay
    weight_decay: float = 0.01
    max_norm: float = 1.0  # of the gradient
    ema_decay: float = 0.999
    log_every: int = 20  # steps
    save_every: float = 120.0  # seconds
    eval_every: float = 900.0  # seconds


class TrainState:
    """Everything a resumed run needs: weights, EMA weights, AdamW's moments and counters."""

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
        """Update the EMA weights; during the first steps with a lower decay."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.params.values()), 1 - decay)

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        tensors = {f"ema.{name}": p for name, p in self.ema.items()}
        for name, p in self.params.items():
            tensors[f"model.{name}"] = p.detach()
            moments = self.optimizer.state[p]  # empty before the first step
            tensors[f"mean.{name}"] = moments.get("exp_avg", torch.zeros_like(p))
            tensors[f"square.{name}"] = moments.get("exp_avg_sq", torch.zeros_like(p))
        counters = {"step": str(self.step), "seconds": str(self.seconds), "samples": str(self.samples)}
        partial = path.with_suffix(".partial")
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=counters)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Restore a checkpoint that :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file, torch.no_grad():
            counters = file.metadata()
            self.step, self.seconds = int(counters["step"]), float(counters["seconds"])
            self.samples = int(counters["samples"])
            for name, p in self.params.items():
                p.copy_(file.get_tensor(f"model.{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema.{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": file.get_tensor(f"mean.{name}"),
                    "exp_avg_sq": file.get_tensor(f"square.{name}"),
                }


def fit(
    model: nn.Module,
    compute_losses: Callable[[int], Losses],
    out: Path,
    budget: Budget,
    settings: Settings,
    evaluate: Callable[[dict[str, Tensor]], dict[str, float]],
) -> dict[str, Tensor]:
    """Train ``model`` until the budget is used up and return its EMA weights.

    Args:
        model: its parameters that require gradients are trained.
        compute_losses: the losses of the batch of a step.
        out: folder for ``state.safetensors``, the checkpoint from which a later call resumes, and ``metrics.jsonl``.
        budget: when to stop.
        settings: hyperparameters and intervals.
        evaluate: metrics of the EMA weights, for the log.
    """
    out.mkdir(parents=True, exist_ok=True)
    state, checkpoint = TrainState(model, settings), out / "state.safetensors"
    if checkpoint.is_file():
        state.load(checkpoint)
    last_save = last_eval = time.monotonic()
    start = last_save - state.seconds
    progress = budget.progress(state.step, state.seconds)
    while progress < 1:
        lr = settings.learning_rate * lr_factor(state.step, progress, settings)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        losses = compute_losses(state.step)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        progress = all_reduce(state.params, budget.progress(state.step + 1, time.monotonic() - start))
        norm = nn.utils.clip_grad_norm_(state.params.values(), settings.max_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.samples += settings.batch_size * world_size()
        state.seconds = time.monotonic() - start
        state.update_ema(settings.ema_decay)
        if rank() == 0:
            done = progress >= 1
            if done or state.step % settings.log_every == 0:
                values = {name: round(value.item(), 5) for name, value in losses.items()}
                write_log(out, state, rate=round(lr, 7), norm=round(float(norm), 4), **values)
            if done or time.monotonic() - last_save > settings.save_every:
                state.save(checkpoint)
                last_save = time.monotonic()
            if done or time.monotonic() - last_eval > settings.eval_every:
                write_log(out, state, **evaluate(state.ema))
                last_eval = time.monotonic()
    return state.ema


def lr_factor(step: int, progress: float, settings: Settings) -> float:
    """Linear warm-up, a constant phase, then cosine decay to ``final_lr_ratio``."""
    decay = max(0.0, progress - settings.constant_ratio) / (1 - settings.constant_ratio)
    cosine = settings.final_lr_ratio + (1 - settings.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * decay))
    return min(1.0, (step + 1) / settings.warmup_steps) * cosine


def write_log(out: Path, state: TrainState, **values: float) -> None:
    """Append a row to ``metrics.jsonl``."""
    row = {"step": state.step, "seconds": round(state.seconds, 1), "samples": state.samples, **values}
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# -- several processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_seed(*parts: int) -> int:
    """Mix ``parts`` and the rank of this process into one seed, so that each process draws different data."""
    seed = rank() + 1
    for part in parts:
        seed = (seed * 1_000_003 + part) % (2**61 - 1)
    return seed


def all_reduce(params: dict[str, nn.Parameter], progress: float) -> float:
    """Average the gradients over all processes, and return the average progress, so that all stop at the same step."""
    if not dist.is_initialized():
        return progress
    gradients = [p.grad for p in params.values() if p.grad is not None]
    flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([progress], device=gradients[0].device)])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, torch.split(flat[:-1], [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(flat[-1])
