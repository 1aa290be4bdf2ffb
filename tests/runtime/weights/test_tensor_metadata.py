"""The manifest: an update changes values and nothing else, or it is an error."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.plan_cache import Manifest


def _new_attribute(param):
    param.is_shuffled = True


def _lost_attribute(param):
    del param.weight_loader


def _other_attribute(param):
    param.weight_loader = id


def _other_memory(param):
    param.data = param.detach().clone()


def _other_strides(param):
    param.data = param.detach().t()


def _other_dtype(param):
    param.data = param.detach().bfloat16()


def _frozen(param):
    param.requires_grad_(False)


def _other_class(param):
    class Other(nn.Parameter):
        pass

    param.__class__ = Other


FAULTS = {
    _new_attribute: "attribute 'is_shuffled' is new",
    _lost_attribute: "attribute 'weight_loader' is gone",
    _other_attribute: "attribute 'weight_loader' is another object",
    _other_memory: "address was",
    _other_strides: r"stride was \(4, 1\) and is \(1, 4\)",
    _other_dtype: "dtype was torch.float32 and is torch.bfloat16",
    _frozen: "requires_grad was True and is False",
    _other_class: "its class was Parameter and is Other",
}


@pytest.mark.parametrize("change", FAULTS)
def test_every_change_but_that_of_values_is_named(change):
    param = nn.Parameter(torch.randn(4, 4))
    param.weight_loader = print
    manifest = Manifest.of({"proj.weight": param})
    with torch.no_grad():
        param.copy_(torch.randn(4, 4))
    manifest.check({"proj.weight": param})
    change(param)
    with pytest.raises(UpdateError, match=f"proj.weight: {FAULTS[change]}"):
        manifest.check({"proj.weight": param})


def test_another_object_is_named():
    manifest = Manifest.of({"weight": nn.Parameter(torch.ones(2))})
    for params in ({"weight": nn.Parameter(torch.ones(2))}, {}):
        with pytest.raises(UpdateError, match="another object is in its place"):
            manifest.check(params)
