"""RMS norm with quantised output in one launch, alone or behind the residual add, of any layout.

A program holds its rows in registers: it reads x and the residual once, and writes the sum, the
codes and the scales once. It keeps no statistics for a backward pass.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.checks import (
    check_norm_quant,
    check_norm_quant_overlap,
    check_rounding,
)
from fixpass.runtime.kernels.launch import (
    Launch,
    lanes_of,
    native_formats,
    parts,
    placement_names,
    plan_rows,
    quantization_constants,
    rounding,
    run_time,
)
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.quantize_tile import apply_scale, encode, larger, scale_of
from fixpass.runtime.kernels.row_geometry import MAX_VECTOR, describe
from fixpass.runtime.kernels.tile import (
    normalize,
    row_offsets,
    tile_mask,
    tile_offsets,
    tile_rows,
    weigh,
)
from fixpass.runtime.quantized_norm import Quantization


@triton.jit(do_not_specialize=run_time("x", "residual", "out", "sum_out", "scales"))
def norm_quant_kernel(
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
    scales_ptr,
    scales_start,
    scales_column,
    scales_stride0,
    scales_stride1,
    scales_stride2,
    scales_stride3,
    scale_ptr,
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
    NORMED: tl.constexpr,
    GROUP: tl.constexpr,
    LIMIT: tl.constexpr,
    AMAX_MIN: tl.constexpr,
    SCALE_MIN: tl.constexpr,
    SCALE: tl.constexpr,
    APPLY: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CODE: tl.constexpr,
    IS_NATIVE: tl.constexpr,
):
    sizes = (size0, size1, size2)
    x_at = (x_start, x_column, x_stride0, x_stride1, x_stride2, x_stride3)
    out_at = (out_start, out_column, out_stride0, out_stride1, out_stride2, out_stride3)
    rows, live = tile_rows(tl.program_id(0), num_rows, ROWS, SIZE_UNIT, WIDE_ROWS)
    mask = tile_mask(live, ROWS, BLOCK, HIDDEN, ROWS == 1)
    x_tile = x_ptr + tile_offsets(rows, x_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, X_UNIT)
    h = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_at = (
            residual_start, residual_column,
            residual_stride0, residual_stride1, residual_stride2, residual_stride3,
        )  # fmt: skip
        sum_out_at = (
            sum_out_start, sum_out_column,
            sum_out_stride0, sum_out_stride1, sum_out_stride2, sum_out_stride3,
        )  # fmt: skip
        residual_tile = residual_ptr + tile_offsets(
            rows, residual_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, RESIDUAL_UNIT
        )
        h += tl.load(residual_tile, mask=mask, other=0.0).to(tl.float32)
        total = h.to(sum_out_ptr.dtype.element_ty)
        sum_tile = sum_out_ptr + tile_offsets(
            rows, sum_out_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, SUM_OUT_UNIT
        )
        tl.store(sum_tile, total, mask=mask)
        h = total.to(tl.float32)
    y = normalize(h, mask, eps, HIDDEN, False)
    y = weigh(y, weight_ptr, bias_ptr, mask, ROWS, BLOCK, NORM, WEIGHT, OFFSET, PRODUCT, SUM)
    y = y.to(NORMED).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.broadcast_to(tl.load(scale_ptr)[None, None], [ROWS, BLOCK])
        y = apply_scale(y, scale, APPLY)
    else:
        GROUPS: tl.constexpr = BLOCK // GROUP
        grouped = tl.reshape(y, [ROWS, GROUPS, GROUP])
        amax = tl.reduce(tl.abs(grouped), 2, larger)
        scales = scale_of(amax, LIMIT, AMAX_MIN, SCALE_MIN, SCALE)
        scales_at = (
            scales_start, scales_column,
            scales_stride0, scales_stride1, scales_stride2, scales_stride3,
        )  # fmt: skip
        columns = tl.arange(0, GROUPS)
        scales_tile = row_offsets(rows, scales_at, sizes, DIMS, 1, SIZE_UNIT, 0)[:, None]
        scales_tile += columns.to(tl.int64)[None, :] * scales_column.to(tl.int64)
        exists = live[:, None] & (columns * GROUP < HIDDEN)[None, :]
        tl.store(scales_ptr + scales_tile, scales, mask=exists)
        spread = tl.broadcast_to(scales[:, :, None], [ROWS, GROUPS, GROUP])
        y = tl.reshape(apply_scale(grouped, spread, APPLY), [ROWS, BLOCK])
    out_tile = out_ptr + tile_offsets(rows, out_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, OUT_UNIT)
    tl.store(out_tile, encode(y, LOW, HIGH, CODE, IS_NATIVE), mask=mask)


def rms_norm_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    sum_out: Tensor | None,
    scales: Tensor | None,
    quantization: Quantization,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    outputs_are_new: bool = False,
) -> None:
    """Write the codes of the RMS norm of x, or of x + residual, into `out`.

    The sum goes into `sum_out` where there is a residual, and the scales into `scales` where
    `scale` is None. out_dtype: what the norm is rounded to before it is quantised; None means the
    dtype of x + residual.
    """
    options = (eps, weight_offset, norm_dtype, weight_dtype, out_dtype, quantization)
    if out.dtype != quantization.quant_dtype:
        raise ValueError(f"out {describe(out)}: want {quantization.quant_dtype}")
    operands = (x, residual, weight, bias, scale, out.view(torch.uint8), sum_out, scales)
    LAUNCHES.run(operands, options, outputs_are_new)


def _plan_launches(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    sum_out: Tensor | None,
    scales: Tensor | None,
    eps: float,
    weight_offset: float,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    quantization: Quantization,
) -> list[Launch]:
    check_norm_quant(x, residual, weight, bias, scale, out, sum_out, scales, quantization)
    check_rounding(norm_dtype, weight_dtype, out_dtype)
    if x.numel() == 0:
        return []
    normed = out_dtype or (x if sum_out is None else sum_out).dtype
    constants = {
        **rounding(weight, bias, weight_offset, norm_dtype, weight_dtype),
        **quantization_constants(quantization, normed, native_formats(x.device)),
    }
    tensors = {"x": x, "residual": residual, "out": out, "sum_out": sum_out, "scales": scales}
    lanes = lanes_of(x.device)
    return [
        plan_norm_quant(rows, weight, bias, scale, eps, constants, lanes=lanes)
        for rows in parts(**{name: t for name, t in tensors.items() if t is not None})
    ]


def plan_norm_quant(
    rows: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    constants: dict[str, Any],
    *,
    lanes: int,
) -> Launch:
    """The launch for checked operands with at least one element."""
    scales = rows.get("scales")
    if scales is not None:
        rows = {**rows, "scales": _row_starts(scales, rows["x"])}
    absent = [name for name in ("residual", "sum_out", "scales") if name not in rows]
    left_out: dict[str, Any] = {f"{name}_ptr": None for name in absent}
    left_out |= {each: 0 for name in absent for each in placement_names(name)}
    left_out |= {f"{name.upper()}_UNIT": 0 for name in absent}
    launch = plan_rows(norm_quant_kernel, rows, weight, bias, eps, constants, lanes=lanes)
    arguments = launch.arguments
    arguments |= {**left_out, "scale_ptr": scale}
    arguments["GROUP"] = arguments["GROUP"] or arguments["BLOCK"]
    del arguments["SCALES_UNIT"]
    if scales is not None:
        arguments |= {"scales_ptr": scales, "scales_column": scales.stride(-1)}
        for name in placement_names("scales")[2:]:
            arguments[name] = arguments[name] * arguments["VECTOR"] // MAX_VECTOR
    return launch


def _row_starts(scales: Tensor, x: Tensor) -> Tensor:
    """Rows as long as x's, in place of the scales of each row, for the geometry alone.

    Their strides are multiples of MAX_VECTOR, so that scales do not narrow the loads of x.
    """
    strides = [stride * MAX_VECTOR for stride in scales.stride()[:-1]]
    return torch.empty_strided(x.shape, (*strides, 1), dtype=scales.dtype, device="meta")


OPERANDS = ("x", "residual", "weight", "bias", "scale", "out", "sum_out", "scales")
LAUNCHES = LaunchCache(norm_quant_kernel, OPERANDS, _plan_launches, check_norm_quant_overlap)
