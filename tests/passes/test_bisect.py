"""torch's bisector switches single changes and whole passes of fixpass off."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch._inductor.compiler_bisector import BACKENDS, CompilerBisector

import fixpass.backend  # noqa: F401
from fixpass import Pass, Pipeline
from fixpass.aot_eager import copy_graph
from fixpass.passes.bisect import BACKEND
from fixpass.testing import f32, trace

aten = torch.ops.aten


def sines(x):
    return [(x + i).sin() for i in range(6)]


@dataclass(frozen=True)
class Marks(Pass):
    """Changes nothing and asks for fuel."""

    name: ClassVar[str] = "marks"

    def run(self, graph, result):
        for node in graph.find_nodes(op="call_function", target=aten.sin.default):
            if result.take_fuel():
                result.applied(node, "marked")


@dataclass(frozen=True)
class Wrong(Pass):
    """Changes each sine, and the fifth one wrongly."""

    name: ClassVar[str] = "wrong"
    asks: bool = True

    def run(self, graph, result):
        nodes = graph.find_nodes(op="call_function", target=aten.sin.default)
        for i, node in enumerate(nodes):
            if self.asks and not result.take_fuel():
                return
            if i == 4:
                node.target = aten.cos.default
            result.applied(node, "changed")


def bisected(*passes):
    gm = trace(sines, f32(3))
    graph, x = gm.graph, f32(3)
    want = [(x + i).sin() for i in range(6)]

    def is_right():
        if CompilerBisector.get_backend() != BACKEND:
            return True
        copied = copy_graph(graph)
        Pipeline(passes).run(copied)
        got = torch.fx.GraphModule({}, copied)(x)
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    return CompilerBisector.do_bisect(is_right)


def test_our_backend_comes_behind_those_of_torch():
    assert list(BACKENDS)[-1] == BACKEND
    assert [subsystem.name for subsystem in BACKENDS[BACKEND]] == ["changes", "passes"]


def test_a_change_is_found_among_those_of_all_passes():
    found = bisected(Marks(), Wrong())
    assert (found.backend, found.subsystem) == (BACKEND, "changes")
    # Counted from 0: six changes of the first pass, then four that are right.
    assert (found.bisect_number, found.debug_info) == (10, "wrong")


def test_a_pass_that_asks_for_no_fuel_is_found_as_a_whole():
    found = bisected(Marks(), Wrong(asks=False), Marks())
    assert (found.backend, found.subsystem) == (BACKEND, "passes")
    assert (found.bisect_number, found.debug_info) == (1, "wrong")


@pytest.mark.parametrize("passes", [(), (Marks(),)])
def test_right_passes_have_no_fault(passes):
    assert bisected(*passes) is None
