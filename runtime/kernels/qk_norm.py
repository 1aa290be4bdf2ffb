"""RMS norms of q and k in one launch, straight from a packed QKV tensor.

The first programs take rows of q, the rest rows of k; each side has its own layout, its
own weight and its own number of heads. v is not touched, and no rotary embedding is applied.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.checks import check_qk_norm, check_qk_norm_overlap
from fixpass.runtime.kernels.launch import (
    Launch,
    choose_for,
    dense_vector,
    lanes_of,
    num_programs,
    parts,
    place,
    rounding,
    row_arguments,
    run_time,
)
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.rms_norm import plan_launches
from fixpass.runtime.kernels.tile import norm_tile

SIDE_SIZES = ("size0", "size1", "size2", "num_rows")
RUN_TIME = [
    *run_time("q", "q_out", "k", "k_out"),
    *(f"{side}_{name}" for side in "qk" for name in SIDE_SIZES),
    "q_programs",
]


@triton.jit(do_not_specialize=RUN_TIME)
def qk_norm_kernel(
    q_ptr,
    q_start,
    q_column,
    q_stride0,
    q_stride1,
    q_stride2,
    q_stride3,
    q_out_ptr,
    q_out_start,
    q_out_column,
    q_out_stride0,
    q_out_stride1,
    q_out_stride2,
    q_out_stride3,
    q_weight_ptr,
    q_size0,
    q_size1,
    q_size2,
    q_num_rows,
    k_ptr,
    k_start,
    k_column,
    k_stride0,
    k_stride1,
    k_stride2,
    k_stride3,
    k_out_ptr,
    k_out_start,
    k_out_column,
    k_out_stride0,
    k_out_stride1,
    k_out_stride2,
    k_out_stride3,
    k_weight_ptr,
    k_size0,
    k_size1,
    k_size2,
    k_num_rows,
    q_programs,
    eps,
    Q_UNIT: tl.constexpr,
    Q_OUT_UNIT: tl.constexpr,
    Q_DIMS: tl.constexpr,
    Q_VECTOR: tl.constexpr,
    Q_SIZE_UNIT: tl.constexpr,
    Q_WIDE_ROWS: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_OUT_UNIT: tl.constexpr,
    K_DIMS: tl.constexpr,
    K_VECTOR: tl.constexpr,
    K_SIZE_UNIT: tl.constexpr,
    K_WIDE_ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_programs:
        norm_tile(
            program,
            q_ptr, (q_start, q_column, q_stride0, q_stride1, q_stride2, q_stride3),
            q_out_ptr,
            (
                q_out_start, q_out_column,
                q_out_stride0, q_out_stride1, q_out_stride2, q_out_stride3,
            ),
            q_weight_ptr, None, (q_size0, q_size1, q_size2), q_num_rows, eps,
            Q_UNIT, Q_OUT_UNIT, Q_DIMS, HIDDEN, ROWS, BLOCK, Q_VECTOR, Q_SIZE_UNIT,
            Q_WIDE_ROWS, False, NORM, WEIGHT, OFFSET, PRODUCT, SUM,
        )  # fmt: skip
    else:
        norm_tile(
            program - q_programs,
            k_ptr, (k_start, k_column, k_stride0, k_stride1, k_stride2, k_stride3),
            k_out_ptr,
            (
                k_out_start, k_out_column,
                k_out_stride0, k_out_stride1, k_out_stride2, k_out_stride3,
            ),
            k_weight_ptr, None, (k_size0, k_size1, k_size2), k_num_rows, eps,
            K_UNIT, K_OUT_UNIT, K_DIMS, HIDDEN, ROWS, BLOCK, K_VECTOR, K_SIZE_UNIT,
            K_WIDE_ROWS, False, NORM, WEIGHT, OFFSET, PRODUCT, SUM,
        )  # fmt: skip


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *,
    q_out: Tensor,
    k_out: Tensor,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    outputs_are_new: bool = False,
) -> None:
    """Write the RMS norms of `q` and `k` over their last dimension into `q_out` and `k_out`."""
    options = (eps, weight_offset, norm_dtype, weight_dtype)
    LAUNCHES.run((q, k, q_weight, k_weight, q_out, k_out), options, outputs_are_new)


def _plan_launches(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    *options: Any,
) -> list[Launch]:
    """One launch; several where a side is empty or `parts` cuts it."""
    eps, weight_offset, norm_dtype, weight_dtype = options
    check_qk_norm(q, k, q_weight, k_weight, q_out, k_out, norm_dtype, weight_dtype)
    if q.numel() == 0 or k.numel() == 0 or _in_parts(q, q_out) or _in_parts(k, k_out):
        return [
            *plan_launches(q, q_weight, None, q_out, *options, center=False),
            *plan_launches(k, k_weight, None, k_out, *options, center=False),
        ]
    constants = rounding(q_weight, None, weight_offset, norm_dtype, weight_dtype)
    sides = {"q": (q, q_weight, q_out), "k": (k, k_weight, k_out)}
    return [plan_qk_norm(sides, eps, constants, lanes=lanes_of(q.device))]


def _in_parts(tensor: Tensor, out: Tensor) -> bool:
    return next(parts(tensor=tensor, out=out))["tensor"] is not tensor


def plan_qk_norm(
    sides: Mapping[str, tuple[Tensor, Tensor | None, Tensor]],
    eps: float,
    rule: dict[str, Any],
    *,
    lanes: int,
) -> Launch:
    """The launch for checked operands with at least one element; q's size makes the choice."""
    arguments: dict[str, Any] = {"eps": eps, **rule}
    placed = {
        side: place(**{side: tensor, f"{side}_out": out})
        for side, (tensor, _, out) in sides.items()
    }
    choice = choose_for(placed["q"][0], sides["q"][0].element_size(), lanes)
    programs = {}
    for side, (_, weight, _) in sides.items():
        geometry, integers_and_pointers = placed[side]
        told = row_arguments(geometry, choice)
        for shared in ("HIDDEN", "ROWS", "BLOCK"):
            arguments[shared] = told.pop(shared)
        prefixed = {
            f"{side.upper() if name.isupper() else side}_{name}": v for name, v in told.items()
        }
        arguments |= {**integers_and_pointers, **prefixed}
        arguments[f"{side}_weight_ptr"] = dense_vector(weight)
        programs[side] = num_programs(geometry, choice)
    arguments["q_programs"] = programs["q"]
    grid = (sum(programs.values()),)
    return Launch(qk_norm_kernel, grid, arguments, choice.num_warps, sides["q"][0].device)


OPERANDS = ("q", "k", "q_weight", "k_weight", "q_out", "k_out")
LAUNCHES = LaunchCache(qk_norm_kernel, OPERANDS, _plan_launches, check_qk_norm_overlap)
