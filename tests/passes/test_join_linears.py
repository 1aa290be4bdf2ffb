"""join-linears: layers over one input become one call that takes a list of weights."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from fixpass import Pipeline
from fixpass.passes.join_linears import JoinLinears
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.testing import assert_same, f32, text, trace

CPU = SelectLinearKernel(enabled=True), JoinLinears()


def run(fn, *args, dynamic=False, passes=CPU):
    gm = trace(fn, *args, dynamic=dynamic)
    report = Pipeline(passes, verify=True, strict=True).run(gm.graph)
    remarks = report.of_pass("join-linears")
    return text(gm.graph), "".join(f"{remark}\n" for remark in remarks)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def test_gate_and_up_become_one_call_and_each_weight_stays_where_it_is():
    graph, report = run(Mlp(), f32(1, 3, 64))
    assert_expected_inline(
        graph,
        """\
graph(gate_proj_weight: f32[96, 64], gate_proj_bias: f32[96], x: f32[1, 3, 64], up_proj_weight: f32[96, 64], down_proj_weight: f32[64, 96])
    view = view(x, [3, 64])                                                                      f32[3, 64]
    permute = permute(gate_proj_weight, [1, 0])                                                  f32[64, 96][1, 64]
    permute_1 = permute(up_proj_weight, [1, 0])                                                  f32[64, 96][1, 64]
    skinny_linears = fixpass.skinny_linears(view, [permute, permute_1], [gate_proj_bias, None])  (f32[3, 96], f32[3, 96])
    getitem = getitem(skinny_linears, 0)                                                         f32[3, 96]
    getitem_1 = getitem(skinny_linears, 1)                                                       f32[3, 96]
    view_1 = view(getitem, [1, 3, 96])                                                           f32[1, 3, 96]
    neg = neg(view_1)                                                                            f32[1, 3, 96]
    exp = exp(neg)                                                                               f32[1, 3, 96]
    add = add.Tensor(exp, 1)                                                                     f32[1, 3, 96]
    div = div.Tensor(view_1, add)                                                                f32[1, 3, 96]
    view_3 = view(getitem_1, [1, 3, 96])                                                         f32[1, 3, 96]
    mul = mul.Tensor(div, view_3)                                                                f32[1, 3, 96]
    permute_2 = permute(down_proj_weight, [1, 0])                                                f32[96, 64][1, 96]
    view_4 = view(mul, [3, 96])                                                                  f32[3, 96]
    skinny_linear_1 = fixpass.skinny_linear(view_4, permute_2, None)                             f32[3, 64]
    view_5 = view(skinny_linear_1, [1, 3, 64])                                                   f32[1, 3, 64]
    return view_5
""",
    )
    assert_expected_inline(
        report,
        """\
applied skinny_linears: one call computes gate_proj, up_proj
""",
    )


def test_a_symbolic_number_of_rows_is_joined_too():
    graph, report = run(Mlp(), f32(2, 3, 64), dynamic=True)
    assert "skinny_linears" in graph
    assert_expected_inline(
        report,
        """\
applied skinny_linears: one call computes gate_proj, up_proj
""",
    )


def test_a_weight_that_the_first_result_decides_is_not_joined():
    def fn(x, first, second):
        y = F.linear(x, first)
        return F.linear(x, second * y.sum()), y

    graph, report = run(fn, f32(3, 64), f32(32, 64), f32(16, 64))
    assert "skinny_linears" not in graph
    assert_expected_inline(
        report,
        """\
missed  skinny_linear_1: its weight is computed behind skinny_linear
""",
    )


def test_layers_over_two_inputs_stay_apart():
    def fn(x, y, weight):
        return F.linear(x, weight), F.linear(y, weight)

    graph, report = run(fn, f32(4, 64), f32(4, 64), f32(8, 64))
    assert "skinny_linears" not in graph
    assert report == ""


def test_one_input_read_in_two_shapes_stays_apart():
    def fn(x, first, second):
        return F.linear(x, first), F.linear(x.view(8, 32), second)

    graph, report = run(fn, f32(4, 64), f32(16, 64), f32(16, 32))
    assert "skinny_linears" not in graph
    assert report == ""


def test_a_layer_that_feeds_another_one_over_the_same_input():
    def fn(x, first, second, third):
        y = F.linear(x, first)
        return F.linear(x, second) + F.linear(y, third), F.linear(x, third)

    args = f32(4, 64), f32(64, 64), f32(64, 64), f32(64, 64)
    graph, _ = run(fn, *args)
    assert graph.count("skinny_linears") > graph.count("skinny_linear(")


def test_elsewhere_the_layers_stay_as_they_are():
    graph, report = run(Mlp(), f32(1, 3, 64), passes=(JoinLinears("cuda"),))
    assert "skinny" not in graph
    assert_expected_inline(
        report,
        """\
missed  addmm: one matmul over gate_proj, up_proj needs their weights side by side in one storage, and fixpass makes no second copy of a weight
""",
    )


@torch.no_grad()
@pytest.mark.inductor
def test_joined_layers_read_updates_between_calls():
    torch._dynamo.reset()
    model = Mlp()
    compiled = torch.compile(model, backend="fixpass", fullgraph=True)
    x = f32(1, 3, 64)
    assert_same(compiled, model, x)
    model.up_proj.weight.data.copy_(torch.randn(96, 64) / 8)
    model.gate_proj.load_state_dict({k: 2 * v for k, v in model.gate_proj.state_dict().items()})
    assert_same(compiled, model, x)
