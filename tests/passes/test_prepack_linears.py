"""prepack-linears: which layers over folded values read them packed, and the rest, and why."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.functional import linear

import fixpass
from fixpass import Config, Report
from fixpass.dynamo_stage import run_entry_passes
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.runtime.weights.prepack import packable_dtypes
from fixpass.testing import bf16, f32
from helpers.compiling import compiled_anew as compiled
from helpers.prepacking import Joined, same

pytestmark = pytest.mark.skipif(
    not packable_dtypes(), reason="no oneDNN here, which packs the weights, or no x86"
)


@torch.no_grad()
def report_of(module, x=None, **options):
    torch._dynamo.reset()
    found = fixpass.explain(module, f32(3, 128) if x is None else x, options=options)
    return str(Report(found.of_pass("prepack-linears")))


@torch.no_grad()
def graph_of(module, x, dtypes=None):
    """Dynamo's graph after the entry passes."""
    found = []

    def backend(gm, example_inputs):
        entry = run_entry_passes(gm, example_inputs, Config(disable=("prepack-linears",)))
        step = PrepackLinears(packable_dtypes() if dtypes is None else dtypes)
        report = Pipeline((step,), strict=True).run(entry.gm.graph)
        found.append((entry.gm.graph, report))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(x)
    return found[0]


def test_a_layer_over_a_folded_weight_reads_it_packed():
    graph, report = graph_of(Joined(), f32(3, 128))
    calls = [str(node) for node in graph.nodes if node.op == "call_function"]
    inputs = [str(node) for node in graph.find_nodes(op="placeholder")]
    assert calls == ["prepacked_linear_default"]
    assert inputs[-1] == "packed_folded_cat"
    assert "folded_cat" not in inputs
    assert_expected_inline(
        str(report),
        """\
prepack-linears
    applied linear: reads folded_cat as oneDNN packs it
""",
    )


def test_views_between_the_weight_and_the_layer_are_packed_with_it():
    def halves(x, weight, bias):
        first, second = weight[:256], weight[256:]
        return linear(x, first), linear(x, second), linear(x, first, bias[:256])

    module = Joined(halves)
    assert_expected_inline(
        report_of(module),
        """\
prepack-linears
    applied 3 x linear: reads folded_cat as oneDNN packs it
""",
    )
    graph, _ = graph_of(module, f32(3, 128))
    packed = [str(n) for n in graph.find_nodes(op="placeholder") if str(n).startswith("packed")]
    assert packed == ["packed_first", "packed_second"]
    same(compiled(module), module, f32(3, 128))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight, bias: x @ weight.t().contiguous(),
        lambda x, weight, bias: torch.matmul(x, weight.t()) + bias,
        lambda x, weight, bias: x.matmul(weight.t().contiguous()),
        lambda x, weight, bias: linear(x, weight, bias=bias),
        lambda x, weight, bias: linear(x, weight.view(2, -1, 128)[1]),
        lambda x, weight, bias: (linear(x, weight), weight.view(-1) is None)[0].relu(),
    ],
)
@pytest.mark.parametrize("shape", [(1, 128), (3, 128), (2, 5, 128), (2, 0, 128)])
def test_every_spelling_of_a_layer_gives_what_eager_gives(use, shape):
    module, x = Joined(use), f32(*shape)
    assert "applied" in report_of(module, x)
    same(compiled(module), module, x)


def test_rows_of_any_strides_are_read():
    module = Joined()
    run = compiled(module)
    for x in (f32(128, 3).t(), f32(3, 256)[:, ::2], f32(5, 2, 128).transpose(0, 1)):
        same(run, module, x)


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", packable_dtypes())
@torch.no_grad()
def test_through_inductor_with_lengths_that_change(dtype):
    module = Joined(dtype=dtype)
    run = compiled(module, lower="inductor")
    for rows in (1, 3, 7, 64):
        same(run, module, torch.randn(rows, 128).to(dtype))


def left(module, x=None):
    """The report where the pass does nothing; what is computed is right."""
    found = report_of(module, x)
    same(compiled(module), module, f32(3, 128) if x is None else x)
    return found


def test_a_value_that_something_else_reads_is_kept_as_it_is():
    def scaled(x, weight, bias):
        return linear(x, weight) + (weight * x.sum()).sum()

    assert_expected_inline(
        left(Joined(scaled)),
        """\
prepack-linears
    missed  folded_cat: mul is no linear layer over it
""",
    )


def test_a_product_with_a_vector_is_left_alone():
    def one(x, weight, bias):
        return (x[0] @ weight.t()) * 2

    assert_expected_inline(
        left(Joined(one)),
        """\
prepack-linears
    missed  folded_cat: matmul multiplies 1 by 2 dimensions
""",
    )


def test_a_bias_that_is_no_dense_vector_of_the_features_is_left_alone():
    found = [
        left(Joined(lambda x, weight, bias, how=how: linear(x, weight, how(bias))))
        for how in (lambda bias: bias[:1], lambda bias: bias.expand(3, -1), lambda bias: bias[0])
    ]
    assert_expected_inline(
        "".join(found),
        """\
prepack-linears
    missed  folded_cat: linear has the bias f32[1]
prepack-linears
    missed  folded_cat: linear has the bias f32[3, 768][0, 1]
prepack-linears
    missed  folded_cat: linear has the bias f32[]
""",
    )


@pytest.mark.parametrize(
    "how",
    [
        lambda bias: torch.stack([bias, bias * 2], 1).view(-1)[::2],
        lambda bias: bias[:1].expand(768),
        lambda bias: bias.flip(0),
    ],
)
def test_a_bias_of_any_strides_is_read(how):
    module = Joined(lambda x, weight, bias: linear(x, weight, how(bias)))
    assert "applied" in report_of(module)
    same(compiled(module), module, f32(3, 128))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w, bias: linear(linear(x, w), w),
        lambda x, w, bias: linear(x, w) @ w,
        lambda x, w, bias: linear(x, w, linear(x, w)[0]),
        lambda x, w, bias: linear(linear(linear(x, w), w.t()), w),
    ],
)
def test_one_layer_over_a_weight_may_feed_another(use):
    module = Joined(lambda x, weight, bias: use(x, weight[:128], bias))
    assert "applied" in report_of(module)
    x = f32(3, 128) / 128
    same(compiled(module), module, x)


def test_a_nested_tensor_is_left_alone():
    x = torch.nested.nested_tensor([f32(2, 128), f32(5, 128)], layout=torch.jagged)
    module = Joined(lambda x, weight, bias: linear(x, weight))
    with torch.no_grad():
        got, wanted = compiled(module)(x), module(x)
    torch.testing.assert_close(got.values(), wanted.values())


def test_a_layer_whose_input_needs_a_gradient_is_left_alone():
    module = Joined().requires_grad_(False)
    x = f32(3, 128).requires_grad_()
    found = fixpass.explain(module, x)
    assert_expected_inline(
        str(Report(found.of_pass("prepack-linears"))),
        """\
prepack-linears
    missed  folded_cat: linear gets a gradient
""",
    )
    compiled(module)(x).sum().backward()
    wanted = torch.cat([module.gate, module.up]).sum(0)
    torch.testing.assert_close(x.grad[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_type_that_this_machine_does_not_pack_is_named():
    _, report = graph_of(Joined(dtype=torch.bfloat16), bf16(3, 128), dtypes=(torch.float32,))
    assert_expected_inline(
        str(report),
        """\
prepack-linears
    missed  folded_cat: oneDNN packs no bfloat16 here
""",
    )


def test_nothing_is_said_of_parameters_that_are_read_as_they_are():
    assert report_of(nn.Linear(128, 512)).strip() == ""


def test_for_another_device_nothing_is_packed():
    module = Joined()
    with torch.no_grad():
        found = fixpass.explain(module, f32(3, 128), target="cuda:sm_90")
    assert not found.of_pass("prepack-linears")
    assert not found.of_kind("failed")
