"""`fixpass::shuffle_weight`: the permute of its layout, before and after a weight has that layout."""

import pytest
import torch
from torch import nn

from fixpass import weights
from fixpass.runtime.errors import LayoutError
from helpers.folding import aiter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(32, 64), (2, 16, 32)])
def test_it_is_the_permute_of_its_layout(dtype, shape):
    weight = torch.randn(shape).mul(50).to(dtype)
    got = weights.shuffle_weight(weight, "aiter_16x16")
    assert torch.equal(got, aiter(weight))
    assert got.data_ptr() != weight.data_ptr()


def test_a_transposed_view_is_shuffled_by_its_values():
    weight = torch.randn(64, 32).t()
    got = weights.shuffle_weight(weight, "aiter_16x16")
    assert torch.equal(got, aiter(weight.contiguous()))


def test_a_weight_with_the_layout_is_not_shuffled_twice():
    weight = nn.Parameter(torch.randn(32, 64))
    with torch.no_grad():
        before = weights.shuffle_weight(weight, "aiter_16x16")
        weights.set_layout(weight, "aiter_16x16")
        after = weights.shuffle_weight(weight, "aiter_16x16")
    assert torch.equal(before, after)
    assert after.data_ptr() != weight.data_ptr()


def test_a_weight_with_another_layout_is_refused():
    weight = nn.Parameter(torch.randn(32, 64))
    weights.set_layout(weight, "gate_up_interleaved")
    with (
        torch.no_grad(),
        pytest.raises(LayoutError, match="has layout gate_up_interleaved and cannot be shuffled"),
    ):
        weights.shuffle_weight(weight, "aiter_16x16")


def test_a_layout_that_changes_the_shape_is_refused():
    with pytest.raises(LayoutError, match=r"makes \(64, 32\) of \(32, 64\)"):
        weights.shuffle_weight(torch.randn(32, 64), "transposed")


def test_an_unknown_layout_is_refused_with_the_known_ones():
    with pytest.raises(LayoutError, match="known: aiter_16x16"):
        weights.shuffle_weight(torch.randn(32, 64), "aiter")


def test_torch_finds_nothing_wrong_with_the_op():
    torch.library.opcheck(
        torch.ops.fixpass.shuffle_weight.default,
        (torch.randn(32, 64), "aiter_16x16"),
        test_utils=("test_schema", "test_faketensor"),
    )
