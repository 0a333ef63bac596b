"""Linear layers, by oneDNN where that is the faster library.

PyTorch's builds for x86 multiply float32 matrices by MKL, which on processors of other makers than Intel runs its
AVX2 kernels even if the processor has AVX-512. oneDNN, which the same builds contain, uses AVX-512 there.
``benchmarks/pretrain.py`` compares both. Their last bits differ; which one computes depends on the machine and the
shapes alone, so a training that resumes on the same machine ends with the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from synthgen.devices import has_intel_cpu

__all__ = ["Linear", "linear"]

_MIN_PRODUCTS = 2**20  # multiplications of a layer below which oneDNN's start costs more than it saves
_ONEDNN_IS_FASTER = (
    not has_intel_cpu()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and all(library.is_available() for library in (torch.backends.mkl, torch.backends.mkldnn))
)
_PLAIN = (Tensor, nn.Parameter)  # a subclass, such as a quantised weight, has a linear operator of its own


class Linear(nn.Linear):
    """``nn.Linear``, computed by :func:`linear`."""

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """The layer applied to each row by itself."""
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """``x weight^T + bias``, as ``torch.nn.functional.linear``."""
    if (
        _ONEDNN_IS_FASTER
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not _is_observed()
        and torch.backends.mkldnn.enabled
        and x.numel() * len(weight) >= _MIN_PRODUCTS
    ):
        return _by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_observed() -> bool:
    """Whether calls are compiled, traced, transformed (``torch.func``) or dispatched to a mode such as a counter."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        # the operator behind linear layers of compiled models; strides may be any
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _by_onednn(grad, weight.t()) if to_x else None,
            _by_onednn(rows.t(), x.reshape(-1, x.shape[-1]).t()) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )
