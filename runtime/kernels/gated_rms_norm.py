"""RMS norm with a gate in one launch, x, gate and result of any layout.

Norm then gate, or gate then norm; silu or sigmoid; over rows or over groups of a row. The kernel
treats each group as a row. So the weight is expanded to the shape of x, with strides of 0.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.gated_norm import Gating
from fixpass.runtime.kernels.checks import check_gated_norm, check_gated_norm_overlap
from fixpass.runtime.kernels.launch import (
    TRITON_DTYPES,
    Launch,
    lanes_of,
    parts,
    placement_names,
    plan_rows,
    rounding,
    run_time,
)
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.tile import normalize, tile_mask, tile_offsets, tile_rows, weigh_by


@triton.jit
def activate(gate, IS_SILU: tl.constexpr):
    """silu or sigmoid of float32 values, divided as PyTorch divides."""
    exponential = tl.exp(-gate)
    if IS_SILU:
        return tl.math.div_rn(gate, 1.0 + exponential)
    return tl.math.div_rn(tl.full(gate.shape, 1.0, tl.float32), 1.0 + exponential)


@triton.jit(do_not_specialize=run_time("x", "gate", "gain", "out"))
def gated_norm_kernel(
    x_ptr,
    x_start,
    x_column,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride3,
    gate_ptr,
    gate_start,
    gate_column,
    gate_stride0,
    gate_stride1,
    gate_stride2,
    gate_stride3,
    gain_ptr,
    gain_start,
    gain_column,
    gain_stride0,
    gain_stride1,
    gain_stride2,
    gain_stride3,
    out_ptr,
    out_start,
    out_column,
    out_stride0,
    out_stride1,
    out_stride2,
    out_stride3,
    size0,
    size1,
    size2,
    num_rows,
    eps,
    X_UNIT: tl.constexpr,
    GATE_UNIT: tl.constexpr,
    GAIN_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
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
    IS_SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
):
    sizes = (size0, size1, size2)
    x_at = (x_start, x_column, x_stride0, x_stride1, x_stride2, x_stride3)
    gate_at = (gate_start, gate_column, gate_stride0, gate_stride1, gate_stride2, gate_stride3)
    out_at = (out_start, out_column, out_stride0, out_stride1, out_stride2, out_stride3)
    rows, live = tile_rows(tl.program_id(0), num_rows, ROWS, SIZE_UNIT, WIDE_ROWS)
    mask = tile_mask(live, ROWS, BLOCK, HIDDEN, ROWS == 1)
    x_tile = x_ptr + tile_offsets(rows, x_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, X_UNIT)
    gate_tile = gate_ptr + tile_offsets(
        rows, gate_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, GATE_UNIT
    )
    h = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    gate = activate(tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32), IS_SILU)
    gate = gate.to(GATE).to(tl.float32)
    if GATE_FIRST:
        h = (h * gate).to(GATED).to(tl.float32)
    y = normalize(h, mask, eps, HIDDEN, False).to(NORM)
    if gain_ptr is not None:
        gain_at = (gain_start, gain_column, gain_stride0, gain_stride1, gain_stride2, gain_stride3)
        gain_tile = gain_ptr + tile_offsets(
            rows, gain_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, GAIN_UNIT
        )
        y = weigh_by(y, tl.load(gain_tile, mask=mask, other=0.0), WEIGHT, OFFSET, PRODUCT)
    if not GATE_FIRST:
        y = (y.to(NORMED).to(tl.float32) * gate).to(GATED)
    out_tile = out_ptr + tile_offsets(rows, out_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, OUT_UNIT)
    tl.store(out_tile, y.to(out_ptr.dtype.element_ty), mask=mask)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    gating: Gating,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    outputs_are_new: bool = False,
) -> None:
    """Write the gated RMS norm of x into `out`; x, gate and out have one shape."""
    options = (eps, weight_offset, norm_dtype, weight_dtype, gating)
    LAUNCHES.run((x, gate, weight, out), options, outputs_are_new)


def _plan_launches(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    out: Tensor,
    eps: float,
    weight_offset: float,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    gating: Gating,
) -> list[Launch]:
    check_gated_norm(x, gate, weight, out, gating, norm_dtype, weight_dtype)
    if x.numel() == 0:
        return []
    rule = rounding(weight, None, weight_offset, norm_dtype, weight_dtype)
    constants = {**rule, **gating_constants(gating, x.dtype)}
    rows = gated_rows(x, gate, weight, out, gating.group_size)
    lanes = lanes_of(x.device)
    return [plan_gated_norm(part, eps, constants, lanes=lanes) for part in parts(**rows)]


def gated_rows(
    x: Tensor, gate: Tensor, weight: Tensor | None, out: Tensor, group_size: int
) -> dict[str, Tensor]:
    """The operands by name, each in rows of one group; the weight has x's shape."""
    rows = {"x": x, "gate": gate, "out": out}
    if weight is not None:
        rows["gain"] = weight.expand(x.shape)
    if not group_size:
        return rows
    return {name: tensor.unflatten(-1, (-1, group_size)) for name, tensor in rows.items()}


def plan_gated_norm(
    rows: dict[str, Tensor], eps: float, constants: dict[str, Any], *, lanes: int
) -> Launch:
    """The launch for checked operands with at least one element."""
    launch = plan_rows(gated_norm_kernel, rows, None, None, eps, constants, lanes=lanes)
    arguments = launch.arguments
    if "gain" not in rows:
        arguments |= {"gain_ptr": None, "GAIN_UNIT": 0, **dict.fromkeys(placement_names("gain"), 0)}
    for name in ("weight_ptr", "bias_ptr", "SUM"):
        del arguments[name]
    return launch


def gating_constants(gating: Gating, x_dtype: torch.dtype) -> dict[str, Any]:
    """The constants of the kernel: the activation, its place, and what each step rounds to."""
    normed = gating.normed_dtype or x_dtype
    gated = x_dtype if gating.gate_first else normed
    return {
        "IS_SILU": gating.activation == "silu",
        "GATE_FIRST": gating.gate_first,
        "GATE": TRITON_DTYPES[gating.rounded_gate],
        "GATED": TRITON_DTYPES[torch.promote_types(gated, gating.rounded_gate)],
        "NORMED": TRITON_DTYPES[normed],
    }


OPERANDS = ("x", "gate", "gain", "out")
LAUNCHES = LaunchCache(gated_norm_kernel, OPERANDS, _plan_launches, check_gated_norm_overlap)
