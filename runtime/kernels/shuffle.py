"""The 16 x 16 weight shuffle of aiter, and its inverse, as one copy.

A band of 16 rows is a grid of 16-byte cells; shuffling transposes the grid in each band, so
that what a wavefront loads lies together. Types of 1, 2 and 4 bytes; packed 4-bit weights are
moved as the bytes they lie in. Nothing here records that a weight is shuffled.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.launch import Launch, lanes_of
from fixpass.runtime.kernels.row_geometry import (
    aligned_base,
    describe,
    overlap_partly,
    overlaps_itself,
)

BAND = 16  # rows
CELL_BYTES = 16
BLOCK = 32  # elements of a row that belong together; aiter asks for whole ones
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@triton.jit(
    do_not_specialize=[
        "start", "row_stride", "expert_stride", "rows_per_expert", "cells_per_row", "num_cells"
    ]
)  # fmt: skip
def move_cells(
    plain_ptr,
    shuffled_ptr,
    start,
    row_stride,
    expert_stride,
    rows_per_expert,
    cells_per_row,
    num_cells,
    CELL: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    INVERSE: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    cells = program * TILE + tl.arange(0, TILE)
    live = (cells < num_cells)[:, None]
    grid_cell = cells // 16
    row = grid_cell // cells_per_row * 16 + cells % 16
    offset = start.to(tl.int64) * VECTOR
    offset += (row // rows_per_expert).to(tl.int64) * (expert_stride.to(tl.int64) * VECTOR)
    offset += (row % rows_per_expert).to(tl.int64) * (row_stride.to(tl.int64) * VECTOR)
    offset += (grid_cell % cells_per_row).to(tl.int64) * CELL
    inside = tl.arange(0, CELL)[None, :]
    plain = plain_ptr + (offset[:, None] + inside)
    shuffled = shuffled_ptr + (cells.to(tl.int64)[:, None] * CELL + inside)
    if INVERSE:
        tl.store(plain, tl.load(shuffled, mask=live), mask=live)
    else:
        tl.store(shuffled, tl.load(plain, mask=live), mask=live)


def shuffle(weight: Tensor, *, out: Tensor) -> None:
    """Write `weight` [rows, hidden] or [experts, rows, hidden], shuffled, into dense `out`."""
    check_shuffle(weight, out=out)
    if weight.numel():
        plan_shuffle(weight, out, inverse=False, lanes=lanes_of(weight.device)).run()


def unshuffle(weight: Tensor, *, out: Tensor) -> None:
    """Undo `shuffle`: from dense `weight` into `out`, which may be strided."""
    check_shuffle(out, out=weight, names=("out", "weight"))
    if overlaps_itself(out):
        raise ValueError(f"out {describe(out)}: several indices name one element")
    if weight.numel():
        plan_shuffle(out, weight, inverse=True, lanes=lanes_of(weight.device)).run()


def check_shuffle(
    weight: Tensor, *, out: Tensor, names: tuple[str, str] = ("weight", "out")
) -> None:
    """Raise ValueError where a weight has no 16 x 16 shuffle, or `out` cannot hold it."""
    name, other = names
    if weight.dim() not in (2, 3) or weight.element_size() not in INTEGERS:
        raise ValueError(f"{name} {describe(weight)}: want 2 or 3 dimensions of 1, 2 or 4 bytes")
    if weight.shape[-2] % BAND or weight.shape[-1] % BLOCK:
        raise ValueError(f"{name} {describe(weight)}: want rows % {BAND} and hidden % {BLOCK} zero")
    if weight.stride(-1) != 1:
        raise ValueError(f"{name} {describe(weight)}: want a last stride of 1")
    if out.shape != weight.shape or out.dtype != weight.dtype or out.device != weight.device:
        raise ValueError(
            f"{other} {describe(out)} on {out.device}: want {describe(weight)} on {weight.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"{other} {describe(out)}: want it contiguous")
    shares = out.numel() and (overlap_partly(out, weight) or out.data_ptr() == weight.data_ptr())
    if shares:
        raise ValueError(f"{other} {describe(out)}: lies over {name} {describe(weight)}")


def plan_shuffle(plain: Tensor, shuffled: Tensor, *, inverse: bool, lanes: int) -> Launch:
    """The launch for checked tensors with at least one element."""
    integer = INTEGERS[plain.element_size()]
    cell = CELL_BYTES // plain.element_size()
    base, skew = aligned_base(plain)
    rows_per_expert = plain.shape[-2]
    row_stride = plain.stride(-2)
    expert_stride = plain.stride(0) if plain.dim() == 3 and plain.shape[0] > 1 else 0
    vector = gcd(cell, skew, row_stride, expert_stride)
    num_cells = plain.numel() // cell
    tile = 4 * lanes * 2
    arguments = {
        "plain_ptr": base.view(integer),
        "shuffled_ptr": shuffled.view(integer),
        "start": skew // vector,
        "row_stride": row_stride // vector,
        "expert_stride": expert_stride // vector,
        "rows_per_expert": rows_per_expert,
        "cells_per_row": plain.shape[-1] // cell,
        "num_cells": num_cells,
        "CELL": cell,
        "TILE": tile,
        "VECTOR": vector,
        "WIDE": num_cells > 2**31 - tile,
        "INVERSE": inverse,
    }
    return Launch(move_cells, (-(-num_cells // tile),), arguments, 4, plain.device)
