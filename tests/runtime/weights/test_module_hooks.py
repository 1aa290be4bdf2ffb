"""state_dict, deepcopy, torch.save and safetensors of folded models: logical values, or refused."""

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
from fixpass.runtime.weights.relayout import layout_of, reset_layout
from helpers.folding import aiter


def model_of():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    model[0].weight.weight_loader = print
    return model


LAYOUTS = {"0.weight": "aiter_16x16", "2.weight": "transposed"}


@pytest.fixture
def folded():
    model = model_of()
    model.wanted = {name: value.clone() for name, value in model.state_dict().items()}
    set_layouts(model, LAYOUTS)
    return model


def same(state, wanted):
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


def test_a_state_dict_shows_logical_values(folded):
    assert folded[2].weight.shape == (32, 64)
    assert same(folded.state_dict(), folded.wanted)
    assert same(
        folded[0].state_dict(),
        {"weight": folded.wanted["0.weight"], "bias": folded.wanted["0.bias"]},
    )


def test_a_state_dict_that_was_saved_is_logical(folded, tmp_path):
    torch.save(folded.state_dict(), tmp_path / "model.pt")
    assert same(torch.load(tmp_path / "model.pt"), folded.wanted)
    save_file(folded.state_dict(), tmp_path / "file.safetensors")
    assert same(load_file(tmp_path / "file.safetensors"), folded.wanted)
    save_model(folded, str(tmp_path / "model.safetensors"))
    assert same(load_file(tmp_path / "model.safetensors"), folded.wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_logical_values_and_keeps_the_fold(folded, assign):
    param, pointer = folded[0].weight, folded[0].weight.data_ptr()
    for _ in range(2):
        source = model_of()
        folded.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(folded[0].weight, aiter(source[0].weight.detach()))
        assert torch.equal(folded[2].weight, source[2].weight.t())
        assert folded[0].weight is param
        assert param.data_ptr() == pointer
        assert param.weight_loader is print


def test_a_state_dict_in_a_window_keeps_its_values_when_the_window_closes(folded):
    with checkpoint_layout(folded.parameters()):
        state = folded.state_dict()
    assert same(state, folded.wanted)


@pytest.mark.parametrize(
    "work", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())]
)
def test_copies_of_the_module_are_refused_until_it_is_unfolded(folded, work):
    with pytest.raises(
        LayoutError, match=r"Linear has weights with a layout \(weight\).*reset_layouts"
    ):
        work(folded)
    reset_layouts(folded)
    del folded[0].weight.weight_loader
    work(folded)
    copied = copy.deepcopy(folded)
    assert same(copied.state_dict(), folded.wanted)
    assert "__reduce_ex__" not in vars(copied[0])


def test_a_module_is_protected_again_after_it_was_copied(folded):
    reset_layouts(folded)
    copy.deepcopy(folded)
    set_layouts(folded, LAYOUTS)
    assert same(folded.state_dict(), folded.wanted)
    folded.load_state_dict(folded.wanted)
    assert same(folded.state_dict(), folded.wanted)
    with pytest.raises(LayoutError):
        copy.deepcopy(folded)


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
def test_all_names_are_folded_or_none(layouts, match):
    model = model_of()
    before = model[0].weight.detach().clone()
    with pytest.raises(LayoutError, match=match):
        set_layouts(model, layouts)
    assert layout_of(model[0].weight) is None
    assert torch.equal(model[0].weight, before)


def test_an_unfolded_parameter_loads_as_ever(folded):
    reset_layout(folded[0].weight)
    source = model_of()
    folded.load_state_dict(source.state_dict())
    assert torch.equal(folded[0].weight, source[0].weight)


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)]
)
def test_a_folded_model_that_was_cast_is_refused_and_not_read_in_another_layout(folded, change):
    change(folded)
    wanted = {name: value.to(folded[0].weight.dtype) for name, value in folded.wanted.items()}
    for work in (
        folded.state_dict,
        lambda: folded.load_state_dict(wanted),
        lambda: reload(folded, wanted, progress=False),
    ):
        with pytest.raises(
            LayoutError,
            match=r"'0.weight' was given layout .*reset_layout before a parameter is",
        ):
            work()


def test_a_folded_parameter_is_not_swapped_for_another(folded):
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(folded[0].weight, nn.Parameter(torch.ones(32, 64)))
    assert same(folded.state_dict(), folded.wanted)
