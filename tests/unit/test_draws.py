"""Random numbers as functions of a sample's seed."""

from __future__ import annotations

import pytest
import torch

from synthgen.models.draws import normal, uniform


def test_draws_are_uniform_and_belong_to_their_seed():
    seeds = torch.tensor([7, 2**62, 8])
    drawn = uniform(seeds, 200, 100)
    assert torch.equal(uniform(seeds[1:2], 200, 100)[0], drawn[1])
    assert (drawn.mean(), drawn.var() * 12) == (pytest.approx(0.5, abs=0.005), pytest.approx(1, abs=0.02))
    assert 0 <= drawn.min() < drawn.max() < 1
    assert torch.histc(drawn, 10).sub(6000).abs().max() < 300  # 4 deviations of 73
    others = uniform(seeds, 200, 100, stream=1)
    for one, other in (
        (drawn[0], drawn[1]),
        (drawn[0], drawn[2]),
        (drawn[0], others[0]),
        (drawn[0, :-1], drawn[0, 1:]),
    ):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.03
    assert uniform(seeds).shape == (3,)


def test_normal_draws_have_the_moments():
    drawn = normal(torch.arange(50), 2000).double()
    moments = [float((drawn**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)
    assert drawn.isfinite().all()
