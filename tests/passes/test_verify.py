"""Verification: what the caller of a graph sees stays, and a pass that runs long is named."""

import logging
import sys
from dataclasses import dataclass
from threading import Event
from typing import ClassVar

import pytest
import torch
from expecttest import assert_expected_inline

import fixpass
from fixpass import Pass, Pipeline
from fixpass.aot_eager import copy_graph
from fixpass.passes import pipeline
from fixpass.passes.base import PassResult
from fixpass.passes.verify import Interface
from fixpass.runtime.errors import PassError
from fixpass.testing import f32, trace

aten = torch.ops.aten


def stateful(state, x):
    total = state + x
    state.copy_(total)
    return total.t(), x.clone(), state.sin()


def first(graph, target):
    return graph.find_nodes(op="call_function", target=target)[0]


def erases_an_unused_input(graph, result):
    state, x = graph.find_nodes(op="placeholder")
    x.replace_all_uses_with(state)
    graph.erase_node(x)


def drops_a_write(graph, result):
    node = first(graph, aten.copy_.default)
    node.replace_all_uses_with(node.args[1])
    graph.erase_node(node)


def adds_a_write(graph, result):
    x = next(n for n in graph.find_nodes(op="placeholder") if n.name == "x")
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(aten.mul_.Tensor, (x, 2.0))
    node.meta["val"] = x.meta["val"]


def writes_too_early(graph, result):
    node = first(graph, aten.copy_.default)
    with graph.inserting_before(graph.output_node()):
        late = graph.call_function(aten.neg.default, (node.args[0],))
    late.meta["val"] = late.args[0].meta["val"]


def lets_a_result_alias_an_input(graph, result):
    node = first(graph, aten.clone.default)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def lets_a_view_alias_an_input(graph, result):
    node = first(graph, aten.clone.default)
    node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], [3, 4]), {}


def takes_its_remarks_away(graph, result):
    result.remarks = None


def writes_remarks_of_its_own(graph, result):
    result.remarks = ["changed"]


def ends_the_process(graph, result):
    first(graph, aten.add.Tensor).target = aten.sub.Tensor
    sys.exit(3)


FAULTS = [
    erases_an_unused_input,
    drops_a_write,
    adds_a_write,
    writes_too_early,
    lets_a_result_alias_an_input,
    lets_a_view_alias_an_input,
    takes_its_remarks_away,
    writes_remarks_of_its_own,
    ends_the_process,
]


@dataclass(frozen=True)
class Broken(Pass):
    name: ClassVar[str] = "broken"
    fault: str

    def run(self, graph, result):
        globals()[self.fault](graph, result)


@pytest.fixture(scope="module")
def traced():
    return trace(stateful, f32(3, 4), f32(3, 4)).graph


def failures(graph, **options):
    found = {}
    for fault in FAULTS:
        report = Pipeline((Broken(fault.__name__),), **options).run(copy_graph(graph))
        found[fault.__name__] = [remark.text for remark in report.of_kind("failed")]
    return found


def test_what_the_caller_sees_may_not_change(traced):
    found = failures(traced)
    lines = [f"{name}: {', '.join(text)}" for name, text in found.items()]
    assert_expected_inline(
        "\n".join(lines),
        """\
erases_an_unused_input: left out: broken changed the inputs from (arg0_1, arg1_1) to (arg0_1)
drops_a_write: left out: broken dropped the write into input arg0_1
adds_a_write: left out: broken added a write into input arg1_1
writes_too_early: left out: broken moved a write into input arg0_1 in front of a node that reads the input
lets_a_result_alias_an_input: left out: broken let result 1 share the memory of input arg1_1; it needs a clone
lets_a_view_alias_an_input: left out: broken let result 1 share the memory of input arg1_1; it needs a clone
takes_its_remarks_away: left out: broken left result.remarks that is no list of Remark
writes_remarks_of_its_own: left out: broken left result.remarks that is no list of Remark
ends_the_process: left out: SystemExit: 3""",
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_under_strict_the_error_names_the_pass(traced, fault):
    with pytest.raises(PassError, match="pass broken: "):
        Pipeline((Broken(fault.__name__),), strict=True).run(copy_graph(traced))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_compiled_code_is_right_without_the_pass(fault):
    inputs = [f32(3, 4), f32(3, 4)]
    want_state = inputs[0] + inputs[1]
    torch._dynamo.reset()
    fn = fixpass.compile(stateful, lower="eager", passes=(Broken(fault.__name__),))
    total, copied, sine = fn(*inputs)
    torch.testing.assert_close(total, want_state.t())
    torch.testing.assert_close(inputs[0], want_state)
    torch.testing.assert_close(sine, want_state.sin())
    assert copied.data_ptr() != inputs[1].data_ptr()


def run_without_checks(graph, fault, *inputs):
    copied = copy_graph(graph)
    Broken(fault.__name__).run(copied, PassResult("broken"))
    return torch.fx.GraphModule({}, copied)(*inputs)


def test_without_the_checks_an_erased_input_fails_at_the_call(traced):
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        run_without_checks(traced, erases_an_unused_input, f32(3, 4), f32(3, 4))


def test_without_the_checks_a_dropped_write_leaves_the_old_value(traced):
    state = f32(3, 4)
    old = state.clone()
    run_without_checks(traced, drops_a_write, state, f32(3, 4))
    assert torch.equal(state, old)


def test_without_the_checks_a_dropped_clone_lets_a_result_be_an_input(traced):
    x = f32(3, 4)
    assert run_without_checks(traced, lets_a_result_alias_an_input, f32(3, 4), x)[1] is x


def test_the_interface_of_a_graph(traced):
    found = Interface.of(traced)
    assert found.written == {found.inputs[0]}
    assert (len(found.inputs), found.read_late, found.shared) == (2, frozenset(), ("", "", ""))


def test_a_reshape_that_copies_shares_no_memory():
    graph = trace(lambda x, y: (x.clone(), y.clone()), f32(4, 3).t(), f32(3, 4)).graph
    before = Interface.of(graph)
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], [12]), {}
    shared = Interface.of(graph).shared
    assert before.shared == ("", "")
    assert [bool(name) for name in shared] == [False, True]


def test_a_pass_that_runs_long_is_named_while_it_runs(traced, monkeypatch):
    logged, messages = Event(), []

    class Keeps(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())
            logged.set()

    @dataclass(frozen=True)
    class Slow(Pass):
        name: ClassVar[str] = "slow"

        def run(self, graph, result):
            assert logged.wait(60)

    monkeypatch.setattr(pipeline, "SLOW", 0.05)
    handler = Keeps()
    pipeline.log.addHandler(handler)
    try:
        Pipeline((Slow(),), strict=True).run(copy_graph(traced))
    finally:
        pipeline.log.removeHandler(handler)
    assert messages[0].startswith("slow has been running for")
