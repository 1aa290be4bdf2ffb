"""Launch choices: sizes of tiles, and how rows are cut into launches."""

import pytest
import torch

from fixpass.runtime.kernels.launch import VECTOR, choose, parts
from helpers.row_layouts import five_leading_dimensions, four_leading_dimensions

SIZES = (1, 17, 64, 80, 128, 256, 512, 1024, 1500, 2048, 4096, 5000, 8192, 16384, 32768)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("num_rows", [1, 300, 2**20])
def test_a_tile_gives_every_thread_a_vector_and_fits_registers(num_rows, lanes, by_rows):
    for hidden_size in SIZES:
        for itemsize in (2, 4):
            choice = choose(num_rows, hidden_size, itemsize, by_rows=by_rows, lanes=lanes)
            threads, tile = choice.num_warps * lanes, choice.rows * choice.block
            assert choice.block >= hidden_size > choice.block // 2
            assert choice.rows & (choice.rows - 1) == 0
            assert threads * VECTOR <= tile <= threads * 64
            assert threads <= 512


def test_few_rows_are_spread_over_more_programs():
    few, many = (
        choose(num_rows, 128, 2, by_rows=False, lanes=32) for num_rows in (8 * 40, 8 * 65536)
    )
    assert (few.rows, few.num_warps) == (2, 1)
    assert (many.rows, many.num_warps) == (16, 4)


def test_a_fifth_leading_dimension_is_taken_slice_by_slice():
    four = four_leading_dimensions(8, torch.bfloat16)
    five = five_leading_dimensions(8, torch.bfloat16)
    assert [part["x"] is four for part in parts(x=four)] == [True]
    assert [tuple(part["x"].shape) for part in parts(x=five)] == [(2, 2, 2, 2, 8)] * 2
