"""fixpass::prepacked_linear: a handle stands for a packed weight, for as long as it lives."""

import gc

import pytest
import torch
from torch.nn.functional import linear

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights import prepack
from fixpass.runtime.weights.prepack import Prepacked, packable_dtypes

pytestmark = pytest.mark.skipif(
    not packable_dtypes(), reason="no oneDNN here, which packs the weights, or no x86"
)
run = torch.ops.fixpass.prepacked_linear.default


def itself(value):
    return value


@pytest.mark.parametrize("dtype", packable_dtypes())
@pytest.mark.parametrize("shape", [(1, 48), (2, 3, 48), (0, 48), (48,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_a_linear_layer(dtype, shape, with_bias):
    weight, x = torch.randn(32, 48).to(dtype), torch.randn(shape).to(dtype)
    bias = torch.randn(32).to(dtype) if with_bias else None
    got = run(x, Prepacked(itself)(weight), bias, 32)
    bound = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, linear(x, weight, bias), rtol=1e-2, atol=bound)


@pytest.mark.parametrize("weight", [torch.randn(48, 32).t(), torch.randn(64, 96)[::2, ::2]])
def test_a_weight_of_any_strides_is_packed(weight):
    x = torch.randn(3, 48)
    got = run(x, Prepacked(itself)(weight), None, 32)
    torch.testing.assert_close(got, linear(x, weight), rtol=1e-4, atol=1e-4)


def test_what_torch_is_told_of_it_is_so():
    args = (torch.randn(2, 3, 48), Prepacked(itself)(torch.randn(32, 48)), torch.randn(32), 32)
    torch.library.opcheck(run, args)


def test_the_packed_weight_goes_with_its_handle():
    gc.collect()
    before = len(prepack._PACKED)
    form = Prepacked(itself)
    handle = form(torch.randn(32, 48))
    assert form.nbytes(handle) >= 32 * 48 * 4
    assert len(prepack._PACKED) == before + 1
    copied = handle.clone()
    del handle
    assert len(prepack._PACKED) == before
    with pytest.raises(WeightError, match="no packed weight has the handle"):
        run(torch.randn(1, 48), copied, None, 32)
