"""select-linear-kernel: linear layers of few rows on CPU call skinny_linear."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines the op of experts)
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

import fixpass
from fixpass import Pipeline
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.runtime import extension, linear
from fixpass.runtime.providers import overload_of
from fixpass.testing import assert_same, bf16, f32, text, trace


def run(fn, *args, dynamic=False, select=None):
    gm = trace(fn, *args, dynamic=dynamic)
    select = select or SelectLinearKernel(enabled=True)
    report = Pipeline((select,), verify=True, strict=True).run(gm.graph)
    return text(gm.graph), "".join(f"{remark}\n" for remark in report.remarks)


def test_a_layer_of_few_rows_reads_its_plain_weight():
    graph, report = run(F.linear, bf16(2, 3, 64), bf16(128, 64), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(arg_0: bf16[2, 3, 64], arg_1: bf16[128, 64], arg_2: bf16[128])
    view = view(arg_0, [6, 64])                                  bf16[6, 64]
    permute = permute(arg_1, [1, 0])                             bf16[64, 128][1, 64]
    skinny_linear = fixpass.skinny_linear(view, permute, arg_2)  bf16[6, 128]
    view_1 = view(skinny_linear, [2, 3, 128])                    bf16[2, 3, 128]
    return view_1
""",
    )
    assert_expected_inline(
        report,
        """\
applied skinny_linear: skinny_linear reads bf16[64, 128][1, 64] once, 16,384 bytes
""",
    )


def test_a_product_reads_a_weight_of_the_other_order():
    graph, report = run(torch.matmul, f32(4, 64), f32(64, 128)[:, :100])
    assert_expected_inline(
        graph,
        """\
graph(arg_0: f32[4, 64], arg_1: f32[64, 100][128, 1])
    skinny_linear = fixpass.skinny_linear(arg_0, arg_1, None)  f32[4, 100]
    return skinny_linear
""",
    )
    assert_expected_inline(
        report,
        """\
applied skinny_linear: skinny_linear reads f32[64, 100][128, 1] once, 25,600 bytes
""",
    )


def test_where_the_number_of_rows_is_a_symbol_the_call_decides():
    layer = nn.Linear(64, 128, bias=False)
    graph, report = run(layer, f32(5, 64), dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(weight: f32[128, 64], s0, arg_0: f32[s0, 64])
    permute = permute(weight, [1, 0])                            f32[64, 128][1, 64]
    skinny_linear = fixpass.skinny_linear(arg_0, permute, None)  f32[s0, 128]
    return skinny_linear
""",
    )
    assert_expected_inline(
        report,
        """\
applied skinny_linear: skinny_linear reads f32[64, 128][1, 64] once, 32,768 bytes, in calls of at most 16 rows
""",
    )


def test_many_rows_stay():
    graph, report = run(F.linear, f32(17, 64), f32(128, 64))
    assert "skinny" not in graph
    assert_expected_inline(
        report,
        """\
missed  mm: Inductor keeps the layer: skinny_linear: x has at most 16 rows does not hold for f32[17, 64]
""",
    )


def test_a_weight_without_rows_or_columns_stays():
    _, report = run(torch.mm, f32(4, 64), f32(64, 256)[:, ::2])
    assert_expected_inline(
        report,
        """\
missed  mm: Inductor keeps the layer: skinny_linear: weight is dense along its rows or its columns does not hold for f32[64, 128][256, 2]
""",
    )


def test_an_expanded_weight_stays():
    _, report = run(lambda x, w: torch.mm(x, w.expand(64, 128)), f32(4, 64), f32(64, 1))
    assert_expected_inline(
        report,
        """\
missed  mm: Inductor keeps the layer: skinny_linear: weight is dense along its rows or its columns does not hold for f32[64, 128][1, 0]
""",
    )


def test_a_bias_of_two_dimensions_stays():
    _, report = run(torch.addmm, f32(4, 128), f32(4, 64), f32(64, 128))
    assert_expected_inline(
        report,
        """\
missed  addmm: Inductor keeps the layer: skinny_linear: bias is 1-D does not hold for f32[4, 128]
""",
    )


def test_a_scaled_product_stays():
    def scaled(bias, x, weight):
        return torch.addmm(bias, x, weight, alpha=2)

    _, report = run(scaled, f32(128), f32(4, 64), f32(64, 128))
    assert_expected_inline(
        report,
        """\
missed  addmm: Inductor keeps the layer: it scales by alpha=2
""",
    )


def test_a_dtype_that_the_kernel_does_not_take_stays():
    _, report = run(torch.mm, f32(4, 64).double(), f32(64, 128).double())
    assert_expected_inline(
        report,
        """\
missed  mm: Inductor keeps the layer: skinny_linear: x.dtype in (f32, bf16, f16) does not hold for f64[4, 64]
""",
    )


def test_experts_read_their_plain_weights():
    def experts(x, weight, ends):
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)

    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    graph, report = run(experts, bf16(5, 64), bf16(3, 128, 64), ends)
    assert_expected_inline(
        graph,
        """\
graph(weight: bf16[3, 128, 64], x: bf16[5, 64], ends: i32[3])
    permute = permute(weight, [0, 2, 1])                       bf16[3, 64, 128][8192, 1, 64]
    skinny_experts = fixpass.skinny_experts(x, permute, ends)  bf16[5, 128]
    return skinny_experts
""",
    )
    assert_expected_inline(
        report,
        """\
applied skinny_experts: skinny_linear reads bf16[64, 128][1, 64] of each expert that has 1 to 16 rows
""",
    )


def test_experts_of_transformers_are_found_too():
    grouped = overload_of("transformers::grouped_mm_fallback")
    ends = torch.tensor([2, 30])
    graph, report = run(lambda *args: grouped(*args), f32(30, 64), f32(2, 64, 128), ends)
    assert "fixpass.skinny_experts(" in graph
    assert_expected_inline(
        report,
        """\
applied skinny_experts: skinny_linear reads f32[64, 128] of each expert that has 1 to 16 rows
""",
    )


def test_experts_without_rows_or_columns_stay():
    grouped = overload_of("transformers::grouped_mm_fallback")
    args = f32(3, 64), f32(2, 64, 256)[:, :, ::2], torch.tensor([2, 3])
    graph, report = run(lambda *args: grouped(*args), *args)
    assert "skinny" not in graph
    assert_expected_inline(
        report,
        """\
missed  grouped_mm_fallback: Inductor keeps the layer: skinny_linear: weight is dense along its rows or its columns does not hold for f32[64, 128][256, 2]
""",
    )


def two_layers(x, first, second):
    return F.linear(F.linear(x, first).relu(), second)


LAYERS = f32(2, 64), f32(128, 64), f32(64, 128)


def test_without_a_compiler_the_report_says_so_once():
    select = SelectLinearKernel(enabled=True, unavailable=lambda: "there is no C++ compiler 'c++'")
    graph, report = run(two_layers, *LAYERS, select=select)
    assert "skinny" not in graph
    assert_expected_inline(
        report,
        """\
missed  mm: Inductor keeps all linear layers: there is no C++ compiler 'c++'
""",
    )


def test_a_pass_that_nobody_enabled_says_nothing():
    graph, report = run(two_layers, *LAYERS, select=SelectLinearKernel())
    assert "skinny" not in graph
    assert report == ""


def report_of(**options):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    compiled = torch.compile(model, backend="fixpass", options={"lower": "eager"} | options)
    compiled(f32(2, 64))
    remarks = fixpass.last_reports()[-1].of_pass("select-linear-kernel")
    return [remark.text for remark in remarks]


def test_a_call_that_records_gradients_is_left_alone():
    wanted = "Inductor keeps all linear layers: the call records gradients"
    assert report_of() == [wanted]
    with torch.no_grad():
        assert "skinny_linear reads" in report_of()[0]


@torch.no_grad()
@pytest.mark.parametrize("option", ["freezing", "max_autotune"])
def test_options_with_which_inductor_chooses_kernels_keep_the_layers(option):
    wanted = f"Inductor keeps all linear layers: its option '{option}' chooses their kernels"
    assert report_of(inductor={option: True}) == [wanted]


class Decoder(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(96, 200), nn.Linear(200, 96, bias=False)
        self.conv1d = nn.Parameter(torch.randn(96, 96) / 10)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.up(x).relu()) @ self.conv1d


@torch.no_grad()
@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_serves_every_number_of_rows_and_reads_updates(dtype):
    assert extension.load("skinny_linear", uses_torch=True).reason == ""
    torch._dynamo.reset()
    # A value that is left where others cancel has their rounding error; an update is 35 %.
    close = {"scaled": True, "rtol": 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5}
    model = Decoder(dtype)
    compiled = torch.compile(model, backend="fixpass", dynamic=True, fullgraph=True)
    for rows in (2, 1, 3, linear.MOST_ROWS, linear.MOST_ROWS + 1, 40):
        x = torch.randn(rows, 96).to(dtype)
        compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert_same(compiled, model, x, **close)
        if rows > 2:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles
        with torch.no_grad():
            model.up.weight.data.mul_(1.5)
        model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
        assert_same(compiled, model, x, **close)
