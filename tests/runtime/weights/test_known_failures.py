"""Failures of plain PyTorch and of common ways to load, each shown to happen, and what we do.

Every test has two halves: the plain way goes wrong, and the same input goes right here or is
refused with the weights as before.
"""

import contextlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.lock import version
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import FUSED_EXPERTS
from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.runtime.weights.parameter_layout import logical, set_layout
from fixpass.runtime.weights.rebind import copy_or_rebind
from fixpass.runtime.weights.update import update
from helpers.folding import aiter


def layers(value=0.0):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(16)))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model


def state(value):
    return layers(value).state_dict()


def updated(model):
    return sum(bool(param.any()) for param in model.parameters())


def test_one_bad_shape_leaves_the_rest_written():
    bad = state(1.0) | {"9.weight": torch.ones(5, 5)}
    plain, ours = layers(), layers()
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(bad)
    assert updated(plain) == 15
    with pytest.raises(CheckpointError, match=r"does not fit into '9.weight'"):
        reload(ours, bad, progress=False)
    assert updated(ours) == 0


def dying(model=None):
    for index, item in enumerate(state(1.0).items()):
        if index == 8:
            raise ConnectionError("the sender is gone")
        yield item


@pytest.mark.parametrize("mode", ["buffered", "undo_log", "double_buffer"])
def test_a_stream_that_dies_leaves_half_of_the_weights_new(mode):
    plain, ours = layers(), layers()
    params = dict(plain.named_parameters())
    with contextlib.suppress(ConnectionError):
        for name, tensor in dying():
            params[name].data.copy_(tensor)
    assert updated(plain) == 8
    with pytest.raises(ConnectionError):
        reload(ours, dying(), mode, progress=False)
    assert updated(ours) == 0


@pytest.mark.parametrize("mode", ["buffered", "undo_log", "double_buffer"])
def test_a_forward_in_the_middle_of_an_update_sees_a_mixture(mode):
    plain, ours, x = layers(1.0), layers(1.0), torch.ones(1, 4)
    seen = {}

    def stream(model, name):
        for index, item in enumerate(state(2.0).items()):
            if index == 8:
                seen[name] = model(x)[0, 0].item()
            yield item

    params = dict(plain.named_parameters())
    for name, tensor in stream(plain, "plain"):
        params[name].data.copy_(tensor)
    reload(ours, stream(ours, "ours"), mode, progress=False)
    old, new = layers(1.0)(x)[0, 0].item(), layers(2.0)(x)[0, 0].item()
    assert seen["plain"] not in (old, new)
    assert seen["ours"] == old
    assert ours(x)[0, 0].item() == new


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [FP8, torch.uint8])
def test_a_quantised_weight_is_cast_without_its_scale(dtype):
    weight = torch.randn(4, 4) * 0.01
    scale = weight.abs().max() / 100
    stored = {"weight": (weight / scale).to(dtype)}
    plain, ours = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    plain.load_state_dict(stored)
    assert plain.weight.abs().max() > 50 * weight.abs().max()
    before = ours.weight.detach().clone()
    with pytest.raises(CheckpointError, match="mean nothing without their scale"):
        reload(ours, stored, progress=False)
    assert torch.equal(ours.weight, before)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.w2_weight = nn.Parameter(torch.zeros(4, 8, 8))


def test_experts_that_are_stacked_as_they_come_land_in_other_slots():
    stored = {f"experts.{i}.down_proj.weight": torch.full((8, 8), float(i)) for i in range(4)}
    renamed = {name.replace(".1.", ".10."): tensor for name, tensor in stored.items()}
    names = sorted(renamed)
    plain = torch.stack([renamed[name] for name in names])
    ours, mapping = Mixture(), Mapping(experts=(FUSED_EXPERTS,))
    assert plain[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    names = sorted(renamed, key=lambda name: int(name.split(".")[1]))
    assert [renamed[name][0, 0].item() for name in names] == [0.0, 2.0, 3.0, 1.0]
    with pytest.raises(CheckpointError, match="expert 10"):
        reload(ours, renamed, mapping=mapping, progress=False)
    assert not ours.experts.w2_weight.any()
    reload(ours, dict(reversed(stored.items())), mapping=mapping, progress=False)
    assert ours.experts.w2_weight[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_file_that_is_overwritten_changes_weights_that_are_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state(1.0), path)
    plain, ours = layers(), layers()
    mapped = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=path.stat().st_size)
    start = path.stat().st_size - 16 * 64
    for index, layer in enumerate(plain):
        # As a reader that maps the file makes them.
        view = torch.empty(0, dtype=torch.uint8).set_(mapped, start + index * 64, (64,), (1,))
        if view.storage_offset() % 4 == 0:
            layer.weight = nn.Parameter(view.view(torch.float32).view(4, 4))
    reload(ours, path, progress=False)
    assert updated(plain) == updated(ours) == 16
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(16 * 64))
    assert updated(plain) == 0
    assert updated(ours) == 16
    assert load_file(path)["0.weight"].sum() == 0


@pytest.mark.parametrize("change", ["setattr", "assign", "swap_tensors", "to meta"])
def test_a_replaced_parameter_loses_its_loader_and_the_next_load_fails(change):
    plain, ours, new = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(4, 4)
    for model in (plain, ours):
        model.weight.weight_loader = print
    if change == "setattr":
        plain.weight = nn.Parameter(new)
    elif change == "assign":
        plain.load_state_dict({"weight": new, "bias": torch.ones(4)}, assign=True)
    elif change == "swap_tensors":
        torch.utils.swap_tensors(plain.weight, nn.Parameter(new))
    else:
        plain.to("meta")
    with pytest.raises(AttributeError):
        _ = plain.weight.weight_loader
    copy_or_rebind(ours.weight, nn.Parameter(new))
    assert ours.weight.weight_loader is print
    assert torch.equal(ours.weight, new)


def test_dims_that_follow_a_transpose_load_wrong_data_in_silence():
    """N=8, K=16 with two ranks: the loader uses one dim for the parameter and the checkpoint."""

    def loader(param, loaded, rank):
        size = param.data.shape[param.output_dim]
        param.data.copy_(loaded.narrow(param.output_dim, rank * size, size).view(param.shape))

    whole = torch.arange(256.0).view(16, 16)
    wanted = whole[8:].t()
    plain = nn.Parameter(torch.zeros(8, 16).t().contiguous())
    plain.output_dim = 1
    loader(plain, whole, 1)
    assert not torch.equal(plain, wanted)
    ours = nn.Parameter(torch.zeros(8, 16))
    ours.output_dim = 0
    set_layout(ours, "transposed_dense")
    for _ in range(3):
        with checkpoint_layout([ours]):
            loader(ours, whole, 1)
        assert torch.equal(ours, wanted)


def test_shuffling_twice_is_wrong_and_folding_twice_is_not():
    weight = torch.randn(32, 64)
    assert not torch.equal(aiter(aiter(weight)), aiter(weight))
    param = nn.Parameter(weight.clone())
    set_layout(param, "aiter_16x16")
    set_layout(param, "aiter_16x16")
    assert torch.equal(param, aiter(weight))


def test_shuffling_all_experts_after_one_was_loaded_spoils_the_others():
    old, new = torch.randn(4, 32, 64), torch.randn(32, 64)
    plain = aiter(old)
    plain[0] = new
    plain = aiter(plain)
    assert not torch.equal(plain[1:], aiter(old)[1:])
    model = nn.Module()
    model.weight = nn.Parameter(old.clone())
    set_layouts(model, {"weight": "aiter_16x16"})
    with update(model, scope="parts") as tx:
        tx.load("weight", new, start=(0,))
    assert torch.equal(model.weight, aiter(torch.cat([new[None], old[1:]])))
    assert torch.equal(logical(model.weight)[1:], old[1:])


@pytest.mark.parametrize("bad", ["empty", "a layer missing", "NaN"])
def test_an_update_that_is_empty_or_lacks_a_layer_or_is_nan_passes_in_silence(bad):
    stored = state(1.0)
    if bad == "empty":
        stored = {}
    elif bad == "a layer missing":
        del stored["7.weight"]
    else:
        stored["7.weight"] = torch.full((4, 4), float("nan"))
    plain, ours = layers(), layers()
    plain.load_state_dict(stored, strict=False)
    with pytest.raises((CheckpointError, UpdateError), match=r"missing|NaN"):
        reload(ours, stored, finite=True, progress=False)
    assert updated(ours) == version(ours) == 0
