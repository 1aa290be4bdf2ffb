"""Row tensors in every layout that torch makes, small enough for the interpreter.

Each function takes a hidden size and a dtype and gives a view with random values. No kernel
is known here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Make = Callable[[int, torch.dtype], Tensor]


def _values(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count).to(dtype)


def _strided(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> Tensor:
    dims = zip(shape, stride, strict=True)
    reach = offset + 1 + sum(max(0, n - 1) * s for n, s in dims if n != 1)
    return _values(reach + 24, dtype).as_strided(shape, stride, offset)


def contiguous(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (5, h), (h, 1))


def one_row(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (h,), (1,))


def packed_heads(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (3, 2, h), (5 * h, h, 1), 2 * h)


def packed_at_multiple_of_8(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (3, 2, h), (8 * (h + 1), 8 * (-(-h // 8)), 1), 16)


def transposed_leading(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (2, 3, h), (h, 2 * h, 1))


def heads_before_tokens(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (2, 2, 2, h), (4 * h, h, 2 * h, 1))


def expanded_rows(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (2, 3, h), (h, 0, 1))


def expanded_columns(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (4, h), (3, 0))


def every_second_row(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (4, h), (2 * h, 1), h)


def storage_offset(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (5, h), (h, 1), 3)


def odd_pitch(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (5, h), (h + 1 + h % 2, 1))


def pitch_of_4(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (5, h), (4 * (h // 4) + 12, 1), 4)


def junk_strides_of_size_one(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (1, 3, 1, 2, h), (7, 2 * h + 8, 13, h, 1))


def every_second_column(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (4, h), (2 * h + 1, 2), 1)


def column_major(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (8, h), (1, 8))


def channels_first(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (2, 3, 2, h), (6 * h, 2, 1, 6))


def no_rows(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (0, 3, h), (3 * h, h, 1))


def four_leading_dimensions(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (2, 1, 2, 2, 2, h), (30 * h, 5, 14 * h, 6 * h, 2 * h, 1))


def five_leading_dimensions(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (2, 2, 2, 2, 2, h), (62 * h, 30 * h, 14 * h, 6 * h, 2 * h, 1))


def overlapping_windows(h: int, dtype: torch.dtype) -> Tensor:
    return _strided(dtype, (4, h), (max(1, h // 2), 1))


UNIT_STRIDE: tuple[Make, ...] = (
    contiguous,
    one_row,
    packed_heads,
    packed_at_multiple_of_8,
    transposed_leading,
    heads_before_tokens,
    expanded_rows,
    every_second_row,
    storage_offset,
    odd_pitch,
    pitch_of_4,
    junk_strides_of_size_one,
    no_rows,
    four_leading_dimensions,
    overlapping_windows,
)
OTHER_STRIDE: tuple[Make, ...] = (
    expanded_columns,
    every_second_column,
    column_major,
    channels_first,
)
LAYOUTS = UNIT_STRIDE + OTHER_STRIDE
READ_ONLY: tuple[Make, ...] = (expanded_rows, expanded_columns, overlapping_windows)
EVERY: tuple[Make, ...] = (*LAYOUTS, five_leading_dimensions)
