"""Similarities in full precision, also under bfloat16 autocast."""

from __future__ import annotations

import torch

from synthgen.methods._products import products, unit
from synthgen.methods._regions import WHOLE
from synthgen.methods.vlp import FAR
from tests.methods import build, make_batch


def test_products_have_full_precision_under_autocast():
    ours, theirs = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).unbind()
    whole = ours @ theirs.mT
    with torch.autocast("cpu", torch.bfloat16):
        assert (ours @ theirs.mT).dtype == torch.bfloat16
        assert torch.equal(products(ours, theirs), whole)
        assert products(ours.bfloat16(), theirs.bfloat16()).dtype == unit(ours.bfloat16()).dtype == torch.float32
        assert torch.allclose(unit(ours.bfloat16()).norm(dim=-1), torch.ones(3, 5), atol=1e-6)


def is_float32(numbers):
    """Whether numbers have more digits than bfloat16."""
    return numbers.dtype == torch.float32 and bool((numbers != numbers.bfloat16().float()).any())


def test_similarities_have_full_precision_under_autocast():
    """With a temperature of 0.01 the error of bfloat16 would be tenths of a logit."""
    batch, seen = make_batch(6), []
    vlp = build("vlp", region_weight=1.0, temperature=0.01)
    contrast = vlp.contrast
    vlp.contrast = lambda logits, fits, told: seen.append(logits) or contrast(logits, fits, told)
    with torch.autocast("cpu", torch.bfloat16):
        vlp(batch, 0.0)
    assert [is_float32(0.01 * logits.where(logits > FAR, 0)) for logits in seen] == [True] * 4
    method = build("contrastive", queue=4)
    method(batch, 0.0)
    method.after_step(0.0)  # which fills the queue
    q, k, within = (unit(torch.randn(6, 1, 256, generator=torch.Generator().manual_seed(n))) for n in range(3))
    given = q, k, within, method.whole(batch), method.queue_words == WHOLE
    whole = method.contrast(*given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.contrast(*given)[0], whole)
