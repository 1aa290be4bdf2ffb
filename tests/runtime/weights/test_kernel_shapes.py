"""Layouts that exchange halves, and layouts whose kernel sees another shape than the checkpoint."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layouts import Permute, SwapHalves, WeightLayout
from fixpass.runtime.weights.load import load, reload
from fixpass.runtime.weights.parameter_layout import logical, reset_layout, set_layout
from fixpass.runtime.weights.permute import STAGING

BLOCKS = WeightLayout("blocks", (Permute(((-1,), (-1, 8)), (1, 0, 2), shows_factors=True),))


def swapped(values, dim=-2):
    first, second = values.chunk(2, dim)
    return torch.cat([second, first], dim)


@pytest.mark.parametrize("shape", [(8, 4), (2, 8, 4), (2, (STAGING >> 11) + 2, 1024)])
def test_w13_becomes_w31_in_place_and_back(shape):
    values = torch.randn(shape)
    param = nn.Parameter(values.clone())
    address = param.data_ptr()
    set_layout(param, "up_gate")
    assert param.data_ptr() == address
    assert torch.equal(param, swapped(values))
    assert torch.equal(logical(param), values)
    reset_layout(param)
    assert torch.equal(param, values)


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_any_even_dimension_may_be_swapped(dim):
    values = torch.randn(2, 6, 4)
    param = nn.Parameter(values.clone())
    set_layout(param, WeightLayout("swap", (SwapHalves(dim),)))
    assert torch.equal(param, swapped(values, dim))


@pytest.mark.parametrize("tail", [(3, 5), (4,)])
def test_an_odd_dimension_has_no_halves(tail):
    with pytest.raises(LayoutError, match="no halves along dimension -2"):
        set_layout(nn.Parameter(torch.zeros(tail)), "up_gate")


def test_swapped_halves_may_then_go_into_tiles():
    values = torch.randn(2, 64, 32)
    tiles = Permute(((-1, 16), (-1, 8)), (0, 2, 1, 3))
    both, tiled = nn.Parameter(values.clone()), nn.Parameter(swapped(values))
    set_layout(both, WeightLayout("both", (SwapHalves(), tiles)))
    set_layout(tiled, WeightLayout("tiles", (tiles,)))
    assert torch.equal(both, tiled)


def test_a_load_fills_the_right_halves():
    model = nn.Linear(4, 8, bias=False)
    stored = {"weight": torch.randn(8, 4)}
    set_layout(model.weight, "up_gate")
    load(model, stored, progress=False)
    assert torch.equal(model.weight, swapped(stored["weight"]))


def test_a_kernel_sees_blocks_and_the_checkpoint_sees_a_matrix():
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(3, 6, 16))
    before = model.w.detach().clone()
    set_layout(model.w, BLOCKS)
    assert model.w.shape == (3, 2, 6, 8)
    assert torch.equal(model.w, before.view(3, 6, 2, 8).transpose(1, 2))
    stored = {"w": torch.randn(3, 6, 16)}
    reload(model, stored, progress=False)
    assert torch.equal(model.w, stored["w"].view(3, 6, 2, 8).transpose(1, 2))
    reset_layout(model.w)
    assert torch.equal(model.w, stored["w"])


def test_blocks_come_last():
    with pytest.raises(LayoutError, match="comes last"):
        WeightLayout("no", (*BLOCKS.steps, SwapHalves()))
