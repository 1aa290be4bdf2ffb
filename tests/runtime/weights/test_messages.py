"""Errors and warnings of loads and updates name the tensors and the way out."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import CheckpointError
from fixpass.weights import load, reload, update


@pytest.mark.parametrize(
    ("stored", "rename"),
    [
        ("detector.vision_encoder.weight", "Rename('.vision_encoder.', '.vision.', 'inside')"),
        ("model.detector.vision.weight", "Rename('model.', '')"),
        ("detector.vision.kernel", "Rename('.kernel', '.weight', 'suffix')"),
    ],
)
def test_a_tensor_of_another_name_and_the_same_shape_is_pointed_out(stored, rename):
    model = nn.ModuleDict({"detector": nn.ModuleDict({"vision": nn.Linear(3, 5, bias=False)})})
    with pytest.raises(CheckpointError) as caught:
        load(model, {stored: torch.ones(5, 3)})
    assert f"'{stored}' looks like 'detector.vision.weight'" in str(caught.value)
    assert rename in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        load(model, {stored: torch.ones(5, 4)})
    assert "looks like" not in str(caught.value)


def test_escapes_in_names_do_not_reach_a_terminal():
    with pytest.raises(CheckpointError) as caught:
        load(nn.Linear(2, 2), {"\x1b[2J\x07evil": torch.ones(1)})
    assert "\x1b" not in str(caught.value)
    assert r"\x1b[2J\x07evil" in str(caught.value)


def test_a_quantised_weight_that_is_updated_without_its_scale_is_said():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)
    model.other = nn.Linear(2, 2, bias=False)
    new = {"weight": torch.ones(4, 4, dtype=torch.int8)}
    said = pytest.warns(UserWarning, match="scales that were not loaded: weight_scale")
    with said, update(model, scope="parameters") as tx:
        tx.load_state_dict(new)
    with update(model, scope="parameters") as tx:
        tx.load_state_dict(new | {"weight_scale": torch.ones(1)})
    with update(model, scope="parameters") as tx:
        tx.load("other.weight", torch.ones(2, 2))


def _updated(model, state):
    with update(model) as tx:
        tx.load_state_dict(state)


@pytest.mark.parametrize("way", [load, reload, _updated])
def test_a_warning_names_the_line_of_the_caller(way):
    state = {"weight": torch.ones(2, 2), "weight_scale": torch.ones(2)}
    with pytest.warns(UserWarning, match="scales that no parameter takes: weight_scale") as caught:
        way(nn.Linear(2, 2, bias=False), state)
    assert [warning.filename for warning in caught] == [__file__]
