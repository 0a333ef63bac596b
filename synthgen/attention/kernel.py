"""Fused attention that also returns the log-sum-exp of each row's softmax, so that single columns are cheap.

``softmax(s)[i, j] = exp(s[i, j] - L[i])`` with ``L[i] = logsumexp(s[i])``. The fused kernels compute L internally, and
PyTorch's public function discards it; called directly, the kernels return it together with a bit-identical output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend

__all__ = ["attention_with_lse", "chosen_kernel", "logsumexp_of"]

_CHUNK = 2**24  # logits held at once where no kernel returns the log-sum-exp
_FLASH, _EFFICIENT, _CUDNN = (
    int(backend.value)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
)
_PROBE = 8  # rows of the first head on which a kernel's log-sum-exp is checked, once
_trusted: dict[tuple[Any, ...], bool] = {}


def attention_with_lse(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h k d"],
    value: Float[Tensor, "b h k e"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"] | None]:
    """``torch.nn.functional.scaled_dot_product_attention`` and the log-sum-exp of its rows, in float32.

    The output is bit-identical to the public function's: the kernel that it would choose is called. The log-sum-exp is
    None if that kernel does not return it, or if on the first call with finite values it differed from a plain
    computation.
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    known = query.device.type in ("cpu", "cuda")  # other devices do not report the chosen kernel
    plain = (
        not known
        or query.dim() != 4
        or enable_gqa
        or dropout_p > 0
        or is_causal
        or (attn_mask is not None and query.is_cuda)
    )
    kernel = -1 if plain else chosen_kernel(query, key, value, attn_mask, **options)
    kind = (query.device.type, kernel, query.dtype, query.shape[-1])
    if not _trusted.get(kind, True):
        kernel = -1
    try:
        found = _call(kernel, query, key, value, attn_mask, options)
    except AttributeError:  # this PyTorch has no kernel of that name
        found = None
    if found is None:
        options["enable_gqa"] = enable_gqa
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options), None
    output, lse = found
    if kind not in _trusted:
        expected = logsumexp_of(query[:1, :1, :_PROBE], key[:1, :1], scale=scale, mask=_first(attn_mask))
        if not expected.isfinite().all():
            return output, None  # non-finite values say nothing about the kernel
        near = lse.shape == query.shape[:3] and torch.allclose(lse[:1, :1, :_PROBE], expected, rtol=1e-3, atol=1e-3)
        _trusted[kind] = bool(near)
        if not near:
            return output, None
    return output, lse


def chosen_kernel(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> int:
    """The ``SDPBackend`` that PyTorch's public function would choose; -1 if this PyTorch does not report it."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    return -1 if choose is None else int(choose(query, key, value, attn_mask, **options))


def _call(
    kernel: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """The output and log-sum-exp of one kernel; None for kernels that do not return it."""
    aten, scale, rows = torch.ops.aten, options["scale"], query.shape[2]
    if query.device.type == "cpu" and kernel == _FLASH:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=_as_bias(mask, query), scale=scale
        )
    elif query.is_cuda and kernel == _FLASH and query.shape[-1] % 8 == 0:  # other widths are padded internally
        output, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    elif query.is_cuda and kernel == _EFFICIENT:
        output, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
    elif query.is_cuda and kernel == _CUDNN:
        output, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
        lse = lse.reshape(*query.shape[:2], -1)
    else:
        return None
    return output, lse[..., :rows]


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))


def _first(mask: Tensor | None) -> Tensor | None:
    """The part of a mask for the checked rows; it broadcasts over batch, heads and rows."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    return mask[:1, :1, :_PROBE]


def logsumexp_of(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h k d"], *, scale: float | None, mask: Tensor | None = None
) -> Float[Tensor, "b h n"]:
    """``logsumexp`` over the keys of ``scale * query · key`` (+ mask), in float32, a few rows at a time."""
    b, heads, n, d = query.shape
    scale = d**-0.5 if scale is None else scale
    bias = _as_bias(mask, query)
    step = max(1, _CHUNK // (b * heads * key.shape[2]))
    keys = key.float().transpose(-1, -2)
    parts = []
    for start in range(0, n, step):
        logits = (query[:, :, start : start + step].float() * scale) @ keys
        if bias is not None:
            logits = logits + (bias[..., start : start + step, :] if bias.shape[-2] > 1 else bias).float()
        parts.append(logits.logsumexp(dim=-1))
    return torch.cat(parts, dim=2)
