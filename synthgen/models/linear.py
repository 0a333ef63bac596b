"""Linear layers, by oneDNN where that is the faster library.

PyTorch's builds for x86 multiply float32 matrices by MKL, which on processors of other makers than Intel runs its
AVX2 kernels even if the processor has AVX-512. oneDNN, which the same builds contain, uses what the processor has.
``benchmarks/pretrain.py`` compares both. Their last bits differ; which one computes depends on the machine and the
shapes alone, so a training that resumes on the same machine ends with the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from synthgen.devices import has_intel_cpu

__all__ = ["Linear", "linear"]

_MIN_PRODUCTS = 2**20  # multiplications of a layer below which oneDNN's start costs more than it saves
_ONEDNN_IS_FASTER = not has_intel_cpu() and all(
    library.is_available() for library in (torch.backends.mkl, torch.backends.mkldnn)
)


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
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _MIN_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
        and _ONEDNN_IS_FASTER
        and not torch.compiler.is_compiling()  # Inductor accepts the operator with constant weights alone
    ):
        y: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator behind fused linear layers of compiled models; strides may be any."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if to_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )
