"""How far a norm is from its reference, in steps of the output's type.

`ulps` is the plain distance. Two sums of the same squares in another order differ by a few
float32 steps, which is more than one step of the output where terms cancel, where a value on
its way lies at a rounding tie, and in float32. `excess` measures from the interval of outcomes
that such noise in the normalized value allows. It judges no case and runs no kernel.
"""

from typing import Any

import torch
from torch import Tensor

FLOAT32_NOISE = 4 * 2.0**-23


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


def excess(
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
    """Ulps between `got` and the nearest outcome that float32 noise allows."""
    if got.numel() == 0:
        return 0.0
    if bool(torch.isnan(got).any()):
        return float("inf")
    h = x.double()
    summed = torch.zeros((), dtype=torch.float64)  # a mean is as exact as what it sums is large
    if center:
        summed = h.abs().mean(-1, keepdim=True)
        h = h - h.mean(-1, keepdim=True)
    scale = torch.rsqrt((h**2).mean(-1, keepdim=True) + eps)
    noise = FLOAT32_NOISE * (h.abs() + summed) * scale
    ends = [
        _position(_weigh(h * scale + end, weight, bias, rule).to(got.dtype))
        for end in (-noise, noise)
    ]
    ends.append(_position(want))
    low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    at = _position(got)
    return float(torch.maximum(low - at, at - high).clamp(min=0).max())


def _weigh(y: Tensor, weight: Tensor | None, bias: Tensor | None, rule: dict[str, Any]) -> Tensor:
    """The weight rule on exact values (float64), rounded where the rule rounds to 16 bits."""
    rounded = rule.get("norm_dtype") or torch.float32
    y = _round(y, rounded)
    if weight is not None:
        weighed = rule.get("weight_dtype") or weight.dtype
        factor = _round(weight.to(weighed).double() + rule.get("weight_offset", 0.0), weighed)
        rounded = torch.promote_types(rounded, weighed)
        y = _round(y * factor, rounded)
    if bias is not None:
        y = _round(y + bias.double(), torch.promote_types(rounded, bias.dtype))
    return y


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype == torch.float32 else values.to(dtype).double()
