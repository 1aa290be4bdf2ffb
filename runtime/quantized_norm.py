"""The meaning of `fixpass::rms_norm_quant`, written in PyTorch: an RMS norm, then its quantisation.

These functions are the truth, as in `fixpass.runtime.norms`: kernels are compared with them, and
Inductor compiles them. They choose no kernel and read no layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime import norms

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
QUANTIZED = (*FP8, torch.int8)
"""The dtypes of codes."""
APPLY = ("divide", "reciprocal", "multiply")
"""How a scale is applied: y / scale, y * (1 / scale), or y * scale."""


@dataclass(frozen=True)
class Quantization:
    """How float values become codes and scales. Each field is one step, in this order.

    A given scale is used as it is. Else each group of `group_size` values of a row gets a scale
    of its own: `scale = max(max(amax, amax_min).to(scale_dtype) / limit, scale_min)`, in float32
    after the division. The values are scaled in float32. int8 rounds half to even. Values outside
    `low` to `high` are clamped.
    """

    quant_dtype: torch.dtype
    low: float
    high: float
    apply: str
    group_size: int = 0
    """The values that share a scale; 0 means the whole row."""
    amax_dtype: torch.dtype | None = None
    """The dtype in which the largest magnitude is taken; None means that of the norm. Every dtype
    gives the same number; Inductor rounds to it where it leaves out other roundings."""
    limit: float = 1.0
    amax_min: float = 0.0
    scale_min: float = 0.0
    scale_dtype: torch.dtype | None = None
    """The dtype of the division by `limit`; None means float32."""


def quantize(y: Tensor, scale: Tensor | None, steps: Quantization) -> tuple[Tensor, Tensor]:
    """Return the codes of y (..., hidden_size), and the scales (..., number of groups) in float32.

    The scales are empty where `scale` is given.
    """
    values = y.to(torch.float32)
    if scale is not None:
        return _codes(values, scale, steps), values.new_empty(0)
    rows = y
    if steps.group_size:
        rows = rows.unflatten(-1, (-1, steps.group_size))
        values = values.unflatten(-1, (-1, steps.group_size))
    amax = rows.abs().to(steps.amax_dtype or y.dtype).amax(-1, keepdim=True).to(torch.float32)
    if steps.amax_min:
        amax = amax.clamp_min(steps.amax_min)
    scales = amax
    if steps.scale_dtype is not None:
        scales = scales.to(steps.scale_dtype)
    scales = (scales / steps.limit).to(torch.float32)
    if steps.scale_min:
        scales = scales.clamp_min(steps.scale_min)
    codes = _codes(values, scales, steps)
    if steps.group_size:
        return codes.flatten(-2), scales.squeeze(-1)
    return codes, scales


def _codes(values: Tensor, scale: Tensor, steps: Quantization) -> Tensor:
    if steps.apply == "divide":
        scaled = values / scale
    else:
        scaled = values * (scale.reciprocal() if steps.apply == "reciprocal" else scale)
    if steps.quant_dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(steps.low, steps.high).to(steps.quant_dtype)


def rms_norm_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    **steps: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes and scales of rms_norm(x), or of rms_norm(x + residual), and that sum.

    scale: one float32 number for all rows; None gives each row or group a scale of its own. The
    scales are empty where `scale` is given, and the sum where there is no residual.
    """
    quantization, norm_steps = norms.split_steps(Quantization, steps)
    total = x.new_empty(0) if residual is None else norms.with_order(x + residual, None)
    rows = x if residual is None else total
    y = norms.rms_norm(rows, eps, norms.Affine(weight, bias, **norm_steps))
    return *quantize(y, scale, quantization), total


def empty_results(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    **steps: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of `rms_norm_quant`: for kernels to fill, and with fake operands."""
    quantization, _ = norms.split_steps(Quantization, steps)
    codes = x.new_empty(x.shape, dtype=quantization.quant_dtype)
    groups = x.shape[-1] // quantization.group_size if quantization.group_size else 1
    shape = (*x.shape[:-1], groups) if scale is None else (0,)
    scales = x.new_empty(shape, dtype=torch.float32)
    if residual is None:
        return codes, scales, x.new_empty(0)
    return codes, scales, x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
