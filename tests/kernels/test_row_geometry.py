"""Merging, alignment and overlap of layouts: integers only, nothing is run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixpass.runtime.kernels.row_geometry import (
    UNIT_COLUMN,
    UNIT_NONE,
    UNIT_ROW,
    aligned_base,
    describe,
    lay_out,
    merge,
    operand,
    overlap_partly,
    overlaps_itself,
)


def geometry(*tensors):
    return lay_out(tuple(operand(t, aligned_base(t)[1]) for t in tensors))


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def test_dimensions_merge_only_where_they_do_for_every_operand():
    dense, packed = (6, 2), (7, 2)
    assert merge((5, 3), (dense, dense)) == ((15,), ((2,), (2,)))
    assert merge((5, 3), (dense, packed)) == ((5, 3), (dense, packed))


def test_a_dimension_of_size_one_is_dropped_whatever_its_stride():
    assert merge((1, 5, 1, 3), ((77, 6, 1, 2),)) == ((15,), ((2,),))
    assert merge((1, 1), ((5, 3),)) == ((1,), ((0,),))


def test_transposed_leading_dimensions_merge_after_sorting():
    x = bf16(2, 4, 8, 128).transpose(1, 2)
    assert geometry(x, x).sizes == (64,)


@pytest.mark.parametrize(
    ("pitch", "vector"), [(3072, 8), (6152, 8), (3076, 4), (3074, 2), (3073, 1), (8, 8)]
)
def test_the_vector_divides_the_pitch(pitch, vector):
    x = torch.empty_strided((4, 8), (pitch, 1), dtype=torch.bfloat16)
    place = geometry(x).placements[0]
    assert (geometry(x).vector, place.strides) == (vector, (pitch // vector,))
    assert place.unit == UNIT_COLUMN


@pytest.mark.parametrize(("offset", "vector"), [(0, 8), (8, 8), (4, 4), (2, 2), (3, 1), (11, 1)])
def test_the_vector_divides_the_distance_from_an_aligned_base(offset, vector):
    x = bf16(100)[offset : offset + 64].view(8, 8)
    base, skew = aligned_base(x)
    assert base.data_ptr() % 16 == 0
    assert base.data_ptr() + 2 * skew == x.data_ptr()
    assert geometry(x).vector == vector


def test_unit_stride_along_rows_is_told_from_none():
    column_major, every_second = bf16(64, 40).t(), bf16(4, 64)[:, ::2]
    assert geometry(column_major).placements[0].unit == UNIT_ROW
    assert geometry(every_second).placements[0].unit == UNIT_NONE


def test_a_layout_on_one_line():
    assert describe(bf16(2, 8)) == "bf16[2, 8]"
    assert describe(bf16(8, 2).t()) == "bf16[2, 8][1, 2]"


SMALL = st.integers(0, 5)
DIMS = st.lists(st.tuples(st.integers(1, 4), SMALL), min_size=1, max_size=4)


def elements(tensor):
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (offsets.flatten() + tensor.storage_offset()).tolist()


@given(DIMS)
@settings(max_examples=200, deadline=None)
def test_an_overlap_with_itself_is_never_overlooked(dims):
    shape, stride = zip(*dims, strict=True)
    view = torch.empty(100).as_strided(shape, stride)
    touched = elements(view)
    assert overlaps_itself(view) or len(set(touched)) == len(touched)


@given(DIMS, DIMS, st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_a_partial_overlap_is_never_overlooked(dims, other_dims, offset):
    storage = torch.empty(100)
    a = storage.as_strided(*zip(*dims, strict=True))
    b = storage.as_strided(*zip(*other_dims, strict=True), offset)
    if not overlap_partly(a, b):
        same = a.data_ptr() == b.data_ptr() and elements(a) == elements(b)
        assert same or not set(elements(a)) & set(elements(b))


def test_heads_of_one_packed_tensor_do_not_overlap():
    packed = bf16(6, 3072)
    q, k = packed[:, :1024].unflatten(1, (8, 128)), packed[:, 1024:1536].unflatten(1, (4, 128))
    assert not overlap_partly(q, k)
    assert not overlap_partly(q.transpose(0, 1), k.transpose(0, 1))
    assert overlap_partly(q, packed[:, 512:1536].unflatten(1, (8, 128)))
