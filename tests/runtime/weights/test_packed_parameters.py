"""Parameters as views of one pack: loading any of them is loading the pack."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layouts import Alias, WeightLayout
from fixpass.runtime.weights.parameter_layout import packed, set_layout
from fixpass.runtime.weights.rebind import has_left_pack, pack, return_to_pack, unpack


def three():
    params = [nn.Parameter(torch.randn(rows, 8)) for rows in (8, 4, 4)]
    for index, param in enumerate(params):
        param.weight_loader = index
    return params


def test_a_pack_holds_all_and_each_stays_the_parameter_it_was():
    params = three()
    ids, wanted = [id(p) for p in params], torch.cat([p.detach() for p in params])
    whole = pack(params)
    assert torch.equal(whole, wanted)
    assert [id(p) for p in params] == ids
    assert [p.weight_loader for p in params] == [0, 1, 2]
    assert all(p.untyped_storage().data_ptr() == whole.data_ptr() for p in params)
    assert pack(params) is whole


@pytest.mark.parametrize("write", ["copy_", "data.copy_", "step", "load_state_dict"])
def test_every_write_to_a_parameter_is_a_write_to_the_pack(write):
    params = three()
    whole, new = pack(params), torch.randn(4, 8)
    if write == "copy_":
        with torch.no_grad():
            params[1].copy_(new)
    elif write == "data.copy_":
        params[1].data.copy_(new)
    elif write == "step":
        new = params[1].detach() - 1
        params[1].grad = torch.ones(4, 8)
        torch.optim.SGD([params[1]], lr=1.0).step()
    else:
        module = nn.ParameterList(params)
        module.load_state_dict(module.state_dict() | {"1": new})
    assert torch.equal(whole[8:12], new)


def test_a_parameter_that_was_given_other_memory_is_noticed_and_brought_back():
    params = three()
    whole, new = pack(params), torch.randn(4, 8)
    params[1].data = new
    assert [has_left_pack(p) for p in params] == [False, True, False]
    return_to_pack(params[1])
    assert torch.equal(whole[8:12], new)
    assert not has_left_pack(params[1])
    params[2].data = torch.randn(5, 8)
    with pytest.raises(LayoutError, match=r"replaced by torch.float32 \(5, 8\)"):
        return_to_pack(params[2])


def test_unpacking_gives_memory_of_its_own_back():
    params = three()
    whole = pack(params)
    assert unpack(params[0])
    assert not unpack(params[0])
    assert packed(params[0]) is None
    assert params[0].untyped_storage().data_ptr() != whole.data_ptr()
    assert torch.equal(params[0], whole[:8])


def test_a_pack_along_another_dimension():
    params = [nn.Parameter(torch.randn(4, n)) for n in (2, 6)]
    wanted = torch.cat([p.detach() for p in params], 1)
    assert torch.equal(pack(params, WeightLayout("columns", (Alias(1),))), wanted)


def test_what_does_not_go_together_is_refused_and_left_alone():
    q, k, v = three()
    for params, match in (
        ([q, q], "given twice"),
        ([q, nn.Parameter(torch.randn(4, 9))], r"parameter 1, .*does not fit \(8, 8\) along"),
        ([q, nn.Parameter(torch.randn(4, 8).bfloat16())], "does not go with"),
    ):
        with pytest.raises(LayoutError, match=match):
            pack(params)
    with pytest.raises(LayoutError, match="is of one parameter"):
        pack([q, k], "aiter_16x16")
    pack([k, v])
    with pytest.raises(LayoutError, match="has a layout or pack already"):
        pack([q, k])
    assert packed(q) is None


def test_a_packed_parameter_gets_no_layout_of_its_own():
    q, k = (nn.Parameter(torch.randn(32, 64)) for _ in range(2))
    pack([q, k])
    with pytest.raises(LayoutError, match="part of a pack"):
        set_layout(q, "aiter_16x16")
