"""Parameters over an engine's own processing: themselves, and loadable again any number of times."""

import copy

import pytest
import torch
from torch import nn

from fixpass.integrations.sglang import engine_parameters, undo
from fixpass.integrations.sglang.engine_parameters import keeping, restore
from fixpass.integrations.sglang.undo import undo_of, unshuffled
from fixpass.runtime.errors import CheckpointError
from helpers.engine_layers import FP8, Loadable, layer, weights


def shuffle(x):
    """aiter's order: 16 rows, 32 columns, cells of 16 bytes."""
    cell = 16 // x.element_size()
    grid = x.view(-1, x.shape[-2] // 16, 16, x.shape[-1] // 32, 32 // cell, cell)
    return grid.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)


def transpose(module):
    module.weight = nn.Parameter(module.weight.t(), requires_grad=False)


def transpose_densely(module):
    module.weight = nn.Parameter(module.weight.t().contiguous(), requires_grad=False)


def shuffled(module):
    new = nn.Parameter(shuffle(module.weight.data), requires_grad=False)
    new.is_shuffled = True
    module.weight = new


def rebind(module):
    module.weight.data = module.weight.data.t().contiguous()


def repack(module):
    packed = module.weight.data.view(torch.uint8).flip(0).reshape(-1, 128).contiguous()
    module.weight = nn.Parameter(packed, requires_grad=False)


def take_away(module):
    module.packed = nn.Parameter(module.weight.data.view(torch.uint8) + 1, requires_grad=False)
    del module.weight


STEPS = [transpose, transpose_densely, shuffled, rebind, repack, take_away]


def processed(values, step):
    """What the engine computes with, without us."""
    module = layer(values)
    step(module)
    return {name: p.data for name, p in module.named_parameters()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [(32, 64), (64, 64)])
def test_loads_and_processing_can_be_repeated(step, shape, monkeypatch):
    monkeypatch.setattr(engine_parameters, "SMALL_BYTES", 0)
    # Compared in several pieces.
    monkeypatch.setattr(undo, "PIECE_BYTES", 1 << 10)
    module = layer(weights(0, *shape))
    first = module.weight
    for seed in range(3):
        if seed:
            restore(module)
            assert type(module.weight) is Loadable
            assert module.weight.output_dim == 0
            assert module.weight._loader == "theirs"
            module.weight.load(weights(seed, *shape))
        with keeping(module):
            step(module)
        want = processed(weights(seed, *shape), step)
        assert set(module._parameters) >= set(want)
        for name, value in want.items():
            found = module._parameters[name]
            assert found.stride() == value.stride()
            assert torch.equal(found.data.view(torch.uint8), value.view(torch.uint8))
        if step is not take_away:
            assert module.weight is first


@pytest.mark.parametrize("step", [transpose, transpose_densely, shuffled, rebind])
def test_an_update_that_brings_nothing_changes_nothing(step):
    module = layer(weights(0))
    with keeping(module):
        step(module)
    want, place = module.weight.data.clone(), module.weight.data_ptr()
    for _ in range(2):
        assert restore(module) == 1
        assert torch.equal(module.weight.data.view(torch.uint8), weights(0).view(torch.uint8))
        with keeping(module):
            step(module)
        assert torch.equal(module.weight.data.view(torch.uint8), want.view(torch.uint8))
        assert module.weight.data_ptr() == place


@pytest.mark.parametrize("step", [repack, take_away])
def test_few_values_are_remembered_where_nothing_can_be_undone(step):
    module = layer(weights(0))
    with keeping(module):
        step(module)
    want = {name: p.data.clone() for name, p in module.named_parameters()}
    restore(module)
    assert torch.equal(module.weight.data.view(torch.uint8), weights(0).view(torch.uint8))
    with keeping(module):
        step(module)
    for name, p in module.named_parameters():
        assert torch.equal(p.data.view(torch.uint8), want[name].view(torch.uint8))


@pytest.mark.parametrize("step", [repack, take_away])
def test_values_that_are_lost_and_not_brought_are_an_error_that_names_them(step, monkeypatch):
    monkeypatch.setattr(engine_parameters, "SMALL_BYTES", 0)
    module = layer(weights(0))
    with keeping(module):
        step(module)
    restore(module)
    with (
        pytest.raises(CheckpointError, match=r"brought no values for weight \(32, 64\)"),
        keeping(module),
    ):
        step(module)


@pytest.mark.parametrize("step", [shuffled, transpose_densely, repack, take_away])
def test_the_engine_computes_in_one_storage_whatever_is_loaded(step):
    module, places = layer(weights(0)), set()
    for seed in range(3):
        if seed:
            restore(module)
            module.weight.load(weights(seed))
        with keeping(module):
            step(module)
        places.add(tuple(p.data_ptr() for p in module.parameters()))
    assert len(places) == 1


def test_what_the_engine_says_of_its_parameter_is_kept():
    module = layer(weights(0))
    with keeping(module):
        shuffled(module)
    assert module.weight.is_shuffled
    assert module.weight._loader == "theirs"


def test_other_names_for_the_parameter_follow():
    module = layer(weights(0))

    def step(module):
        new = nn.Parameter(module.weight.data.t().contiguous(), requires_grad=False)
        module.weight, module.alias = new, new

    with keeping(module):
        step(module)
    assert module.alias is module.weight


def test_only_the_largest_scale_is_had_back_and_an_unset_one_stays_unset():
    unset = torch.finfo(torch.float32).min
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor([2.0, 3.0, unset]), requires_grad=False)
    with keeping(module):
        module.scale = nn.Parameter(module.scale.max(), requires_grad=False)
    assert module.scale.shape == ()
    restore(module)
    assert torch.equal(module.scale, torch.tensor([3.0, 3.0, unset]))


def test_a_scale_that_is_no_maximum_is_not_guessed():
    assert undo_of(torch.tensor([2.0, 3.0]), torch.tensor(0.5)) is None
    assert undo_of(torch.randn(4), torch.randn(4)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, FP8])
def test_a_shuffle_of_experts_is_undone(dtype):
    x = torch.randint(0, 255, (3, 32, 64 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    assert torch.equal(unshuffled(shuffle(x)).view(torch.uint8), x.view(torch.uint8))
    found = undo_of(x, shuffle(x))
    assert torch.equal(found(shuffle(x)).reshape(x.shape).view(torch.uint8), x.view(torch.uint8))


def test_a_module_that_the_engine_leaves_alone_has_nothing_to_restore():
    module = nn.Linear(4, 4)
    want, before = copy.deepcopy(module), module.weight
    with keeping(module):
        pass
    assert restore(module) == 0
    assert module.weight is before
    assert torch.equal(module.weight, want.weight)


def test_what_the_engine_undid_by_itself_is_left_to_it():
    module = layer(weights(0))
    with keeping(module):
        transpose(module)
    module.weight.data = weights(1)
    assert restore(module) == 0
    assert torch.equal(module.weight.data.view(torch.uint8), weights(1).view(torch.uint8))
