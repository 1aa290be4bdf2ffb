"""Small models for the tests of checkpoints, and what must hold after a load or a refusal."""

import copy
import re

import pytest
import torch
from torch import nn

from fixpass import FixpassError
from fixpass.weights import load


def holder(**shapes):
    """A module tree with zero parameters: names may have dots, written as two underscores."""
    model = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split("__")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.zeros(shape), requires_grad=False))
    return model


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[1].running_mean.normal_()
    return model


def zeroed(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def assert_loaded(model, wanted):
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def model_of(**tensors):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


def assert_refused(model, stored, said, **options):
    """`said` is raised, and no parameter changed in bytes, memory, identity or attributes."""

    def state():
        return [
            (n, id(p), p.data_ptr(), p.untyped_storage().tolist(), dict(vars(p)))
            for n, p in model.named_parameters()
        ]

    before = state()
    with pytest.raises(FixpassError, match=re.escape(said)) as raised:
        load(model, stored, **options)
    assert state() == before
    return str(raised.value)


def two():
    return model_of(a=torch.zeros(4, 3), b=torch.zeros(2))
