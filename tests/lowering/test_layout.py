"""Layouts: what is proved, what is refuted, what stays open, and that no question adds a guard."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fixpass.lowering.layout import (
    Layout,
    all_known,
    dense_order,
    either,
    known,
    merge_leading,
    same_shape,
)

BF16 = torch.bfloat16


def unbacked():
    """A shape environment and three sizes of which nothing is known but that they are sizes."""
    env = ShapeEnv()
    sizes = [env.create_unbacked_symint() for _ in range(3)]
    for size in sizes:
        torch._check(size >= 2)
    return env, sizes


def test_three_answers_combine_as_three_answers():
    assert all_known([True, True]) is True
    assert all_known([True, None]) is None
    assert all_known([None, False]) is False
    assert either(None, True) is True
    assert either(False, None) is None
    assert either(False, False) is False


def test_a_dense_layout_is_dense_and_a_packed_slice_is_not():
    assert Layout((2, 3, 4), (12, 4, 1), BF16).is_dense() is True
    assert Layout((2048, 32, 128), (6144, 128, 1), BF16).is_dense() is False


def test_the_stride_of_a_size_1_dimension_is_never_looked_at():
    junk = Layout((32768, 1, 128), (128, 4194304, 1), BF16)
    assert junk.is_dense() is True
    assert junk.rows() == Layout((32768, 128), (128, 1), BF16)
    assert Layout((4, 1), (1, 77), BF16).has_unit_last_stride() is True


def test_strides_of_another_rank_are_other_strides():
    assert Layout((2, 8), (8, 1), BF16).has_stride((16, 8, 1)) is False


def test_an_empty_layout_is_dense_whatever_its_strides():
    assert Layout((0, 8), (3, 5), BF16).is_dense() is True


def test_leading_dimensions_merge_only_where_all_operands_merge():
    x = Layout((2, 3, 4), (12, 4, 1), BF16)
    y = Layout((2, 3, 4), (24, 4, 1), BF16)
    assert merge_leading([x]) == [(6, (4,))]
    assert merge_leading([x, y]) == [(2, (12, 24)), (3, (4, 4))]
    assert merge_leading([Layout((5,), (1,), BF16)]) == []
    assert merge_leading([Layout((), (), BF16)]) is None


def test_an_expanded_dimension_merges_with_an_expanded_one_alone():
    assert merge_leading([Layout((2, 3, 4), (0, 0, 1), BF16)]) == [(6, (0,))]
    assert merge_leading([Layout((2, 3, 4), (0, 4, 1), BF16)]) == [(2, (0,)), (3, (4,))]


@pytest.mark.parametrize(
    ("shape", "stride", "order"),
    [
        ((2, 3, 4), (12, 4, 1), (0, 1, 2)),
        ((2, 3, 4), (4, 8, 1), (1, 0, 2)),
        ((2, 3), (1, 2), (1, 0)),
        ((2, 1, 3), (1, 99, 2), (1, 2, 0)),
        ((2, 3), (6, 1), None),
        ((2, 3), (0, 1), None),
        ((), (), ()),
    ],
)
def test_the_order_in_which_a_layout_is_dense(shape, stride, order):
    assert dense_order(Layout(shape, stride, BF16)) == order


def test_symbolic_sizes_are_proved_refuted_or_left_open():
    env, (a, b, c) = unbacked()
    dense = Layout((a, b, 8), (b * 8, 8, 1), BF16)
    assert dense.is_dense() is True
    assert dense.rows().shape == (a * b, 8)
    assert Layout((a, b, 8), (c, 8, 1), BF16).is_dense() is None
    assert Layout((a, b, 8), (b * 16, 16, 1), BF16).is_dense() is False
    assert Layout((a, 8), (c, 1), BF16).rows() == Layout((a, 8), (c, 1), BF16)
    assert known(a * b == b * a) is True
    assert known(a == 1) is False
    assert known(a == b) is None
    assert same_shape(dense, Layout((a, c, 8), (c * 8, 8, 1), BF16)) is None
    assert env.guards == []


def test_a_layout_prints_its_strides_only_where_it_is_not_dense():
    assert str(Layout((2, 8), (8, 1), BF16)) == "bf16[2, 8]"
    assert str(Layout((2, 8), (16, 1), torch.float32)) == "f32[2, 8][16, 1]"
