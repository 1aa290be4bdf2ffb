"""x + residual and its RMS norm in one launch, x, residual and both outputs of any layout.

`sum_out` may be `residual` and `out` may be `x`: a program reads all of its rows before
it writes any of them. It keeps no statistics for a backward pass.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.checks import check_add_norm, check_add_norm_overlap
from fixpass.runtime.kernels.launch import Launch, lanes_of, parts, plan_rows, rounding, run_time
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.tile import normalize, tile_mask, tile_offsets, tile_rows, weigh


@triton.jit(do_not_specialize=run_time("x", "residual", "out", "sum_out"))
def add_norm_kernel(
    x_ptr,
    x_start,
    x_column,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride3,
    residual_ptr,
    residual_start,
    residual_column,
    residual_stride0,
    residual_stride1,
    residual_stride2,
    residual_stride3,
    out_ptr,
    out_start,
    out_column,
    out_stride0,
    out_stride1,
    out_stride2,
    out_stride3,
    sum_out_ptr,
    sum_out_start,
    sum_out_column,
    sum_out_stride0,
    sum_out_stride1,
    sum_out_stride2,
    sum_out_stride3,
    weight_ptr,
    bias_ptr,
    size0,
    size1,
    size2,
    num_rows,
    eps,
    X_UNIT: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    SUM_OUT_UNIT: tl.constexpr,
    DIMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE_UNIT: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
):
    sizes = (size0, size1, size2)
    x_at = (x_start, x_column, x_stride0, x_stride1, x_stride2, x_stride3)
    residual_at = (
        residual_start, residual_column,
        residual_stride0, residual_stride1, residual_stride2, residual_stride3,
    )  # fmt: skip
    sum_out_at = (
        sum_out_start, sum_out_column,
        sum_out_stride0, sum_out_stride1, sum_out_stride2, sum_out_stride3,
    )  # fmt: skip
    out_at = (out_start, out_column, out_stride0, out_stride1, out_stride2, out_stride3)
    rows, live = tile_rows(tl.program_id(0), num_rows, ROWS, SIZE_UNIT, WIDE_ROWS)
    mask = tile_mask(live, ROWS, BLOCK, HIDDEN, ROWS == 1)
    x_tile = x_ptr + tile_offsets(rows, x_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, X_UNIT)
    residual_tile = residual_ptr + tile_offsets(
        rows, residual_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, RESIDUAL_UNIT
    )
    h = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    h += tl.load(residual_tile, mask=mask, other=0.0).to(tl.float32)
    total = h.to(sum_out_ptr.dtype.element_ty)
    sum_tile = sum_out_ptr + tile_offsets(
        rows, sum_out_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, SUM_OUT_UNIT
    )
    tl.store(sum_tile, total, mask=mask)
    y = normalize(total.to(tl.float32), mask, eps, HIDDEN, False)
    y = weigh(y, weight_ptr, bias_ptr, mask, ROWS, BLOCK, NORM, WEIGHT, OFFSET, PRODUCT, SUM)
    out_tile = out_ptr + tile_offsets(rows, out_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, OUT_UNIT)
    tl.store(out_tile, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    sum_out: Tensor,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    outputs_are_new: bool = False,
) -> None:
    """Write `x + residual` into `sum_out` and its RMS norm into `out`."""
    options = (eps, weight_offset, norm_dtype, weight_dtype)
    LAUNCHES.run((x, residual, weight, bias, out, sum_out), options, outputs_are_new)


def _plan_launches(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sum_out: Tensor,
    eps: float,
    weight_offset: float,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> list[Launch]:
    check_add_norm(x, residual, weight, bias, out, sum_out, norm_dtype, weight_dtype)
    if x.numel() == 0:
        return []
    rule = rounding(weight, bias, weight_offset, norm_dtype, weight_dtype)
    lanes = lanes_of(x.device)
    return [
        plan_add_norm(rows, weight, bias, eps, rule, lanes=lanes)
        for rows in parts(x=x, residual=residual, out=out, sum_out=sum_out)
    ]


def plan_add_norm(
    rows: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rule: dict[str, object],
    *,
    lanes: int,
) -> Launch:
    """The launch for checked operands with at least one element."""
    return plan_rows(add_norm_kernel, rows, weight, bias, eps, rule, lanes=lanes)


OPERANDS = ("x", "residual", "weight", "bias", "out", "sum_out")
LAUNCHES = LaunchCache(add_norm_kernel, OPERANDS, _plan_launches, check_add_norm_overlap)
