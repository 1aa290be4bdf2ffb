"""Which changes of a weight are seen: every kind of write, and the one kind that is not."""

import warnings

import pytest
import torch
from torch import nn

from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.runtime.weights.update import update
from fixpass.runtime.weights.weight_version import (
    UnseenWriteWarning,
    WeightVersion,
    announce_loads,
    fingerprint,
    watch,
    writes,
)


def model_of():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    model.register_buffer("steps", torch.zeros(8))
    watch(model)
    return model


NEW = torch.full((32, 64), 0.5)


def _copy(model):
    with torch.no_grad():
        model[0].weight.copy_(NEW)


def _one_element(model):
    with torch.no_grad():
        model[0].weight[3, 5] = 1.0


def _step(model):
    model[0].weight.grad = torch.ones(32, 64)
    torch.optim.SGD([model[0].weight], lr=0.1).step()


def _foreach_step(model):
    model[0].weight.grad = torch.ones(32, 64)
    torch.optim.AdamW([model[0].weight], lr=0.1, foreach=True).step()


def _fused_step(model):
    model[0].weight.grad = torch.ones(32, 64)
    torch.optim.AdamW([model[0].weight], lr=0.1, fused=True).step()


def _load_state_dict(model):
    model.load_state_dict({"0.weight": NEW}, strict=False)


def _init(model):
    nn.init.normal_(model[0].weight)


def _data(model):
    model[0].weight.data = NEW.clone()


def _swap(model):
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(NEW.clone()))


def _announced_loader(model):
    model[0].weight.weight_loader = lambda param, loaded: param.data.copy_(loaded)
    assert announce_loads(model) == ("0.weight",)
    assert announce_loads(model) == ()
    model[0].weight.weight_loader(model[0].weight, NEW)


def _increment(model):
    model[0].weight.data.copy_(NEW)
    torch.autograd.graph.increment_version(model[0].weight)


def _buffer(model):
    model.steps.add_(1)


SEEN = (
    _copy,
    _one_element,
    _step,
    _foreach_step,
    _fused_step,
    _load_state_dict,
    _init,
    _data,
    _swap,
    _announced_loader,
    _increment,
    _buffer,
)


@pytest.mark.parametrize("write", SEEN)
def test_a_write_that_torch_counts_is_seen(write):
    model = model_of()
    assert not writes(model)
    write(model)
    found = writes(model)
    assert found.seen == (("steps",) if write is _buffer else ("0.weight",))
    assert not found.unseen
    assert not writes(model)


def _rebind(model):
    model[0].weight = nn.Parameter(NEW.clone())


def _assign(model):
    model.load_state_dict({"0.weight": NEW.clone()}, strict=False, assign=True)


@pytest.mark.parametrize("write", [_rebind, _assign])
def test_another_object_under_the_name_is_seen(write):
    model = model_of()
    write(model)
    assert writes(model).replaced == ("0.weight",)
    assert not writes(model)


def _data_copy(model):
    model[0].weight.data.copy_(NEW)


def _data_narrow(model):
    model[0].weight.data.narrow(0, 8, 16).copy_(NEW[:16])


def _numpy(model):
    model[0].weight.detach().numpy()[:] = 0.5


def _storage(model):
    model[0].weight.untyped_storage().copy_(NEW.untyped_storage())


@pytest.mark.parametrize("write", [_data_copy, _data_narrow, _numpy, _storage])
def test_a_write_that_torch_does_not_signal_warns(write):
    model = model_of()
    write(model)
    with pytest.warns(UnseenWriteWarning, match="among them 0.weight: .*may be stale"):
        found = writes(model)
    assert found.unseen == ("0.weight",)
    assert not writes(model)


def test_a_few_values_that_torch_does_not_signal_are_found_only_by_looking_at_all():
    model = model_of()
    model[0].weight.detach().numpy()[0, 0] = 9.0
    assert not writes(model)
    watch(model, samples=0)
    model[0].weight.detach().numpy()[0, 1] = 9.0
    with pytest.warns(UnseenWriteWarning):
        assert writes(model).unseen == ("0.weight",)


@pytest.mark.parametrize("mode", ["buffered", "undo_log", "double_buffer"])
def test_an_update_is_known_to_the_watch(mode):
    model = model_of()
    set_layouts(model, {"0.weight": "aiter_16x16"})
    writes(model)
    with update(model, mode, scope="parameters") as tx:
        tx.load("0.weight", NEW)
    assert not writes(model)


def test_a_model_that_was_not_watched_is_from_now_on():
    model = nn.Linear(4, 4)
    assert not writes(model)
    _ = model.weight.detach().fill_(1.0)
    assert writes(torch.compile(model, backend="eager")).seen == ("weight",)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(64, 64, dtype=torch.float8_e4m3fn),
        torch.zeros(64, 64, dtype=torch.bool),
        torch.zeros(64, 32).t(),
        torch.zeros(64, 64)[:, ::2],
    ],
)
def test_every_tensor_has_a_fingerprint(tensor):
    before = fingerprint(tensor)
    assert before == fingerprint(tensor.clone()) or not tensor.is_contiguous()
    if tensor.numel():
        tensor.copy_(torch.ones_like(tensor))
        assert fingerprint(tensor) != before


def test_no_warning_without_a_write():
    model = model_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 64)).sum().backward()
        assert not writes(model)


def test_memory_that_was_freed_and_taken_again_is_told_apart():
    """One parameter, one address, one version, the same values in the words that are compared."""
    weight = nn.Parameter(torch.randn(4, 4))
    source = WeightVersion(weight)
    assert source.is_same(weight)
    storage = weight.untyped_storage()
    weight.data = torch.empty(0)
    again = torch.empty(0)
    again.set_(storage, 0, (4, 4))
    # The very same storage is no other memory.
    weight.data = again
    assert source.is_same(weight)
    del storage, again
    weight.data = weight.data.clone()
    assert not source.is_same(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1,), (3,), (17, 5), (64, 128), (0, 4)])
def test_every_shape_can_be_watched(dtype, shape):
    weight = torch.ones(shape).to(dtype)
    source = WeightVersion(weight)
    assert source.is_same(weight)
    if weight.nbytes >= 64:
        weight.data.copy_(torch.full(shape, 2.0).to(dtype))
        assert not source.is_same(weight)


def test_a_narrow_view_is_watched_within_its_own_memory():
    whole = torch.randn(64, 64)
    weight = nn.Parameter(whole[:, 7:9])
    source = WeightVersion(weight)
    assert source.is_same(weight)
    weight.data.copy_(torch.randn(64, 2))
    assert not source.is_same(weight)


def test_a_write_that_is_not_counted_and_too_small_to_be_seen_is_announced_by_its_version():
    weight = nn.Parameter(torch.randn(1024, 1024))
    source = WeightVersion(weight)
    weight.data[5, 5] += 1
    assert source.is_same(weight)
    torch.autograd.graph.increment_version(weight)
    assert not source.is_same(weight)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_part_of_a_larger_tensor_is_compared_by_its_own_words_alone(dtype, dims):
    whole = torch.zeros(4, 64, 64, dtype=dtype).permute(0, *(dim + 1 for dim in dims))
    parts = [whole[:, 8:24], whole[:, :, 40:43], whole[1:3, 24:, 3:40], whole[2]]
    for part in parts:
        version = WeightVersion(part)
        others = torch.ones_like(whole, dtype=torch.bool)
        others.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(False)
        whole.data[others.cpu()] += 1
        assert version.is_same(part)
        part.data.copy_(part.data + 1)
        assert not version.is_same(part)


def test_an_expanded_weight_is_watched():
    weight = torch.zeros(64).expand(32, 64)
    version = WeightVersion(weight)
    assert version.is_same(weight)
    weight.data[0] += 1
    assert not version.is_same(weight)
