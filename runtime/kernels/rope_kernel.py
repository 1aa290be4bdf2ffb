"""RMS norms of q and k and their rotation (RoPE) in one launch, straight from a packed QKV tensor.

The first programs take rows of q, the rest rows of k. Each side has its own layout, weight and
number of heads; both read the same cos and sin. A program reads each value of q and k once and
writes it once. v is not touched.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl

from fixpass.runtime.kernels.launch import run_time
from fixpass.runtime.kernels.rope_tile import norm_rope_tile

SIDE_SIZES = ("size0", "size1", "size2", "num_rows")
PLACED = ("", "_out", "_cos", "_sin")
RUN_TIME = [
    *run_time(*(f"{side}{name}" for side in "qk" for name in PLACED)),
    *(f"{side}_{name}" for side in "qk" for name in SIDE_SIZES),
    "q_programs",
]


@triton.jit(do_not_specialize=RUN_TIME)
def qk_norm_rope_kernel(
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
    q_cos_start,
    q_cos_column,
    q_cos_stride0,
    q_cos_stride1,
    q_cos_stride2,
    q_cos_stride3,
    q_sin_start,
    q_sin_column,
    q_sin_stride0,
    q_sin_stride1,
    q_sin_stride2,
    q_sin_stride3,
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
    k_cos_start,
    k_cos_column,
    k_cos_stride0,
    k_cos_stride1,
    k_cos_stride2,
    k_cos_stride3,
    k_sin_start,
    k_sin_column,
    k_sin_stride0,
    k_sin_stride1,
    k_sin_stride2,
    k_sin_stride3,
    k_weight_ptr,
    k_size0,
    k_size1,
    k_size2,
    k_num_rows,
    cos_ptr,
    sin_ptr,
    q_programs,
    eps,
    Q_UNIT: tl.constexpr,
    Q_OUT_UNIT: tl.constexpr,
    Q_COS_UNIT: tl.constexpr,
    Q_SIN_UNIT: tl.constexpr,
    Q_DIMS: tl.constexpr,
    Q_VECTOR: tl.constexpr,
    Q_SIZE_UNIT: tl.constexpr,
    Q_WIDE_ROWS: tl.constexpr,
    Q_ROWS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    Q_BLOCK_HEADS: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_OUT_UNIT: tl.constexpr,
    K_COS_UNIT: tl.constexpr,
    K_SIN_UNIT: tl.constexpr,
    K_DIMS: tl.constexpr,
    K_VECTOR: tl.constexpr,
    K_SIZE_UNIT: tl.constexpr,
    K_WIDE_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K_BLOCK_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_TABLE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PRODUCT: tl.constexpr,
    NORMED: tl.constexpr,
    OPERAND: tl.constexpr,
    ROTATED: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_programs:
        norm_rope_tile(
            program,
            q_ptr, (q_start, q_column, q_stride0, q_stride1, q_stride2, q_stride3),
            q_out_ptr,
            (
                q_out_start, q_out_column,
                q_out_stride0, q_out_stride1, q_out_stride2, q_out_stride3,
            ),
            cos_ptr,
            (
                q_cos_start, q_cos_column,
                q_cos_stride0, q_cos_stride1, q_cos_stride2, q_cos_stride3,
            ),
            sin_ptr,
            (
                q_sin_start, q_sin_column,
                q_sin_stride0, q_sin_stride1, q_sin_stride2, q_sin_stride3,
            ),
            q_weight_ptr, (q_size0, q_size1, q_size2), q_num_rows, eps,
            Q_UNIT, Q_OUT_UNIT, Q_COS_UNIT, Q_SIN_UNIT, Q_DIMS, Q_VECTOR, Q_SIZE_UNIT,
            Q_WIDE_ROWS, Q_ROWS, Q_HEADS, Q_BLOCK_HEADS, HEAD, HALF, BLOCK, REST, BLOCK_REST,
            INTERLEAVED, FULL_TABLE, NORM, WEIGHT, OFFSET, PRODUCT, NORMED, OPERAND, ROTATED,
        )  # fmt: skip
    else:
        norm_rope_tile(
            program - q_programs,
            k_ptr, (k_start, k_column, k_stride0, k_stride1, k_stride2, k_stride3),
            k_out_ptr,
            (
                k_out_start, k_out_column,
                k_out_stride0, k_out_stride1, k_out_stride2, k_out_stride3,
            ),
            cos_ptr,
            (
                k_cos_start, k_cos_column,
                k_cos_stride0, k_cos_stride1, k_cos_stride2, k_cos_stride3,
            ),
            sin_ptr,
            (
                k_sin_start, k_sin_column,
                k_sin_stride0, k_sin_stride1, k_sin_stride2, k_sin_stride3,
            ),
            k_weight_ptr, (k_size0, k_size1, k_size2), k_num_rows, eps,
            K_UNIT, K_OUT_UNIT, K_COS_UNIT, K_SIN_UNIT, K_DIMS, K_VECTOR, K_SIZE_UNIT,
            K_WIDE_ROWS, K_ROWS, K_HEADS, K_BLOCK_HEADS, HEAD, HALF, BLOCK, REST, BLOCK_REST,
            INTERLEAVED, FULL_TABLE, NORM, WEIGHT, OFFSET, PRODUCT, NORMED, OPERAND, ROTATED,
        )  # fmt: skip
