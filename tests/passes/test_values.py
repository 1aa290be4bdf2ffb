"""verify="values": the change that makes a graph compute other numbers is named.

A planted pass changes four like sites. All changes but the third leave every value as it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fixpass
from fixpass import Config, Editor, Pass, Pipeline
from fixpass.aot_eager import copy_graph
from fixpass.passes.base import PassResult
from fixpass.passes.values import GraphValues, RoundedValues
from fixpass.runtime.errors import ConfigError, PassError
from fixpass.testing import f32, trace

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default
WRONG = 2


def four_sites(xs, ys, states):
    results = []
    for x, y, state in zip(xs, ys, states, strict=True):
        norm = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        results += [norm, x.sin(), x.tanh(), x.mul(2.0), -x, x - y, y.clone(), x.relu() + y]
        results.append(x.exp())
        state.copy_(x.cos())
    return results


def behind(graph, node, target, *args):
    """Insert a call on `node` in front of all that read `node`."""
    users = list(node.users)
    made = Editor(graph, node.next).call(target, (node, *args))
    for user in users:
        user.replace_input_with(node, made)
    return made


def stride(graph, node, wrong):
    behind(graph, node, aten.as_strided.default, [8, 8], [1, 8] if wrong else [8, 1])


def dtype(graph, node, wrong):
    there = behind(graph, node, convert, torch.bfloat16 if wrong else torch.float64)
    behind(graph, there, convert, torch.float32)


def constant(graph, node, wrong):
    node.update_arg(1, 2.001 if wrong else 2)


def eps(graph, node, wrong):
    node.update_arg(1, 1e-5 if wrong else 1e-6)
    node.kwargs = {"alpha": 1}


def dropped_node(graph, node, wrong):
    if not wrong:
        node.target, node.args = aten.mul.Tensor, (node.args[0], -1.0)
        return
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def exchanged_input(graph, node, wrong):
    node.args = node.args[::-1] if wrong else node.args
    node.kwargs = {"alpha": 1}


def dropped_copy(graph, node, wrong):
    node.kwargs = {"non_blocking": False}
    if wrong:
        node.replace_all_uses_with(node.args[1])
        graph.erase_node(node)


def alias(graph, node, wrong):
    node.kwargs = {"memory_format": torch.contiguous_format}
    if wrong:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def broadcasted_slice(graph, node, wrong):
    behind(graph, node, aten.slice.Tensor, 0, 0, 1 if wrong else 8)


def non_idempotent(graph, node, wrong):
    """One more run of the pass adds the constant once more."""
    behind(graph, node, aten.add.Tensor, 1e-3 if wrong else 0.0)


FAULTS = {
    stride: aten.sin.default,
    dtype: aten.tanh.default,
    constant: aten.mul.Tensor,
    eps: aten.add.Tensor,
    dropped_node: aten.neg.default,
    exchanged_input: aten.sub.Tensor,
    dropped_copy: aten.copy_.default,
    alias: aten.clone.default,
    broadcasted_slice: aten.relu.default,
    non_idempotent: aten.exp.default,
}


@dataclass(frozen=True)
class Planted(Pass):
    """Changes each site of one op, and the third one wrongly."""

    name: ClassVar[str] = "planted"
    change: str
    way: str
    wrong: int = WRONG

    def run(self, graph, result):
        change = next(fault for fault in FAULTS if fault.__name__ == self.change)
        nodes = graph.find_nodes(op="call_function", target=FAULTS[change])
        if change in (constant, eps):
            nodes = [node for node in nodes if isinstance(node.args[1], float)]
        assert len(nodes) == 4
        for i, node in enumerate(nodes):
            if self.way == "asks for fuel" and not result.take_fuel():
                return
            if self.way == "reports before":
                result.applied(node, f"site {i}")
            change(graph, node, i == self.wrong)
            if self.way != "reports before":
                result.applied(node, f"site {i}")


@pytest.fixture(scope="module")
def traced():
    inputs = ([f32(8, 8) for _ in range(4)] for _ in range(3))
    return trace(four_sites, *inputs).graph


@pytest.mark.parametrize("way", ["asks for fuel", "reports before", "reports behind"])
@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_the_change_that_makes_a_fault_is_named(traced, fault, way):
    report = Pipeline((Planted(fault, way),), verify="values").run(copy_graph(traced))
    (failed,) = report.of_kind("failed")
    assert failed.pass_name == "planted"
    assert "the first wrong change is 3 of 4 (" in failed.text
    assert failed.text.endswith(f": site {WRONG})")


@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_changes_that_keep_every_value_pass(traced, fault):
    step = Planted(fault, "asks for fuel", wrong=-1)
    report = Pipeline((step,), verify="values", strict=True).run(copy_graph(traced))
    assert len(report.of_kind("applied")) == 4


@pytest.mark.parametrize("fault", ["constant", "eps", "exchanged_input", "broadcasted_slice"])
def test_only_values_show_some_faults(traced, fault):
    report = Pipeline((Planted(fault, "asks for fuel"),), verify=True).run(copy_graph(traced))
    assert not report.of_kind("failed")


def test_without_the_checks_the_result_is_wrong(traced):
    copied = copy_graph(traced)
    Planted("constant", "asks for fuel").run(copied, PassResult("planted"))
    inputs = [f32(8, 8) for _ in range(12)]
    before, after = (torch.fx.GraphModule({}, g)(*inputs) for g in (copy_graph(traced), copied))
    wrong = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]
    assert wrong == [9 * WRONG + 3]


def half(x, w):
    y = x.to(torch.bfloat16)
    return torch.nn.functional.layer_norm(y @ w, (48,)).softmax(-1)


def test_symbolic_sizes_get_the_sizes_that_were_seen():
    gm = trace(half, f32(6, 32), torch.randn(32, 48).to(torch.bfloat16), dynamic=True)
    inputs = GraphValues.of(gm.graph).inputs
    shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]
    assert sorted(shapes) == [(6, 32), (32, 48)]


def test_inputs_have_the_recorded_strides_and_offset():
    packed = f32(6, 40)
    gm = trace(lambda q: q.sin(), packed[1:, 8:24])
    (q,) = GraphValues.of(gm.graph).inputs
    assert (q.shape, q.stride(), q.storage_offset()) == ((5, 16), (40, 1), 48)


def test_another_order_of_additions_is_rounding():
    x = torch.randn(64, 4096).to(torch.bfloat16)

    def summed(mode):
        with mode:
            return [x.sum(-1)]

    halves = x[:, :2048].sum(-1) + x[:, 2048:].sum(-1)
    values = RoundedValues.of(summed)
    assert not torch.equal(halves, values.leaves[0])
    assert values.fault_of([halves]) == ""
    assert "result 0 differs by" in values.fault_of([halves * 1.25])


def test_a_graph_that_cannot_run_on_random_inputs_is_said():
    gm = trace(lambda x, i: x[i], f32(3), torch.tensor([0, 2]))
    x, _ = gm.graph.find_nodes(op="placeholder")
    x.meta["val"] = x.meta["val"].to_sparse()
    report = Pipeline((), verify="values").run(gm.graph)
    (missed,) = report.of_kind("missed")
    assert "values not compared: input x is a FakeTensor of layout torch.sparse_coo" in missed.text


def test_compiled_code_leaves_the_wrong_pass_out():
    x, w = f32(8, 8), f32(8)

    def fn(x):
        return x.exp() + x.sin().exp() + x.cos().exp() + x.tanh().exp()

    step = Planted("non_idempotent", "asks for fuel")
    options = {"verify": "values", "passes": (step,), "lower": "eager"}
    torch.testing.assert_close(fixpass.compile(fn, **options)(x), fn(x))
    strict = fixpass.compile(fn, **options, strict=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="first wrong change is 3 of 4") as caught:
        strict(x * w)
    assert isinstance(caught.value.inner_exception, PassError)


def test_the_option_and_its_variable_say_values():
    assert Config.resolve({}, {"FIXPASS_VERIFY": "values"}).verify == "values"
    assert Config.resolve({"verify": "values"}, {"FIXPASS_VERIFY": "0"}).verify == "values"
    assert Config.resolve({}, {"FIXPASS_VERIFY": "1"}).verify is True
    with pytest.raises(ConfigError, match='verify\' is True, False or "values"'):
        Config.resolve({"verify": "numbers"}, {})


def test_a_pass_of_ours_that_changes_a_value_is_named(traced, monkeypatch):
    from fixpass.passes.lower_norms import LowerNorms

    def run(self, graph, result: PassResult):
        Planted("eps", "asks for fuel").run(graph, result)

    monkeypatch.setattr(LowerNorms, "run", run)
    with pytest.raises(PassError, match="pass lower-norms: lower-norms changed a value"):
        Pipeline((LowerNorms(),), verify="values", strict=True).run(copy_graph(traced))
