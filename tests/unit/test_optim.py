"""The optimizer and the schedule of the learning rate."""

from __future__ import annotations

import pytest

from synthgen.train.optim import OptimSettings, build_optimizer, learning_rate
from tests.methods import build


def test_biases_norms_and_tokens_have_no_decay():
    method = build("mae")
    settings = OptimSettings(base_learning_rate=1e-3, batch_size=64, warmup_ratio=0.1, weight_decay=0.05, max_norm=0.0)
    decayed, spared = build_optimizer(method, settings).param_groups
    names = {id(p): name for name, p in method.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.norm.weight"} <= {
        names[id(p)] for p in spared["params"]
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_rate_rises_then_falls_to_zero():
    settings = OptimSettings(base_learning_rate=1e-3, batch_size=512, warmup_ratio=0.1, weight_decay=0.0, max_norm=0.0)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[55] == pytest.approx(1e-3, rel=0.02)  # half way down
    assert 0 < rates[0] < 3e-4
    assert rates[-1] < 1e-5
