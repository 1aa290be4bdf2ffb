"""state_dict, deepcopy, torch.save and safetensors of models with layouts: logical values, or refused."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.module_hooks import reset_layouts, set_layouts
from fixpass.runtime.weights.parameter_layout import layout_of, reset_layout
from helpers.folding import aiter


def model_of():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    model[0].weight.weight_loader = print
    return model


LAYOUTS = {"0.weight": "aiter_16x16", "2.weight": "transposed"}


@pytest.fixture
def model():
    model = model_of()
    model.wanted = {name: value.clone() for name, value in model.state_dict().items()}
    set_layouts(model, LAYOUTS)
    return model


def same(state, wanted):
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


def test_a_state_dict_shows_logical_values(model):
    assert model[2].weight.shape == (32, 64)
    assert same(model.state_dict(), model.wanted)
    assert same(
        model[0].state_dict(),
        {"weight": model.wanted["0.weight"], "bias": model.wanted["0.bias"]},
    )


def test_a_state_dict_that_was_saved_is_logical(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert same(torch.load(tmp_path / "model.pt"), model.wanted)
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    assert same(load_file(tmp_path / "file.safetensors"), model.wanted)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert same(load_file(tmp_path / "model.safetensors"), model.wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_logical_values_and_keeps_the_layout(model, assign):
    param, pointer = model[0].weight, model[0].weight.data_ptr()
    for _ in range(2):
        source = model_of()
        model.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(model[0].weight, aiter(source[0].weight.detach()))
        assert torch.equal(model[2].weight, source[2].weight.t())
        assert model[0].weight is param
        assert param.data_ptr() == pointer
        assert param.weight_loader is print


def test_a_state_dict_made_in_the_checkpoint_layout_keeps_its_values(model):
    with checkpoint_layout(model.parameters()):
        state = model.state_dict()
    assert same(state, model.wanted)


@pytest.mark.parametrize(
    "work", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())]
)
def test_copies_of_the_module_are_refused_until_layouts_are_reset(model, work):
    with pytest.raises(
        LayoutError, match=r"Linear has weights with a layout \(weight\).*reset_layouts"
    ):
        work(model)
    reset_layouts(model)
    del model[0].weight.weight_loader
    work(model)
    copied = copy.deepcopy(model)
    assert same(copied.state_dict(), model.wanted)
    assert "__reduce_ex__" not in vars(copied[0])


def test_a_module_is_protected_again_after_it_was_copied(model):
    reset_layouts(model)
    copy.deepcopy(model)
    set_layouts(model, LAYOUTS)
    assert same(model.state_dict(), model.wanted)
    model.load_state_dict(model.wanted)
    assert same(model.state_dict(), model.wanted)
    with pytest.raises(LayoutError):
        copy.deepcopy(model)


def test_strides_alone_need_no_protection():
    model = nn.Sequential(nn.Linear(64, 32))
    set_layouts(model, {"0.weight": "column_major"})
    copied = copy.deepcopy(model)
    assert torch.equal(copied[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("layouts", "match"),
    [
        (
            {"0.weight": "aiter_16x16", "1.weight": "transposed"},
            "no parameter '1.weight'; there are",
        ),
        ({"0.weight": "aiter_16x16", "2.weight": "what"}, "unknown layout 'what'"),
        ({"0.weight": "aiter_16x16", "0.bias": "aiter_16x16"}, "'0.bias'|shape"),
    ],
)
def test_all_names_get_their_layout_or_none(layouts, match):
    model = model_of()
    before = model[0].weight.detach().clone()
    with pytest.raises(LayoutError, match=match):
        set_layouts(model, layouts)
    assert layout_of(model[0].weight) is None
    assert torch.equal(model[0].weight, before)


def test_a_parameter_whose_layout_was_reset_loads_as_ever(model):
    reset_layout(model[0].weight)
    source = model_of()
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight)


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)]
)
def test_a_model_with_layouts_that_was_cast_is_refused_and_not_read_in_another_layout(
    model, change
):
    change(model)
    wanted = {name: value.to(model[0].weight.dtype) for name, value in model.wanted.items()}
    for work in (
        model.state_dict,
        lambda: model.load_state_dict(wanted),
        lambda: reload(model, wanted, progress=False),
    ):
        with pytest.raises(
            LayoutError,
            match=r"'0.weight' was given layout .*reset_layout before a parameter is",
        ):
            work()


def test_a_parameter_with_a_layout_is_not_swapped_for_another(model):
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(32, 64)))
    assert same(model.state_dict(), model.wanted)
