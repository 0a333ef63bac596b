"""The fused kernels' own log-sum-exp, against the public function and a plain logsumexp."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from synthgen.attention import kernel
from synthgen.attention.kernel import attention_with_lse, logsumexp_of


def qkv(rows=50, keys=77, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, 16, generator=generator).to(dtype) for n in (rows, keys, keys)]


def by_hand(query, key, mask=0.0, scale=0.25):
    return (query.double() @ key.double().transpose(-1, -2) * scale + mask).logsumexp(-1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_output_equals_the_public_functions_and_the_lse_is_right(dtype, scale):
    query, key, value = qkv(dtype=dtype)
    with torch.inference_mode():
        output, lse = attention_with_lse(query, key, value, scale=scale)
        assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, scale=scale))
    assert lse is not None
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, by_hand(query, key, scale=scale or 0.25), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_counts_in_output_and_lse(boolean):
    query, key, value = qkv()
    seen = torch.arange(77) < torch.tensor([40, 60])[:, None, None, None]
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    with torch.inference_mode():
        mask = seen if boolean else bias
        output, lse = attention_with_lse(query, key, value, mask)
        assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, mask))
    expected = by_hand(query, key, bias)
    found = lse if lse is not None else logsumexp_of(query, key, scale=None, mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logsumexp_of(query, key, scale=None, mask=mask), expected, atol=1e-5, rtol=1e-5)


def test_kernels_without_lse_return_none():
    query, key, value = qkv(rows=77)
    output, lse = attention_with_lse(query, key, value, is_causal=True)
    assert lse is None
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_a_pytorch_without_these_names_computes_the_same(monkeypatch):
    query, key, value = qkv()
    expected = F.scaled_dot_product_attention(query, key, value)
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    output, lse = attention_with_lse(query, key, value)
    assert torch.equal(output, expected)
    assert lse is None
    monkeypatch.setattr(kernel, "chosen_kernel", lambda *arguments, **options: kernel._FLASH)
    monkeypatch.setattr(kernel.torch, "ops", SimpleNamespace(aten=SimpleNamespace()))
    output, lse = attention_with_lse(query, key, value)
    assert torch.equal(output, expected)
    assert lse is None


def test_a_kernel_with_a_wrong_lse_is_not_used_again(monkeypatch):
    query, key, value = qkv(dtype=torch.float64)
    asked = []

    def wrong(*arguments):
        asked.append(arguments)
        return F.scaled_dot_product_attention(*arguments[1:4]), torch.zeros(2, 3, 50)

    monkeypatch.setattr(kernel, "_trusted", {})
    monkeypatch.setattr(kernel, "_call", wrong)
    assert attention_with_lse(query, key, value)[1] is None
    assert list(kernel._trusted.values()) == [False]
    attention_with_lse(query, key, value)
    assert asked[0][0] != -1
    assert asked[1][0] == -1


def test_non_finite_values_do_not_discredit_a_kernel(monkeypatch):
    query, key, value = qkv()
    broken = query.clone()
    broken[0] = float("nan")
    monkeypatch.setattr(kernel, "_trusted", {})
    output, lse = attention_with_lse(broken, key, value)
    assert lse is None
    assert kernel._trusted == {}
    assert torch.equal(output[1], F.scaled_dot_product_attention(query, key, value)[1])
    assert attention_with_lse(query, key, value)[1] is not None
    assert attention_with_lse(broken, key, value)[1] is not None  # trusted since


def test_the_plain_lse_does_not_depend_on_its_chunks(monkeypatch):
    query, key, _ = qkv()
    whole = logsumexp_of(query, key, scale=0.25)
    monkeypatch.setattr(kernel, "_CHUNK", 1)
    torch.testing.assert_close(logsumexp_of(query, key, scale=0.25), whole)
