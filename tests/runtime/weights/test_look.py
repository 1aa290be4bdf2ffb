"""What a walk finds in a model, and what a look at its tensors notices."""

import pytest
import torch
from torch import nn

from fixpass.runtime.weights.look import Look, walk


def tree(**children):
    return nn.ModuleDict(children)


def weights():
    return nn.Linear(2, 2, bias=False)


def test_it_finds_parameters_and_persistent_buffers():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].register_buffer("scratch", torch.zeros(1), persistent=False)
    _, tensors, _ = walk(model)
    wanted = [*model.parameters(), *model[0].buffers()]
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in wanted}
    assert walk(model)[2] == [model[1].scratch]


def test_other_trees_of_the_same_tensors_have_other_names():
    a, b = weights(), weights()
    shapes = [
        tree(a=a, b=b),
        tree(b=a, a=b),
        tree(a=tree(a=a), b=b),
        tree(a=tree(a=a, b=b)),
        tree(a=a, b=tree(b=b)),
    ]
    names = [walk(model)[0] for model in shapes]
    assert all(one != other for i, one in enumerate(names) for other in names[:i])
    assert walk(shapes[0])[0] == walk(tree(a=weights(), b=weights()))[0]


@pytest.mark.parametrize("bias", [None, nn.Parameter(torch.zeros(2))])
def test_a_parameter_that_is_none_is_told_from_one_that_is_not(bias):
    model = tree(a=weights(), b=weights())
    before, *_ = walk(model)
    model["a"].bias = bias
    assert (walk(model)[0] == before) is (bias is None)


def test_a_name_of_a_module_is_told_from_that_of_a_parameter():
    one, other = nn.Module(), nn.Module()
    one.x, one.y = nn.Parameter(torch.zeros(1)), nn.Module()
    other.y, other.x = nn.Parameter(torch.zeros(1)), nn.Module()
    assert walk(one)[0] != walk(other)[0]


def test_a_module_that_is_none_has_its_place():
    model = nn.Module()
    model.a, model.b = weights(), None
    before = walk(model)[0]
    model.a, model.b = None, model.a
    assert walk(model)[0] != before


def test_modules_that_hold_each_other_end():
    model = tree(a=weights())
    model["a"].parent = model
    _, tensors, _ = walk(model)
    assert tensors == [model["a"].weight]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_have_a_look_too():
    tensors = [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.eye(2)]
    look = Look.at(tensors)
    assert look.is_at(tensors)
    assert not look.is_at([*tensors[:2], torch.eye(2)])
    tensors[2].t_()
    assert not look.is_at(tensors), "its strides are others now"
