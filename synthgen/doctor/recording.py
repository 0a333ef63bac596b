"""Whether recording attention on this machine is exact and leaves the output unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from synthgen.doctor.machine import Device
from synthgen.errors import one_line

__all__ = ["SHAPES", "TOLERANCE", "Attention", "attention_on"]

SHAPES: dict[str, tuple[int, int, int]] = {  # queries, keys and head width
    "cross 4096 x 77": (4096, 77, 40),  # Stable Diffusion 1.5 at 512 px
    "joint 1024 + 333": (1357, 1357, 64),  # Stable Diffusion 3 at 512 px
}
TOLERANCE = 2**-12  # of a probability: half a step, just below 1, of float16, in which maps are stored


@dataclass(frozen=True, slots=True)
class Attention:
    """Recording on one device, in one dtype, at one shape."""

    device: str
    dtype: str
    shape: str
    kernel: str  # chosen by ``scaled_dot_product_attention``; "math" is not fused
    has_lse: bool
    same_output: bool  # bit-identical
    error: float  # largest error of a recorded probability, against softmax in float64
    exact: bool


def attention_on(device: Device, problems: list[str]) -> list[Attention]:
    """Recording on a device, in each dtype that it supports."""
    found = []
    for dtype in device.dtypes:
        try:
            found += [_attention_at(device.name, dtype, shape) for shape in SHAPES]
        except (RuntimeError, TypeError) as error:
            problems.append(
                f"attention on {device.name} in {dtype} does not run ({one_line(error)}); use another dtype"
            )
    problems += [
        f"recording on {item.device} in {item.dtype} is not exact at {item.shape}: "
        + (f"a probability is off by {item.error:.1e}" if item.same_output else "it changes the image")
        + "; use another dtype or another version of torch"
        for item in found
        if not item.exact
    ]
    return found


def _attention_at(device: str, dtype: str, shape: str) -> Attention:
    """Compare with the public function and with a softmax in float64, on peaked attention of one head."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend

    from synthgen.attention.kernel import attention_with_lse, chosen_kernel, logsumexp_of
    from synthgen.diffusion.loading import DTYPES

    rows, keys, width = SHAPES[shape]
    generator, scale = torch.Generator().manual_seed(0), width**-0.5
    query, key, value = (
        (torch.randn(1, 1, length, width, generator=generator) * spread).to(device, DTYPES[dtype])
        for length, spread in ((rows, 4), (keys, 1), (keys, 1))
    )
    with torch.inference_mode():
        kernel = SDPBackend(chosen_kernel(query, key, value)).name.lower().removesuffix("_attention")
        output, given = attention_with_lse(query, key, value)
        same = torch.equal(output, F.scaled_dot_product_attention(query, key, value))
        lse = logsumexp_of(query, key, scale=None) if given is None else given
        recorded = (query.float() * scale @ key.float().transpose(-1, -2) - lse[..., None]).exp()
        logits = query.cpu().double() * scale @ key.cpu().double().transpose(-1, -2)  # not every device has float64
        difference = (recorded.cpu().double() - logits.softmax(-1)).abs()
        error = float(difference.nan_to_num(nan=1.0, posinf=1.0).max())
    return Attention(device, dtype, shape, kernel, given is not None, same, error, same and error <= TOLERANCE)
