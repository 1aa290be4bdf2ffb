"""Device functions of the norm kernels for one tile of rows: addresses, statistics, weight rule.

No kernel is launched here.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl

UNIT_COLUMN: tl.constexpr = tl.constexpr(0)
UNIT_ROW: tl.constexpr = tl.constexpr(1)


@triton.jit
def tile_rows(
    program, num_rows, ROWS: tl.constexpr, SIZE_UNIT: tl.constexpr, WIDE_ROWS: tl.constexpr
):
    """Row numbers of a program's tile and which of them exist; 64-bit only where needed."""
    if WIDE_ROWS:
        rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        return rows, rows < num_rows.to(tl.int64) * SIZE_UNIT
    rows = program * ROWS + tl.arange(0, ROWS)
    return rows, rows < num_rows * SIZE_UNIT


@triton.jit
def row_offsets(
    rows,
    at,
    sizes,
    DIMS: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """64-bit offsets of the first elements of rows; `at` is (start, column stride, strides).

    Leading strides and sizes come innermost first.
    """
    offsets = at[0].to(tl.int64) * VECTOR
    rest = rows
    for d in tl.static_range(DIMS):
        index = rest
        if d < DIMS - 1:
            size = sizes[d]
            if d == 0:
                size = size * SIZE_UNIT
            index = rest % size
            rest = rest // size
        if d == 0 and UNIT == UNIT_ROW:
            offsets = offsets + index.to(tl.int64)
        else:
            offsets = offsets + index.to(tl.int64) * (at[2 + d].to(tl.int64) * VECTOR)
    return offsets


@triton.jit
def tile_offsets(
    rows,
    at,
    sizes,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """64-bit offsets of a tile's elements: those of `row_offsets`, and the columns."""
    offsets = row_offsets(rows, at, sizes, DIMS, VECTOR, SIZE_UNIT, UNIT)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    if UNIT != UNIT_COLUMN:
        columns = columns * (at[1].to(tl.int64) * VECTOR)
    return offsets[:, None] + columns[None, :]


@triton.jit
def tile_mask(
    live, ROWS: tl.constexpr, BLOCK: tl.constexpr, HIDDEN: tl.constexpr, ONE_ROW: tl.constexpr
):
    """Which elements of a tile exist; a program of one row always has it."""
    columns = (tl.arange(0, BLOCK) < HIDDEN)[None, :]
    if ONE_ROW:
        return tl.broadcast_to(columns, [ROWS, BLOCK])
    if HIDDEN == BLOCK:
        return tl.broadcast_to(live[:, None], [ROWS, BLOCK])
    return live[:, None] & columns


@triton.jit
def normalize(h, mask, eps, HIDDEN: tl.constexpr, CENTER: tl.constexpr):
    """`h` over its root mean square, in fp32, after taking its mean away when CENTER."""
    if CENTER:
        mean = tl.sum(h, axis=1) / HIDDEN
        h = tl.where(mask, h - mean[:, None], 0.0)
    variance = tl.sum(h * h, axis=1) / HIDDEN
    # Inductor passes a Python float as fp64, which would promote the whole row.
    return h * tl.rsqrt(variance + tl.cast(eps, tl.float32))[:, None]


@triton.jit
def times_weight(y, weight, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, PRODUCT: tl.constexpr):
    """The product with the weight, or with the weight and its offset."""
    weight = weight.to(WEIGHT)
    if OFFSET != 0.0:
        weight = (weight.to(tl.float32) + OFFSET).to(WEIGHT)
    return (y.to(tl.float32) * weight.to(tl.float32)).to(PRODUCT)


@triton.jit
def weigh(
    y,
    weight_ptr,
    bias_ptr,
    mask,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
):
    """The weight rule, each step rounded to the type torch would give it.

    Weight and bias are read through a tile of pointers: read as one row they would cross
    shared memory to reach the tile's layout.
    """
    columns = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], [ROWS, BLOCK])
    y = y.to(NORM)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
        y = times_weight(y, weight, WEIGHT, OFFSET, PRODUCT)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=mask, other=0.0)
        y = (y.to(tl.float32) + bias.to(tl.float32)).to(SUM)
    return y


@triton.jit
def norm_tile(
    program,
    x_ptr,
    x_at,
    out_ptr,
    out_at,
    weight_ptr,
    bias_ptr,
    sizes,
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
    """Rows of x, normalized and weighed, into out."""
    rows, live = tile_rows(program, num_rows, ROWS, SIZE_UNIT, WIDE_ROWS)
    mask = tile_mask(live, ROWS, BLOCK, HIDDEN, ROWS == 1)
    x_tile = x_ptr + tile_offsets(rows, x_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, X_UNIT)
    h = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    y = normalize(h, mask, eps, HIDDEN, CENTER)
    y = weigh(y, weight_ptr, bias_ptr, mask, ROWS, BLOCK, NORM, WEIGHT, OFFSET, PRODUCT, SUM)
    out_tile = out_ptr + tile_offsets(rows, out_at, sizes, DIMS, BLOCK, VECTOR, SIZE_UNIT, OUT_UNIT)
    tl.store(out_tile, y.to(out_ptr.dtype.element_ty), mask=mask)
