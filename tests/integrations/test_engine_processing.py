"""Processing that is not a new Parameter: in place, under a deleted name, and after an offload."""

import pytest
import torch
from torch import nn

from fixpass.integrations.sglang import engine_parameters
from fixpass.integrations.sglang.engine_parameters import keeping, restore
from fixpass.runtime.errors import CheckpointError
from helpers.engine_layers import FP8, layer, weights


def transpose_densely(module):
    module.weight = nn.Parameter(module.weight.t().contiguous(), requires_grad=False)


def halve(module):
    module.weight.data.copy_(module.weight.data.float() / 2)


@pytest.mark.parametrize("small", [1 << 16, 0])
def test_processing_in_place_starts_from_what_was_loaded(small, monkeypatch):
    monkeypatch.setattr(engine_parameters, "SMALL_BYTES", small)
    module = layer(weights(0))
    for seed in range(3):
        if seed:
            assert restore(module) == 1
            module.weight.load(weights(seed))
        with keeping(module):
            halve(module)
        want = (weights(seed).float() / 2).to(FP8)
        assert torch.equal(module.weight.data.view(torch.uint8), want.view(torch.uint8))


def test_an_update_that_brings_nothing_does_not_process_in_place_twice():
    module = layer(weights(0))
    with keeping(module):
        halve(module)
    want, place = module.weight.data.clone(), module.weight.data_ptr()
    restore(module)
    assert torch.equal(module.weight.data.view(torch.uint8), weights(0).view(torch.uint8))
    with keeping(module):
        halve(module)
    assert torch.equal(module.weight.data.view(torch.uint8), want.view(torch.uint8))
    assert module.weight.data_ptr() == place


def test_many_values_that_were_processed_in_place_have_to_be_brought(monkeypatch):
    monkeypatch.setattr(engine_parameters, "SMALL_BYTES", 0)
    module = layer(weights(0))
    with keeping(module):
        halve(module)
    restore(module)
    with pytest.raises(CheckpointError, match="brought no values for weight"), keeping(module):
        halve(module)


def test_a_value_that_was_loaded_after_processing_in_place_is_left_alone():
    module = layer(weights(0))
    with keeping(module):
        halve(module)
    module.weight.load(weights(1))
    assert restore(module) == 0
    assert torch.equal(module.weight.data.view(torch.uint8), weights(1).view(torch.uint8))


def as_plain(module, values):
    module.weight = values


def as_buffer(module, values):
    module.register_buffer("weight", values)


@pytest.mark.parametrize("register", [as_plain, as_buffer])
def test_a_plain_tensor_under_a_deleted_name_becomes_the_parameter_again(register):
    module, places = layer(weights(0)), set()
    first = module.weight
    for seed in range(3):
        if seed:
            restore(module)
            module.weight.load(weights(seed))
        with keeping(module):
            new = module.weight.data.t().contiguous()
            del module.weight
            register(module, new)
        assert module.weight is first
        want = weights(seed).t()
        assert torch.equal(module.weight.view(torch.uint8), want.contiguous().view(torch.uint8))
        places.add(module.weight.data_ptr())
    assert len(places) == 1


def test_a_name_that_the_engine_set_to_none_is_a_parameter_again():
    module = layer(weights(0))
    with keeping(module):
        del module.weight
        module.weight = None
    restore(module)
    assert torch.equal(module.weight.data.view(torch.uint8), weights(0).view(torch.uint8))


def test_a_weight_that_came_back_from_the_host_is_restored_where_it_is_read():
    module = layer(weights(0))
    with keeping(module):
        transpose_densely(module)
    place = module.weight.data_ptr()
    module.weight.data = module.weight.data.clone()
    assert restore(module) == 1
    assert module.weight.data_ptr() == place
    assert torch.equal(module.weight.data.view(torch.uint8), weights(0).view(torch.uint8))


def test_a_weight_that_came_back_without_its_values_has_to_be_brought():
    module = layer(weights(0))
    with keeping(module):
        transpose_densely(module)
    module.weight.data = torch.zeros_like(module.weight.data)
    assert restore(module) == 1
    assert module.weight.shape == (32, 64)
    with pytest.raises(CheckpointError, match="brought no values for weight"), keeping(module):
        transpose_densely(module)


def test_a_load_while_the_processed_weight_is_freed_says_so():
    module = layer(weights(0))
    with keeping(module):
        transpose_densely(module)
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(CheckpointError, match=r"weight was processed .* freed by an offload"):
        restore(module)
