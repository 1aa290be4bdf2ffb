"""Folds of parameters: bit for bit the plain permute, in place, and undone by their inverse."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layout_plan import resolve
from fixpass.runtime.weights.layouts import Alias, Bytes, Pad, Permute, Stride, WeightLayout
from fixpass.runtime.weights.parameter_layout import layout_of, logical, reset_layout, set_layout
from helpers.folding import REFERENCES, Allocations, aiter, bits, equal, parameter

BF16, FP8, INT4 = torch.bfloat16, torch.float8_e4m3fn, torch.uint8
STAGING = 4 << 20


def check_layout(param, layout, wanted):
    """Set the layout, compare with `wanted`, reset it, compare with the values before."""
    before, pointer, attributes = param.detach().clone(), param.data_ptr(), dict(vars(param))
    assert set_layout(param, layout)
    assert equal(param, wanted)
    assert equal(logical(param), before)
    assert param.data_ptr() == pointer
    assert vars(param) == attributes
    assert reset_layout(param)
    assert equal(param, before)
    assert param.is_contiguous()
    assert param.data_ptr() == pointer


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (layout, dtype)
        for layout in REFERENCES
        for dtype in (BF16, torch.float32, FP8, INT4, torch.int8)
        # A weight of 4 bits lies in one byte.
        if dtype.itemsize == 1 or not layout.endswith("int4")
    ],
)
@pytest.mark.parametrize("shape", [(32, 64), (3, 64, 128)])
def test_a_layout_is_the_plain_permute_bit_for_bit(layout, dtype, shape):
    param = parameter(*shape, dtype=dtype)
    check_layout(param, layout, REFERENCES[layout](param.detach().clone()))


def test_set_layout_keeps_object_class_attributes_and_requires_grad():
    class Weight(nn.Parameter):
        pass

    param = Weight(parameter(32, 64).data)
    param.weight_loader, param.input_dim = print, 1
    before = dict(vars(param))
    set_layout(param, "aiter_16x16")
    assert type(param) is Weight
    assert vars(param) == before
    assert param.requires_grad


def test_setting_a_layout_twice_is_setting_it_once():
    param = parameter(32, 64)
    wanted = aiter(param.detach().clone())
    assert set_layout(param, "aiter_16x16")
    assert not set_layout(param, "aiter_16x16")
    assert equal(param, wanted)
    assert layout_of(param).name == "aiter_16x16"
    assert reset_layout(param)
    assert not reset_layout(param)
    assert layout_of(param) is None


def test_the_state_is_not_lost_with_the_attributes_nor_copied_with_them():
    param, other = parameter(32, 64), parameter(32, 64)
    set_layout(param, "aiter_16x16")
    other.__dict__.update(vars(param))
    vars(param).clear()
    assert not set_layout(param, "aiter_16x16")
    assert layout_of(other) is None


def test_a_square_transpose_moves_bytes_and_its_shape_says_nothing():
    param = parameter(64, 64, dtype=torch.float32)
    before = param.detach().clone()
    set_layout(param, "transposed_dense")
    assert equal(param, before.t())
    assert param.is_contiguous()
    reset_layout(param)
    assert equal(param, before)


def test_strides_alone_leave_the_values_where_they_are():
    param = parameter(48, 64, dtype=torch.float32)
    before = param.detach().clone()
    set_layout(param, "column_major")
    assert param.stride() == (1, 48)
    assert equal(param, before)
    set_layout(other := parameter(48, 64, dtype=torch.float32), "transposed")
    assert other.shape == (64, 48)
    assert equal(other, before.t())


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1536, 2048), "transposed_dense"),  # coprime parts, small cells
        ((2100, 1000), "transposed_dense"),
        ((1024, 2048), "transposed_dense"),
        ((2, 1536, 1025), "transposed_dense"),
        ((2048, 1536), "gate_up_interleaved"),  # large cells, by cycles
        ((2048, 1536), "gate_up_interleaved_16x16"),
        ((4, 1536, 512), "aiter_16x16"),
    ],
)
def test_a_layout_beyond_the_staging_buffer_is_exact_and_takes_no_second_copy(shape, layout):
    param = parameter(*shape, dtype=torch.float32)
    wanted = REFERENCES[layout](param.detach().clone())
    before = param.detach().clone()
    with Allocations() as seen:
        set_layout(param, layout)
    assert seen.largest <= STAGING
    assert equal(param, wanted)
    with Allocations() as seen:
        reset_layout(param)
    assert seen.largest <= STAGING
    assert equal(param, before)


def test_all_experts_in_one_parameter_are_permuted_each_by_itself():
    experts = WeightLayout("experts", (Permute(((-1,), (-1,)), (1, 0)),))
    param = parameter(4, 48, 64)
    values = param.detach().clone()
    set_layout(param, experts)
    assert torch.equal(bits(param).view(4, 64, 48), bits(values).mT)
    plan = resolve(experts, (4, 48, 64), 2)
    assert (plan.order[0], plan.sizes[0]) == (0, 4)


def test_a_band_of_16_rows_keeps_its_place():
    plan = resolve(
        WeightLayout("x", (Permute(((-1, 16), (-1, Bytes(16))), (0, 2, 1, 3)),)), (4096, 14336), 2
    )
    assert (plan.order[0], plan.sizes[0]) == (0, 4096 // 16)


def test_padding_is_added_and_leaves_again():
    padded = WeightLayout("padded", (Pad((16, 32), value=2.0), *_aiter_steps()))
    param = nn.Parameter(torch.randn(19, 40))
    before = param.detach().clone()
    set_layout(param, padded)
    wanted = torch.full((32, 64), 2.0)
    wanted[:19, :40] = before
    assert torch.equal(param, aiter(wanted))
    assert torch.equal(logical(param), before)
    reset_layout(param)
    assert torch.equal(param, before)


def _aiter_steps():
    return (Permute(((-1, 16), (-1, Bytes(16))), (0, 2, 1, 3)),)


def test_a_part_of_a_larger_storage_gets_its_layout_in_place():
    pack = parameter(64, 64)
    before = pack.detach().clone()
    param = nn.Parameter(pack.detach()[16:48], requires_grad=False)
    set_layout(param, "aiter_16x16")
    assert equal(pack[16:48], aiter(before[16:48]))
    assert equal(pack[:16], before[:16])
    assert equal(pack[48:], before[48:])


def test_a_graph_of_autograd_that_saved_the_weight_is_told():
    param = parameter(32, 64, dtype=torch.float32)
    loss = torch.nn.functional.linear(torch.randn(2, 64, requires_grad=True), param).sum()
    set_layout(param, "aiter_16x16")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refused(match, param, layout="aiter_16x16"):
    before = param if param.device.type == "meta" or param.is_sparse else param.detach().clone()
    with pytest.raises(LayoutError, match=match):
        set_layout(param, layout, "layers.0.weight")
    if before is not param:
        assert equal(param, before)
    assert layout_of(param) is None


def test_a_block_that_does_not_divide_the_shape_is_refused():
    refused(
        r"aiter_16x16 does not fit shape \(24, 64\): 24 is no multiple of 16", parameter(24, 64)
    )
    refused(r"does not fit shape \(32, 48\): 48 is no multiple of 32", parameter(32, 48))
    refused(r"shape \(32,\)", parameter(32))
    refused(r"shape \(0, 64\): it has no elements", parameter(0, 64))
    refused(r"\(3, 8\): 3 is no multiple", parameter(3, 8), "gate_up_interleaved")


def test_an_unknown_name_lists_the_known_ones():
    refused("unknown layout 'aiter_32x16'; known: aiter_16x16, ", parameter(32, 64), "aiter_32x16")


def test_a_second_layout_is_refused_and_both_are_named():
    param = parameter(32, 64)
    set_layout(param, "aiter_16x16")
    with pytest.raises(
        LayoutError, match=r"has layout aiter_16x16 .* given column_major: call .*reset_layout"
    ):
        set_layout(param, "column_major")


def test_parameters_without_memory_of_their_own_are_refused():
    refused("on the meta device", nn.Parameter(torch.empty(32, 64, device="meta")))
    refused("sparse", nn.Parameter(torch.eye(32).to_sparse()))
    refused("starts from a contiguous one", nn.Parameter(torch.randn(64, 32).t()))


def test_a_layout_of_several_parameters_is_not_for_one():
    refused("is of several parameters. fixpass.weights.pack", parameter(2, 2), "qkv_pack")


def test_other_data_in_a_parameter_with_a_layout_is_noticed_before_bytes_move():
    param = parameter(32, 64)
    set_layout(param, "aiter_16x16")
    param.data = torch.zeros(32, 64, dtype=BF16)
    with pytest.raises(LayoutError, match=r"was given layout .*, and then other memory"):
        reset_layout(param, "layers.0.weight")
    assert not param.any()


def test_layouts_that_cannot_be_resolved_are_refused_when_they_are_declared():
    for steps in (
        (Alias(), Permute(((-1,),), (0,))),
        (Permute(((-1,),), (0,)), Pad((2,))),
        (Stride((1, 0), (0, 1)), Permute(((-1,),), (0,))),
    ):
        with pytest.raises(LayoutError, match="layout mine"):
            WeightLayout("mine", steps)
