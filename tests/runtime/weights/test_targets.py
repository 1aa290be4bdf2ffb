"""The walk of a model: which tensors it finds, under which names, and what it tells apart."""

import pytest
import torch
from torch import nn

from fixpass.runtime.weights.plan_cache import TensorMetadata
from fixpass.runtime.weights.targets import MemoryRanges, targets, walk


def tree(**children):
    return nn.ModuleDict(children)


def weights():
    return nn.Linear(2, 2, bias=False)


def names(model):
    return [target.name for target in walk(model)[0]]


def test_it_finds_parameters_and_persistent_buffers_in_the_order_of_the_state_dict():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].register_buffer("scratch", torch.zeros(1), persistent=False)
    found, transient = walk(model)
    assert [target.name for target in found] == list(model.state_dict())
    assert all(target.tensor is getattr(target.module, target.leaf) for target in found)
    assert transient == [model[1].scratch]


def test_a_tied_tensor_is_found_under_each_of_its_names():
    model = tree(a=weights(), b=weights())
    model["b"].weight = model["a"].weight
    model["c"] = model["a"]
    assert names(model) == ["a.weight", "b.weight", "c.weight"]
    assert len({id(target.tensor) for target in targets(model).values()}) == 1


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_wrappers_leave_no_word_in_a_name(wrap):
    assert names(tree(a=wrap(weights()))) == ["a.weight"]


def test_a_child_that_is_called_module_is_part_of_a_name():
    assert names(tree(module=weights(), other=weights())) == ["module.weight", "other.weight"]


def test_modules_that_hold_each_other_end():
    model = tree(a=weights())
    model["a"].parent = model
    assert names(model) == ["a.weight"]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_have_metadata_too():
    tensors = [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.zeros(2, 3)]
    metadata = TensorMetadata.of(tensors)
    assert metadata.describes(tensors)
    assert metadata == TensorMetadata.of(tensors)
    tensors[2].t_()
    assert not metadata.describes(tensors), "its strides are others now"
    assert metadata != TensorMetadata.of(tensors)


def test_memory_is_found_by_address_and_not_by_storage():
    weight, other = torch.zeros(8), torch.zeros(8)
    ranges = MemoryRanges.of([weight])
    assert any(map(ranges.holds, [other, torch.from_numpy(weight.numpy()[2:4])]))
    assert not any(map(ranges.holds, [other, torch.eye(2).to_sparse()]))
