"""Kernels, targets and passes of other people: by options and by entry points of a package."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import fixpass
from fixpass import Contract, Kernel, Match, Missed, Pass, Rewrite, Target, apply_rewrite
from fixpass.config import Config
from fixpass.lowering.contract_table import PLAIN
from fixpass.passes.base import PassResult
from fixpass.passes.rewrite import call, is_call
from fixpass.pipelines import graph_pipeline
from fixpass.runtime.errors import ConfigError
from helpers.processes import run_python

aten = torch.ops.aten
CALLS = []


def own_rms_norm(x, weight, bias, eps, **steps):
    """The norm as this package computes it: it counts its calls."""
    CALLS.append(x.shape)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


OWN = Kernel("own_rms_norm", "rms_norm", Contract(PLAIN, "this file"), own_rms_norm)
ABSENT = Kernel(
    "absent_rms_norm", "rms_norm", Contract(PLAIN, "nowhere"), "absent:norm", needs="absent_library"
)


def norm_of_a_product(x, w, m):
    return nn.functional.rms_norm(x @ m, (64,), w, 1e-6) @ m


ARGUMENTS = torch.randn(4, 64), torch.randn(64), torch.randn(64, 64)


@torch.no_grad()
def run(**options):
    """The compiled result, its report, and how often the own kernel ran."""
    torch._dynamo.reset()
    CALLS.clear()
    compiled = fixpass.compile(norm_of_a_product, lower="eager", **options)
    got = compiled(*ARGUMENTS)
    torch.testing.assert_close(got, norm_of_a_product(*ARGUMENTS))
    return str(fixpass.last_reports()[-1]), len(CALLS)


def test_a_kernel_of_ones_own_is_chosen_by_its_name():
    report, calls = run(kernels=(OWN,), norm_kernels=("own_rms_norm",))
    assert "own_rms_norm reads f32[4, 64]" in report
    assert calls == 1


def test_a_target_of_ones_own_brings_kernels_of_ones_own():
    target = Target("cpu", "cpu", ("own_rms_norm", "inductor"), prefers_fusion=False)
    report, calls = run(kernels=(OWN,), targets=(target,))
    assert "own_rms_norm reads f32[4, 64]" in report
    assert calls == 1


def test_a_kernel_that_is_not_installed_is_a_remark_that_says_what_it_needs():
    report, calls = run(kernels=(ABSENT, OWN), norm_kernels=("absent_rms_norm", "own_rms_norm"))
    needs = "it needs the package absent_library: install it"
    assert f"missed  rms_norm: absent_rms_norm is not installed: {needs}" in report
    assert calls == 1


@pytest.mark.parametrize("kernel", ["aiter_rms_norm", "flashinfer_add_rms_norm"])
def test_under_strict_a_named_kernel_that_is_not_installed_is_an_error(kernel):
    program = f"""
import torch, fixpass
norm = fixpass.compile(lambda x: torch.nn.functional.rms_norm(x, (8,)), strict=True, norm_kernels=["{kernel}"])
norm(torch.randn(2, 8))
"""
    command = [sys.executable, "-P", "-W", "ignore", "-c", program]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f'option "norm_kernels": not installed: {kernel} needs the op' in failed.stderr


def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown 'aiter_triton_rms_norm'; known: inductor"):
        fixpass.compile(norm_of_a_product, norm_kernels=["aiter_triton_rms_norm"])
    options = {"targets": [Target("nope_cpu", "cpu", ("nope",))]}
    with pytest.raises(ConfigError, match="target nope_cpu: unknown 'nope'; known: "):
        fixpass.explain(norm_of_a_product, *ARGUMENTS, target="nope_cpu", options=options)


@pytest.mark.parametrize("name", ["kernels", "targets", "passes"])
def test_an_option_that_holds_something_else_is_an_error(name):
    with pytest.raises(ConfigError, match=f"option '{name}': 'x' is no instance of fixpass"):
        Config.resolve({name: ["x"]})


@dataclass(frozen=True)
class DoubleNegations(Rewrite):
    """-(-x) is x."""

    anchors = (aten.neg.default,)

    def match(self, anchor):
        inner = anchor.args[0]
        if not is_call(inner, aten.neg.default):
            return Missed("its input is no negation")
        return Match((anchor,), f"{anchor.name} undoes {inner.name}")

    def replace(self, graph, match):
        (old,) = match.replaced
        with graph.inserting_before(old):
            new = call(graph, aten.alias.default, (old.args[0].args[0],))
        new.meta = dict(old.meta)
        return (new,)


@dataclass(frozen=True)
class DropNegations(Pass):
    name: ClassVar[str] = "drop-negations"
    after: ClassVar[str] = "canonicalize-norms"
    before: ClassVar[str] = "lower-norms"

    def run(self, graph: torch.fx.Graph, result: PassResult) -> None:
        apply_rewrite(graph, DoubleNegations(), result)


def names_of(*passes):
    config = Config.resolve({"passes": passes}, {})
    return [
        step.name for step in graph_pipeline(config, Target("cpu", "cpu", ("inductor",))).passes
    ]


def test_a_pass_runs_where_its_anchors_ask_for():
    names = names_of(DropNegations())
    assert names.index("drop-negations") == names.index("canonicalize-norms") + 1


def test_a_pass_without_anchors_runs_last():
    @dataclass(frozen=True)
    class Last(DropNegations):
        name: ClassVar[str] = "last"
        after: ClassVar[str] = ""
        before: ClassVar[str] = ""

    assert names_of(DropNegations(), Last())[-1] == "last"


def test_a_pass_may_stand_by_another_pass_of_the_same_package():
    @dataclass(frozen=True)
    class Second(DropNegations):
        name: ClassVar[str] = "second"
        after: ClassVar[str] = "drop-negations"

    names = names_of(DropNegations(), Second())
    assert names.index("second") == names.index("drop-negations") + 1


def test_an_unknown_anchor_and_a_contradiction_are_errors():
    @dataclass(frozen=True)
    class Lost(DropNegations):
        name: ClassVar[str] = "lost"
        before: ClassVar[str] = "fuse-everything"

    @dataclass(frozen=True)
    class Backwards(DropNegations):
        name: ClassVar[str] = "backwards"
        after: ClassVar[str] = "lower-norms"
        before: ClassVar[str] = "canonicalize-norms"

    with pytest.raises(ConfigError, match="pass lost: there is no pass 'fuse-everything'; known: "):
        names_of(Lost())
    with pytest.raises(ConfigError, match="lower-norms does not run before canonicalize-norms"):
        names_of(Backwards())


@torch.no_grad()
def test_a_rewrite_of_ones_own_reports_what_it_did():
    torch._dynamo.reset()
    compiled = fixpass.compile(
        lambda x: torch.neg(torch.neg(x)) + 1, lower="eager", passes=(DropNegations(),)
    )
    x = torch.randn(3)
    assert torch.equal(compiled(x), x + 1)
    report = str(fixpass.last_reports()[-1])
    assert "missed  neg: its input is no negation" in report
    assert "applied alias: neg_1 undoes neg" in report


PACKAGE = """
import torch
from fixpass import Contract, Kernel, Pass, Target
from fixpass.lowering.contract_table import PLAIN

class Counting(Pass):
    name = "counting"
    before = "lower-norms"
    def run(self, graph, result):
        result.missed(next(iter(graph.nodes)), "counted")

def norm(x, weight, bias, eps, **steps):
    print("own kernel")
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

kernel = Kernel("theirs", "rms_norm", Contract(PLAIN, "theirs 1.0"), "their_kernels:norm")
target = Target("cpu", "cpu", ("theirs", "inductor"), prefers_fusion=False)
"""
ENTRY_POINTS = """
[fixpass.passes]
counting = their_kernels:Counting
[fixpass.kernels]
theirs = their_kernels:kernel
[fixpass.targets]
cpu = their_kernels:target
"""
PROGRAM = """
import torch, fixpass
fn = lambda x, w, m: torch.nn.functional.rms_norm(x @ m, (8,), w, 1e-6) @ m
with torch.no_grad():
    fixpass.compile(fn, lower="eager")(torch.randn(4, 8), torch.randn(8), torch.randn(8, 8))
print(fixpass.last_reports()[-1])
"""


def test_an_installed_package_brings_pass_kernel_and_target(tmp_path):
    (tmp_path / "their_kernels.py").write_text(PACKAGE)
    info = tmp_path / "their_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    program = f"import sys; sys.path.append({str(tmp_path)!r})\n{PROGRAM}"
    printed = run_python("-P", "-c", program)
    assert printed.startswith("own kernel\n")
    assert "theirs reads f32[4, 8]" in printed
    assert "counted" in printed


def test_a_compile_asks_for_each_op_at_most_once(monkeypatch):
    asked = []
    real = torch._C._jit_get_schemas_for_operator

    def counting(name):
        asked.append(name)
        return real(name)

    torch._dynamo.reset()
    monkeypatch.setattr(torch._C, "_jit_get_schemas_for_operator", counting)
    with torch.no_grad():
        fixpass.compile(norm_of_a_product, lower="eager")(*ARGUMENTS)
    assert "aiter::rms_norm" in asked
    assert [name for name in set(asked) if asked.count(name) > 1] == []


def test_ops_find_their_kernels_where_only_the_runtime_is_imported():
    program = """
import torch, fixpass.runtime.ops
try:
    torch.ops.fixpass.rms_norm(torch.randn(2, 8), torch.randn(8), None, 1e-6, kernel_name="aiter_rms_norm")
except Exception as error:
    print(error)
"""
    assert "'aiter_rms_norm' needs the op aiter::rms_norm" in run_python("-P", "-c", program)
