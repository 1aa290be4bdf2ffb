"""Calls of vLLM's norms with quantised output, for the kernel names of the contract table.

They allocate what the op writes and check no layout: see `fixpass.runtime.providers`.
"""

from typing import Any

import torch
from torch import Tensor


def static(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: None,
    scale: Tensor,
    eps: float,
    *,
    quant_dtype: torch.dtype,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fixpass::rms_norm_quant` with a given scale."""
    out, nothing = torch.empty_like(x, dtype=quant_dtype), x.new_empty(0)
    if residual is None:
        torch.ops._C.rms_norm_static_fp8_quant(out, x, weight, scale, eps)
        return out, nothing.float(), nothing
    total = residual.clone(memory_format=torch.contiguous_format)
    torch.ops._C.fused_add_rms_norm_static_fp8_quant(out, x, total, weight, scale, eps)
    return out, nothing.float(), total


def dynamic(
    x: Tensor,
    residual: None,
    weight: Tensor,
    bias: None,
    scale: None,
    eps: float,
    *,
    quant_dtype: torch.dtype,
    group_size: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fixpass::rms_norm_quant` with a scale for each row or group of a row of 2-D x."""
    out = torch.empty_like(x, dtype=quant_dtype)
    groups = x.shape[-1] // group_size if group_size else 1
    scales = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    if group_size:
        torch.ops._C.rms_norm_per_block_quant(
            out, x, weight, scales, eps, None, None, group_size, False
        )
    else:
        torch.ops._C.rms_norm_dynamic_per_token_quant(out, x, weight, scales, eps, None, None)
    return out, scales, x.new_empty(0)
