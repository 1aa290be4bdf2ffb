"""RMS norm and layer norm of any layout: one read of each element, one write, no copy.

One kernel serves both; its body is tile.norm_tile. Layer norm subtracts the mean and takes the
variance of the centered values, held in registers. No statistics are kept for a backward pass.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.checks import check_rms_norm
from fixpass.runtime.kernels.launch import Launch, lanes_of, parts, plan_rows, rounding, run_time
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

    rule: bias, weight_offset, norm_dtype and weight_dtype, as in `run_norm`.
    """
    run_norm(x, weight, eps, out=out, center=False, **rule)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor, **rule: Any) -> None:
    """Write the layer norm of `x` over its last dimension into `out`, as `rms_norm` does."""
    run_norm(x, weight, eps, out=out, center=True, **rule)


def run_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    center: bool,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
) -> None:
    """Check the operands of a norm and launch it; `center` takes the mean away first."""
    check_rms_norm(
        x, weight, eps, out=out, bias=bias, norm_dtype=norm_dtype, weight_dtype=weight_dtype
    )
    if x.numel() == 0:
        return
    constants = rounding(weight, bias, weight_offset, norm_dtype, weight_dtype)
    for rows in parts(x=x, out=out):
        launch = plan_norm(
            rows, weight, bias, eps, constants, center=center, lanes=lanes_of(x.device)
        )
        launch.run()


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
