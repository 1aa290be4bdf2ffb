"""RMS norm and layer norm of any layout: one read of each element, one write, no copy.

One kernel serves both; its body is tile.norm_tile. Layer norm subtracts the mean and takes the
variance of the centered values, held in registers. No statistics are kept for a backward pass.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.checks import check_norm, check_norm_overlap
from fixpass.runtime.kernels.launch import Launch, lanes_of, parts, plan_rows, rounding, run_time
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.tile import norm_tile


@triton.jit(do_not_specialize=run_time("x", "out"))
def norm_kernel(
    x_ptr,
    x_start,
    x_column,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride3,
    out_ptr,
    out_start,
    out_column,
    out_stride0,
    out_stride1,
    out_stride2,
    out_stride3,
    weight_ptr,
    bias_ptr,
    size0,
    size1,
    size2,
    num_rows,
    eps,
    X_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    DIMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE_UNIT: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    CENTER: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
):
    norm_tile(
        tl.program_id(0),
        x_ptr, (x_start, x_column, x_stride0, x_stride1, x_stride2, x_stride3),
        out_ptr, (out_start, out_column, out_stride0, out_stride1, out_stride2, out_stride3),
        weight_ptr, bias_ptr, (size0, size1, size2), num_rows, eps,
        X_UNIT, OUT_UNIT, DIMS, HIDDEN, ROWS, BLOCK, VECTOR, SIZE_UNIT, WIDE_ROWS, CENTER,
        NORM, WEIGHT, OFFSET, PRODUCT, SUM,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor, **rule: Any) -> None:
    """Write the RMS norm of `x` over its last dimension into `out`, both of any strides.

    rule: bias, weight_offset, norm_dtype, weight_dtype and outputs_are_new, as in `run_norm`.
    """
    run_norm(LAUNCHES, x, weight, eps, out=out, **rule)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor, **rule: Any) -> None:
    """Write the layer norm of `x` over its last dimension into `out`, as `rms_norm` does."""
    run_norm(LAYER_LAUNCHES, x, weight, eps, out=out, **rule)


def run_norm(
    launches: LaunchCache,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    outputs_are_new: bool = False,
) -> None:
    """Check the operands of a norm and launch it; a signature that was seen is not planned again.

    outputs_are_new: the caller has just allocated `out`, which then overlaps nothing.
    """
    options = (eps, weight_offset, norm_dtype, weight_dtype)
    launches.run((x, weight, bias, out), options, outputs_are_new)


def plan_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    weight_offset: float,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    *,
    center: bool,
) -> list[Launch]:
    """Check the operands; one launch, several where `parts` cuts them, none without elements."""
    check_norm(x, weight, bias, out, norm_dtype, weight_dtype)
    if x.numel() == 0:
        return []
    rule = rounding(weight, bias, weight_offset, norm_dtype, weight_dtype)
    lanes = lanes_of(x.device)
    return [
        plan_norm(rows, weight, bias, eps, rule, center=center, lanes=lanes)
        for rows in parts(x=x, out=out)
    ]


def plan_norm(
    rows: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rule: dict[str, object],
    *,
    center: bool,
    lanes: int,
) -> Launch:
    """The launch of a norm of checked operands with at least one element."""
    constants = {**rule, "CENTER": center}
    return plan_rows(norm_kernel, rows, weight, bias, eps, constants, lanes=lanes)


OPERANDS = ("x", "weight", "bias", "out")
LAUNCHES, LAYER_LAUNCHES = (
    LaunchCache(norm_kernel, OPERANDS, partial(plan_launches, center=center), check_norm_overlap)
    for center in (False, True)
)
