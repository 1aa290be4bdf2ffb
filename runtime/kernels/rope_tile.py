"""Steps of the kernel that normalises and rotates heads: the two values of each pair, as two tiles.

In NeoX's order the tiles are the two halves of each head, loaded apart. In GPT-J's order they are
the even and the odd columns of one tile. No kernel is launched here.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl

from fixpass.runtime.kernels.tile import UNIT_COLUMN, row_offsets, tile_rows, weigh_by


@triton.jit
def part_columns(
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """The columns START to START + WIDTH of each head of a row, and which of them exist."""
    inner = tl.arange(0, BLOCK_HEADS * BLOCK)
    if BLOCK_HEADS == 1:
        return START + inner, inner < WIDTH
    head = inner // BLOCK
    inner = inner % BLOCK
    return head * HEAD + START + inner, (inner < WIDTH) & (head < HEADS)


@triton.jit
def part_pointers(
    ptr,
    rows,
    column_step,
    live,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    """Pointers and mask of a part of each head; `rows` are the offsets of the rows."""
    columns, exists = part_columns(START, WIDTH, BLOCK, HEADS, BLOCK_HEADS, HEAD)
    columns = columns.to(tl.int64)
    if UNIT != UNIT_COLUMN:
        columns = columns * column_step
    pointers = ptr + (rows[:, None] + columns[None, :])
    mask = tl.broadcast_to(live[:, None], pointers.shape)
    if ONE_ROW:
        mask = tl.broadcast_to(exists[None, :], pointers.shape)
    elif WIDTH != BLOCK or HEADS != BLOCK_HEADS:
        mask = mask & exists[None, :]
    return pointers, mask


@triton.jit
def load_pairs(
    ptr,
    rows,
    column_step,
    live,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The first and the second value of each pair."""
    if INTERLEAVED:
        at, mask = part_pointers(
            ptr, rows, column_step, live,
            0, 2 * HALF, 2 * BLOCK, HEADS, BLOCK_HEADS, HEAD, UNIT, ONE_ROW,
        )  # fmt: skip
        both = tl.load(at, mask=mask, other=0.0)
        return tl.split(tl.reshape(both, [both.shape[0], BLOCK_HEADS * BLOCK, 2]))
    first, mask = part_pointers(
        ptr, rows, column_step, live, 0, HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, UNIT, ONE_ROW
    )
    second, _ = part_pointers(
        ptr, rows, column_step, live, HALF, HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, UNIT, ONE_ROW
    )
    return tl.load(first, mask=mask, other=0.0), tl.load(second, mask=mask, other=0.0)


@triton.jit
def store_pairs(
    ptr,
    rows,
    column_step,
    live,
    a,
    b,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write the first and the second value of each pair."""
    if INTERLEAVED:
        at, mask = part_pointers(
            ptr, rows, column_step, live,
            0, 2 * HALF, 2 * BLOCK, HEADS, BLOCK_HEADS, HEAD, UNIT, ONE_ROW,
        )  # fmt: skip
        tl.store(at, tl.reshape(tl.join(a, b), at.shape), mask=mask)
    else:
        first, mask = part_pointers(
            ptr, rows, column_step, live, 0, HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, UNIT, ONE_ROW
        )
        second, _ = part_pointers(
            ptr, rows, column_step, live, HALF, HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, UNIT, ONE_ROW
        )
        tl.store(first, a, mask=mask)
        tl.store(second, b, mask=mask)


@triton.jit
def load_table(
    ptr,
    rows,
    column_step,
    live,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_TABLE: tl.constexpr,
):
    """The factors of both values of each pair, in fp32; every head has the same."""
    if FULL_TABLE:
        a, b = load_pairs(
            ptr, rows, column_step, live,
            HALF, BLOCK, HEADS, BLOCK_HEADS, 0, UNIT, ONE_ROW, INTERLEAVED,
        )  # fmt: skip
        return a.to(tl.float32), b.to(tl.float32)
    at, mask = part_pointers(
        ptr, rows, column_step, live, 0, HALF, BLOCK, HEADS, BLOCK_HEADS, 0, UNIT, ONE_ROW
    )
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return a, a


@triton.jit
def norm_rope_tile(
    program,
    x_ptr,
    x_at,
    out_ptr,
    out_at,
    cos_ptr,
    cos_at,
    sin_ptr,
    sin_at,
    weight_ptr,
    sizes,
    num_rows,
    eps,
    X_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    COS_UNIT: tl.constexpr,
    SIN_UNIT: tl.constexpr,
    DIMS: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE_UNIT: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
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
    """Rows of x, normalised, weighed and rotated, into out."""
    ONE_ROW: tl.constexpr = ROWS == 1
    rows, live = tile_rows(program, num_rows, ROWS, SIZE_UNIT, WIDE_ROWS)
    x_rows = row_offsets(rows, x_at, sizes, DIMS, VECTOR, SIZE_UNIT, X_UNIT)
    out_rows = row_offsets(rows, out_at, sizes, DIMS, VECTOR, SIZE_UNIT, OUT_UNIT)
    x_step = x_at[1].to(tl.int64) * VECTOR
    out_step = out_at[1].to(tl.int64) * VECTOR
    a, b = load_pairs(
        x_ptr, x_rows, x_step, live,
        HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, X_UNIT, ONE_ROW, INTERLEAVED,
    )  # fmt: skip
    a, b = a.to(tl.float32), b.to(tl.float32)
    squares = tl.sum(a * a + b * b, axis=1)
    if REST > 0:
        at, mask = part_pointers(
            x_ptr, x_rows, x_step, live,
            2 * HALF, REST, BLOCK_REST, HEADS, BLOCK_HEADS, HEAD, X_UNIT, ONE_ROW,
        )  # fmt: skip
        rest = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, axis=1)
    # Inductor passes a Python float as fp64, which would promote the whole row.
    scale = tl.rsqrt(squares / (HEADS * HEAD) + tl.cast(eps, tl.float32))[:, None]
    a, b = (a * scale).to(NORM), (b * scale).to(NORM)
    # One row for all: a stride of zero.
    start = tl.zeros([ROWS], tl.int64)
    if weight_ptr is not None:
        weight_a, weight_b = load_pairs(
            weight_ptr, start, 1, live,
            HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, 0, ONE_ROW, INTERLEAVED,
        )  # fmt: skip
        a = weigh_by(a, weight_a, WEIGHT, OFFSET, PRODUCT)
        b = weigh_by(b, weight_b, WEIGHT, OFFSET, PRODUCT)
    a = a.to(NORMED).to(OPERAND).to(tl.float32)
    b = b.to(NORMED).to(OPERAND).to(tl.float32)
    cos_rows = row_offsets(rows, cos_at, sizes, DIMS, VECTOR, SIZE_UNIT, COS_UNIT)
    sin_rows = row_offsets(rows, sin_at, sizes, DIMS, VECTOR, SIZE_UNIT, SIN_UNIT)
    cos_a, cos_b = load_table(
        cos_ptr, cos_rows, cos_at[1].to(tl.int64) * VECTOR, live,
        HALF, BLOCK, HEADS, BLOCK_HEADS, COS_UNIT, ONE_ROW, INTERLEAVED, FULL_TABLE,
    )  # fmt: skip
    sin_a, sin_b = load_table(
        sin_ptr, sin_rows, sin_at[1].to(tl.int64) * VECTOR, live,
        HALF, BLOCK, HEADS, BLOCK_HEADS, SIN_UNIT, ONE_ROW, INTERLEAVED, FULL_TABLE,
    )  # fmt: skip
    first = (a * cos_a).to(ROTATED).to(tl.float32) - (b * sin_a).to(ROTATED).to(tl.float32)
    second = (b * cos_b).to(ROTATED).to(tl.float32) + (a * sin_b).to(ROTATED).to(tl.float32)
    RESULT: tl.constexpr = out_ptr.dtype.element_ty
    first, second = first.to(ROTATED).to(RESULT), second.to(ROTATED).to(RESULT)
    store_pairs(
        out_ptr, out_rows, out_step, live, first, second,
        HALF, BLOCK, HEADS, BLOCK_HEADS, HEAD, OUT_UNIT, ONE_ROW, INTERLEAVED,
    )  # fmt: skip
    if REST > 0:
        rest = (rest * scale).to(NORM)
        if weight_ptr is not None:
            at, mask = part_pointers(
                weight_ptr, start, 1, live,
                2 * HALF, REST, BLOCK_REST, HEADS, BLOCK_HEADS, HEAD, 0, ONE_ROW,
            )  # fmt: skip
            weight = tl.load(at, mask=mask, other=0.0)
            rest = weigh_by(rest, weight, WEIGHT, OFFSET, PRODUCT)
        at, mask = part_pointers(
            out_ptr, out_rows, out_step, live,
            2 * HALF, REST, BLOCK_REST, HEADS, BLOCK_HEADS, HEAD, OUT_UNIT, ONE_ROW,
        )  # fmt: skip
        tl.store(at, rest.to(NORMED).to(OPERAND).to(RESULT), mask=mask)
