"""Pipelines: order, fuel, verification, passes that fail, and the key that names them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pass, Pipeline
from fixpass.lowering.target import CPU, target_named
from fixpass.passes import default_passes
from fixpass.passes.pipeline import source_files
from fixpass.runtime.errors import PassError
from fixpass.testing import f32, text, trace

aten = torch.ops.aten


def two_norms(x):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)


@dataclass(frozen=True)
class Raises(Pass):
    """Changes the graph, then fails."""

    name: ClassVar[str] = "raises"

    def run(self, graph, result):
        for node in graph.find_nodes(op="call_function", target=aten.rsqrt.default):
            node.target = aten.sqrt.default
        raise ZeroDivisionError("half-way")


@dataclass(frozen=True)
class RecordsWrongStrides(Pass):
    """Replaces a value by one with other strides, and does not say so."""

    name: ClassVar[str] = "records-wrong-strides"

    def run(self, graph, result):
        node = graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)[0]
        node.meta["val"] = node.meta["val"].t().contiguous().t()


@dataclass(frozen=True)
class LeavesLooseEnds(Pass):
    """Uses a value before it is computed."""

    name: ClassVar[str] = "leaves-loose-ends"

    def run(self, graph, result):
        first, *_, last = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        first.replace_input_with(first.args[0], last)


BROKEN = [Raises(), RecordsWrongStrides(), LeavesLooseEnds()]


@pytest.mark.parametrize("step", BROKEN, ids=lambda step: step.name)
def test_a_third_partys_pass_that_fails_is_left_out_and_named(step):
    gm = trace(two_norms, f32(3, 8))
    before = text(gm.graph)
    report = Pipeline((step,)).run(gm.graph)
    assert text(gm.graph) == before
    assert [r.pass_name for r in report.of_kind("failed")] == [step.name]
    gm.recompile()
    x = f32(3, 8)
    torch.testing.assert_close(gm(x)[0], two_norms(x))


@pytest.mark.parametrize("step", BROKEN, ids=lambda step: step.name)
def test_under_strict_it_raises_and_names_the_pass(step):
    gm = trace(two_norms, f32(3, 8))
    with pytest.raises(PassError, match=step.name):
        Pipeline((step,), strict=True).run(gm.graph)


def test_the_report_says_what_was_wrong():
    gm = trace(two_norms, f32(3, 8))
    assert_expected_inline(
        str(Pipeline((*BROKEN[:2],)).run(gm.graph)),
        """\
raises
    failed  graph: left out: ZeroDivisionError: half-way
records-wrong-strides
    failed  graph: left out: records-wrong-strides left pow_1 (aten.pow.Tensor_Scalar), which records f32[3, 8][1, 3] but gives f32[3, 8]
""",
    )


def test_our_passes_still_run_behind_one_that_failed():
    gm = trace(two_norms, f32(3, 8))
    report = Pipeline((Raises(), *default_passes(CPU)), verify=True).run(gm.graph)
    assert len(report.of_pass("canonicalize-norms")) == 2


def test_fuel_stops_after_so_many_changes():
    counts = []
    for fuel in range(7):
        gm = trace(two_norms, f32(3, 8))
        report = Pipeline(default_passes(CPU), verify=True, strict=True, fuel=fuel).run(gm.graph)
        counts.append(len(report.of_kind("applied")))
    assert counts == [0, 1, 2, 3, 4, 4, 4]


def test_the_uuid_follows_passes_options_and_target():
    def key(*passes, **options):
        return Pipeline(passes, **options).uuid()

    cpu, cuda = default_passes(CPU), default_passes(target_named("cuda:sm_90"))
    keys = [key(*cpu), key(*cuda), key(*cpu[1:]), key(*cpu, fuel=1), key(*cpu, Raises())]
    assert len(set(keys)) == len(keys)
    assert key(*cpu) == key(*default_passes(CPU))


def test_the_uuid_covers_the_source_of_every_layer():
    names = {path.name for path in source_files()}
    assert {"scale.py", "contract_table.py", "norms.py", "rms_norm.py", "launch.py"} <= names
