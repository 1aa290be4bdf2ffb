"""Faults that random modules and odd inputs have found, one small test each."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fixpass import Pass, Pipeline, explain
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.runtime.errors import PassError
from fixpass.testing import assert_same, bf16, f32, trace
from helpers import standins
from helpers.compiling import EAGER, compiled


def scaled_by_columns(x):
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)


def scaled_by_a_row_of_moments(x):
    return x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(0) + 1e-6)


def varied_by_columns(x):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False) + 1e-6)


def centred_by_columns(x):
    h = x - x.mean(-1)
    moment = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return h * torch.rsqrt(moment + 1e-6)


def centred_by_columns_twice(x):
    moment = (x - x.mean(-1)).pow(2).mean(-1, keepdim=True)
    return (x - x.mean(-1)) * torch.rsqrt(moment + 1e-6)


@pytest.mark.parametrize(
    "fn",
    [
        scaled_by_columns,
        scaled_by_a_row_of_moments,
        varied_by_columns,
        centred_by_columns,
        centred_by_columns_twice,
    ],
)
def test_a_moment_that_broadcasts_over_columns_of_a_square_is_no_norm_of_rows(fn):
    assert_same(compiled(fn), fn, f32(4, 4))


def test_a_mean_taken_off_in_a_half_dtype_keeps_its_rounding():
    def fn(x):
        h = x.float()
        moment = h.var(-1, unbiased=False, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(moment + 1e-6)

    assert_same(compiled(fn), fn, bf16(4, 64) + 100, rtol=1e-5, scaled=True)


def reads_a_copy(x, weight):
    copy = x.transpose(0, 1).contiguous().view(-1, x.shape[-1])
    return F.rms_norm(copy, (x.shape[-1],), weight)


def test_a_dropped_copy_behind_a_view_of_symbolic_size():
    assert_same(compiled(reads_a_copy, dynamic=True), reads_a_copy, f32(3, 5, 8), f32(8))


def test_dropping_a_copy_adds_no_guard():
    x, weight = f32(3, 5, 8), f32(8)
    model = compiled(reads_a_copy, dynamic=True)
    assert_same(model, reads_a_copy, x, weight)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(model, reads_a_copy, f32(5, 5, 8), weight)
        assert_same(model, reads_a_copy, f32(6, 4, 8), weight)


def test_rows_of_symbolic_number_behind_a_relayout():
    standins.register()

    def fn(x, weight):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * h.to(x.dtype)

    model = compiled(fn, dynamic=True, norm_kernels=("aiter_rms_norm", "inductor"))
    assert_same(model, fn, bf16(3, 5, 8), bf16(8))
    assert_same(model, fn, bf16(4, 6, 24)[..., 8:16], bf16(8))


def test_an_op_without_a_result_needs_no_recorded_value():
    def fn(x, mask):
        return F.rms_norm(x[mask], (8,))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same(compiled(fn), fn, f32(3, 8), torch.tensor([True, False, True]))


@dataclass(frozen=True)
class Raises(Pass):
    name: ClassVar[str] = "raises"

    def run(self, graph: fx.Graph, result):
        raise IndexError


def test_a_fault_from_before_the_passes_is_not_blamed_on_the_pass_behind_a_failed_one():
    gm = trace(lambda x: (x.sin() + 1).cos(), f32(4, 8))
    node = next(n for n in gm.graph.nodes if n.name.startswith("sin"))
    node.meta["val"] = node.meta["val"].t().contiguous().t()
    report = Pipeline((Raises(), CanonicalizeNorms()), verify=True).run(gm.graph)
    assert [remark.pass_name for remark in report.of_kind("failed")] == ["raises"]


def test_an_explicit_kernel_is_not_carried_over_to_another_op():
    standins.register()

    def fn(x, residual, weight):
        s = x + residual
        return torch.ops.fixpass.rms_norm(s, weight, None, 1e-6, kernel_name="aiter_rms_norm"), s

    assert_same(compiled(fn), fn, bf16(4, 8), bf16(4, 8), bf16(8))


def float8(*shape):
    return f32(*shape).to(torch.float8_e4m3fn)


def test_float8_is_not_peeled_off_as_an_upcast():
    def fn(x, weight):
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()

    for x, weight in ((float8(4, 8), f32(8)), (f32(4, 8), float8(8)), (float8(4, 8), float8(8))):
        assert_same(compiled(fn), fn, x, weight)


def test_nodes_that_had_no_recorded_value_are_not_blamed_on_a_pass():
    report = explain(lambda x: F.rms_norm(x, (8,)) * 2, f32(4, 8).to("meta"), options=EAGER)
    assert not report.of_kind("failed")


def test_a_fault_of_ours_stops_the_pass_and_not_the_compile(monkeypatch):
    def run(self, graph, result):
        raise KeyError("unforeseen")

    monkeypatch.setattr(CanonicalizeNorms, "run", run)
    gm = trace(lambda x: F.rms_norm(x, (8,)), f32(4, 8))
    (remark,) = Pipeline((CanonicalizeNorms(),)).run(gm.graph).of_kind("failed")
    assert str(remark) == "failed  graph: stopped: KeyError: 'unforeseen'"
    with pytest.raises(PassError, match="pass canonicalize-norms: KeyError"):
        Pipeline((CanonicalizeNorms(),), strict=True).run(gm.graph)
