"""How far a norm is from its reference, in steps of the types it was rounded to.

`ulps` is the plain distance in the output's type. Where terms cancel (a product and a bias, a
value and its mean) one step of an earlier rounding is many of those, though no kernel and no
reference could do better; `steps` measures in the coarsest rounding on the way. It judges no
case and runs no kernel.
"""

from typing import Any

import torch
from torch import Tensor

# Two sums of the same squares in another order differ by this much, in relative terms.
FLOAT32_NOISE = 4 * 2.0**-23
MANTISSA = {torch.bfloat16: (7, -133), torch.float16: (10, -24), torch.float32: (23, -149)}


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest distance, in steps between neighbours of this dtype; NaN is infinitely far."""
    if got.numel() == 0:
        return 0.0
    if bool(torch.isnan(got).any()):
        return float("inf")
    return float((_position(got) - _position(want)).abs().max())


def _position(x: Tensor) -> Tensor:
    """Where each value stands among the ordered values of its dtype."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    bits = x.contiguous().view(integer).to(torch.int64)
    magnitude = bits & (2 ** (8 * x.element_size() - 1) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def steps(
    got: Tensor,
    want: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rule: dict[str, Any],
    *,
    center: bool,
    eps: float,
) -> float:
    """The largest distance over one step of the coarsest rounding between x and `want`."""
    if got.numel() == 0:
        return 0.0
    h = x.double()
    mean = h.mean(-1, keepdim=True) if center else torch.zeros((), dtype=torch.float64)
    scale = torch.rsqrt(((h - mean) ** 2).mean(-1, keepdim=True) + eps)
    summed = h.abs().mean(-1, keepdim=True) if center else mean  # what the mean is exact to
    normed = (h.abs() + summed) * scale
    factor = torch.ones((), dtype=torch.float64)
    if weight is not None:
        factor = (weight.double() + rule.get("weight_offset", 0.0)).abs()
    added = torch.zeros((), dtype=torch.float64) if bias is None else bias.double().abs()
    noise = FLOAT32_NOISE * (normed * factor + added)
    step = torch.maximum(spacing(want.double(), want.dtype), noise)
    rounded = rule.get("norm_dtype") or torch.float32
    if rounded != torch.float32:
        step = torch.maximum(step, spacing(normed, rounded) * factor)
    if bias is not None and weight is not None:
        product = torch.promote_types(rounded, rule.get("weight_dtype") or weight.dtype)
        step = torch.maximum(step, spacing(normed * factor, product))
    distance = (got.double() - want.double()).abs() / step
    return float(torch.nan_to_num(distance, nan=float("inf")).max())


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The gap between neighbours of `dtype` around each of `values` (float64)."""
    bits, least = MANTISSA[dtype]
    exponent = torch.frexp(values.abs()).exponent - 1
    return torch.ldexp(torch.ones_like(values), (exponent - bits).clamp(min=least))
