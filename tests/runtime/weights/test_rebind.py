"""copy_or_rebind: new values, strides and attributes in a Parameter that stays what it is."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.parameter_layout import set_layout
from fixpass.runtime.weights.rebind import copy_or_rebind, pack
from helpers.folding import equal, parameter


def with_loader(*shape, **kwargs):
    param = nn.Parameter(torch.randn(*shape, **kwargs))
    param.weight_loader = print
    return param


def test_a_value_of_the_same_layout_is_copied():
    param, new = with_loader(4, 6), torch.randn(4, 6)
    pointer, version = param.data_ptr(), param._version
    done = copy_or_rebind(param, new)
    assert (done.moved, done.reshaped, done.staged, done.merged) == (False, False, False, ())
    assert torch.equal(param, new)
    assert param.data_ptr() == pointer != new.data_ptr()
    assert param.weight_loader is print
    assert param._version > version


@pytest.mark.parametrize("shape", [(6, 6), (4, 6)])
def test_a_transpose_of_the_parameter_itself_is_right_in_the_same_memory(shape):
    param = with_loader(*shape)
    wanted, pointer = param.detach().t().contiguous(), param.data_ptr()
    done = copy_or_rebind(param, param.detach().t())
    assert torch.equal(param, wanted)
    assert param.data_ptr() == pointer
    assert done.staged
    assert param.stride() == (1, shape[1])


def test_the_parameter_itself_is_no_change():
    param = with_loader(4, 6)
    before = param.detach().clone()
    copy_or_rebind(param, param)
    assert torch.equal(param, before)


def test_the_strides_that_a_kernel_asked_for_are_respected():
    param, new = with_loader(4, 6), torch.randn(6, 4).t()
    pointer = param.data_ptr()
    done = copy_or_rebind(param, new)
    assert done.reshaped
    assert not done.moved
    assert param.stride() == (1, 4)
    assert torch.equal(param, new)
    assert param.data_ptr() == pointer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16])
def test_a_smaller_value_uses_the_front_of_the_memory(dtype):
    param, new = nn.Parameter(torch.randn(4, 8), requires_grad=False), parameter(8, 2, dtype=dtype)
    pointer = param.data_ptr()
    done = copy_or_rebind(param, new)
    assert not done.moved
    assert param.data_ptr() == pointer
    assert equal(param, new)


def test_a_larger_value_moves_the_parameter_and_says_so():
    param, new = with_loader(4, 6), torch.randn(8, 6)
    pointer, identity = param.data_ptr(), id(param)
    done = copy_or_rebind(param, new)
    assert done.moved
    assert id(param) == identity
    assert param.data_ptr() not in (pointer, new.data_ptr())
    assert torch.equal(param, new)
    assert param.weight_loader is print


def test_a_value_with_gaps_does_not_stretch_over_the_memory():
    param, new = with_loader(8, 8), torch.randn(4, 16)[:, :8]
    assert copy_or_rebind(param, new).moved
    assert torch.equal(param, new)


def test_attributes_of_the_new_value_are_merged_over_those_there():
    param, new = with_loader(4, 6), torch.randn(4, 6)
    param.kept, param.tag = 1, "old"
    new.tag, new.is_shuffled = "new", True
    assert copy_or_rebind(param, new).merged == ("is_shuffled", "tag")
    assert vars(param) == {"weight_loader": print, "kept": 1, "tag": "new", "is_shuffled": True}


def test_class_and_requires_grad_stay():
    class Weight(nn.Parameter):
        pass

    param = Weight(torch.randn(4, 6), requires_grad=False)
    copy_or_rebind(param, nn.Parameter(torch.randn(6, 6)))
    assert type(param) is Weight
    assert not param.requires_grad


@pytest.mark.parametrize(
    ("param", "new", "match"),
    [
        (nn.Parameter(torch.empty(2, device="meta")), torch.ones(2), "meta"),
        (nn.Parameter(torch.ones(2)), torch.empty(2, device="meta"), "meta"),
        (nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse(), "sparse"),
        (nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.int8), "requires gradients"),
    ],
)
def test_what_cannot_be_put_is_refused(param, new, match):
    with pytest.raises(WeightError, match=f"layers.0.weight, .*{match}"):
        copy_or_rebind(param, new, "layers.0.weight")


def test_a_gradient_of_another_shape_is_in_the_way():
    param = with_loader(4, 6)
    param.grad = torch.ones(4, 6)
    with pytest.raises(WeightError, match="set grad to None"):
        copy_or_rebind(param, torch.ones(2, 6))


def test_a_parameter_with_a_layout_or_in_a_pack_is_refused():
    tiled, q, k = parameter(32, 64), with_loader(4, 6), with_loader(2, 6)
    set_layout(tiled, "aiter_16x16")
    pack([q, k])
    for param in (tiled, q):
        with pytest.raises(WeightError, match="it has a layout or is part of a pack"):
            copy_or_rebind(param, param.detach().clone())
