import argparse
import dataclasses
import json

import pytest
import torch
from torch import nn

from synthgen.tiny.loop import Budget, Settings, add_budget_options, fit, lr_factor, parse_budget, rank_seed

SETTINGS = Settings(1e-2, 4, warmup_steps=3, ema_decay=0.8, log_every=5, save_every=0, eval_every=0)


class Interrupted(Exception):
    pass


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    return model


def train(out, steps, *, settings=SETTINGS, stop_at=None, history=None, evaluate=lambda ema: {"metric": 1.0}):
    """Fit a regression whose batches depend on the step only; returns None if it is interrupted."""
    model = make_model()

    def compute_losses(step):
        if step == stop_at:
            raise Interrupted
        if history is not None:
            history.append({name: p.detach().clone() for name, p in model.named_parameters()})
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        error = model(x) - x[:, :2].flip(1)
        return {"loss": error.square().mean(), "absolute": error.abs().mean()}

    if stop_at is not None:
        with pytest.raises(Interrupted):
            fit(model, compute_losses, out, Budget(steps=steps), settings, evaluate)
        return None
    return model, fit(model, compute_losses, out, Budget(steps=steps), settings, evaluate)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)


def test_progress_follows_the_limit_that_is_nearer():
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(minutes=2).progress(10**9, 30) == 0.25
    assert Budget(minutes=2, steps=10).progress(5, 30) == 0.5
    assert Budget(minutes=2, steps=10).progress(1, 90) == 0.75
    assert Budget(minutes=2, steps=10).progress(100, 0) == 1


def test_the_learning_rate_warms_up_stays_constant_and_decays():
    settings = Settings(1.0, 1, warmup_steps=4, constant_ratio=0.5, final_lr_ratio=0.1)
    assert [lr_factor(step, 0, settings) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    later = [lr_factor(100, progress, settings) for progress in (0.25, 0.5, 0.6, 0.75, 0.9, 1)]
    assert later[:2] == [1, 1]
    assert later[3] == pytest.approx(0.55)
    assert later[-1] == pytest.approx(0.1)
    assert later[1:] == sorted(later[1:], reverse=True)
    assert lr_factor(0, 0.75, settings) == pytest.approx(0.25 * 0.55)


def test_without_a_constant_phase_the_learning_rate_decays_from_the_start():
    settings = Settings(1.0, 1, warmup_steps=1, final_lr_ratio=0.0)
    rates = [lr_factor(9, progress / 4, settings) for progress in range(5)]
    assert rates == pytest.approx([1, 0.8536, 0.5, 0.1464, 0], abs=1e-4)


def test_a_resumed_run_ends_with_the_same_parameters(tmp_path):
    model, ema = train(tmp_path / "straight", 12)
    train(tmp_path / "stopped", 12, stop_at=5)
    train(tmp_path / "stopped", 12, stop_at=9)
    resumed, resumed_ema = train(tmp_path / "stopped", 12)
    assert_same(dict(model.named_parameters()), dict(resumed.named_parameters()))
    assert_same(ema, resumed_ema)
    last = rows(tmp_path / "stopped")[-2]
    assert (last["step"], last["samples"]) == (12, 48)


def test_a_finished_run_is_loaded_and_continues_with_more_steps(tmp_path):
    model, ema = train(tmp_path, 6)
    count = len(rows(tmp_path))
    again, same = train(tmp_path, 6)
    assert_same(ema, same)
    assert_same(dict(model.named_parameters()), dict(again.named_parameters()))
    assert len(rows(tmp_path)) == count
    train(tmp_path, 8)
    assert rows(tmp_path)[-1]["step"] == 8


def test_the_ema_decays_faster_in_the_first_steps(tmp_path):
    before = []
    model, ema = train(tmp_path, 10, history=before)
    after = [*before[1:], {name: p.detach() for name, p in model.named_parameters()}]
    name = "2.weight"
    expected = before[0][name].clone()
    for step, params in enumerate(after, start=1):
        decay = min(SETTINGS.ema_decay, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * params[name]
    torch.testing.assert_close(ema[name], expected)


def test_frozen_parameters_do_not_change_and_have_no_ema(tmp_path):
    before = make_model()[0].bias
    model, ema = train(tmp_path, 4)
    assert "0.bias" not in ema
    assert torch.equal(model[0].bias, before)
    assert not torch.equal(model[2].bias, make_model()[2].bias)


def test_a_budget_of_minutes_includes_earlier_runs(tmp_path):
    model = make_model()
    x = torch.ones(1, 3)

    def compute_losses(step):
        return {"loss": model(x).square().mean()}

    def run(minutes):
        fit(model, compute_losses, tmp_path, Budget(minutes=minutes), SETTINGS, lambda ema: {})
        return rows(tmp_path)[-1]["step"]

    assert run(1e-9) == 1
    assert run(1e-9) == 1
    assert run(1e-3) > 1


def test_logs_at_intervals_and_at_the_end(tmp_path):
    evaluated = []
    settings = dataclasses.replace(SETTINGS, eval_every=1e9)
    train(tmp_path, 12, settings=settings, evaluate=lambda ema: evaluated.append(sorted(ema)) or {"figure": 2.5})
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [5, 10, 12, 12]
    assert {"loss", "absolute", "rate", "norm", "samples", "seconds"} <= logged[0].keys()
    assert logged[-1]["figure"] == 2.5
    assert evaluated == [["0.weight", "2.bias", "2.weight"]]


def test_seeds_depend_on_every_part():
    parts = [(2026, 0, 1), (2026, 1, 0), (2026, 0, 2), (2027, 0, 1), (2026, 0, 1, 0)]
    seeds = {rank_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**61 for seed in seeds)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_budget_options(parser)
    return parse_budget(parser, parser.parse_args(arguments))


def test_the_budget_on_the_command_line(capsys):
    assert parse("--steps", "3") == Budget(steps=3)
    assert parse("--minutes", "0.5", "--steps", "3") == Budget(0.5, 3)
    for arguments, message in ((), "give --minutes"), (("--steps", "0"), "must be positive"):
        with pytest.raises(SystemExit):
            parse(*arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--steps", "5", "--minutes", "-1")
