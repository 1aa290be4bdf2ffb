"""The norm kernels, interpreted: values and memory accesses over many layouts.

The default run takes every 61st case of the probe; `full` takes all. With `--device cuda` the cases
run on the device, which shows values and stray stores; accesses are counted by the interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixpass.runtime import norms
from fixpass.runtime.kernels.add_rms_norm import add_rms_norm
from fixpass.runtime.kernels.qk_norm import qk_norm
from fixpass.runtime.kernels.rms_norm import rms_norm
from fixpass.runtime.kernels.row_geometry import overlaps_itself
from fixpass.testing.kernel_memory import trace_memory
from helpers.accuracy import ulps
from helpers.kernel_probe import Case, cases, run
from helpers.row_layouts import OTHER_STRIDE

EVERY_CASE = list(cases())
SHORT = EVERY_CASE[::61]


def assert_proved(case, launch):
    outcome = run(case, launch)
    assert outcome.report.faults == ()
    assert outcome.excess <= 1
    if not outcome.report.views:  # a device counts no accesses
        return
    moved = sum(outcome.report.views[name].size for name in outcome.reads)
    if moved and case.layout not in OTHER_STRIDE:
        assert outcome.report.moved(outcome.reads, outcome.writes) == 1.0


def test_the_probe_is_large_enough():
    assert len(EVERY_CASE) >= 2000
    assert {case.op for case in SHORT} == {case.op for case in EVERY_CASE}
    assert {case.layout for case in SHORT} == {case.layout for case in EVERY_CASE}


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_layouts(case, launch):
    assert_proved(case, launch)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_every_layout(case, launch):
    assert_proved(case, launch)


@st.composite
def strided(draw):
    """Shapes of rank 1 to 6 with strides in any order and gaps between elements."""
    shape = draw(st.lists(st.integers(1, 3), max_size=5))
    shape.append(draw(st.integers(1, 40)))
    stride, reach = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        stride[dim] = reach * draw(st.integers(1, 2)) + draw(st.sampled_from((0, 0, 1, 7)))
        reach = stride[dim] * shape[dim]
    offset = draw(st.integers(0, 9))
    return torch.randn(reach + offset).to(torch.bfloat16).as_strided(shape, stride, offset)


@given(strided(), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_strides(x, data):
    assert not overlaps_itself(x)
    out = data.draw(st.sampled_from((torch.empty(x.shape), torch.empty_like(x), x.clone())))
    weight = torch.randn(x.shape[-1])
    want = norms.rms_norm(x, 1e-6, norms.Affine(weight, out_dtype=out.dtype))
    report = trace_memory(rms_norm, x, weight, 1e-6, out=out)
    assert report.faults == ()
    assert report.moved(("x",), ("out",)) == 1.0
    assert ulps(out, want) <= (1 if out.dtype == torch.bfloat16 else 4)


def test_a_packed_qkv_tensor_is_normed_in_one_launch_without_a_copy():
    qkv = torch.randn(5, 3072 + 8).to(torch.bfloat16)
    q, k = qkv[:, :2048].unflatten(1, (16, 128)), qkv[:, 2048:2560].unflatten(1, (4, 128))
    q_weight, k_weight = torch.randn(2, 128).to(torch.bfloat16)
    wants = [norms.rms_norm(x, 1e-6, norms.Affine(w)) for x, w in ((q, q_weight), (k, k_weight))]
    rest = qkv[:, 2560:].clone()
    report = trace_memory(qk_norm, q, k, q_weight, k_weight, 1e-6, q_out=q, k_out=k)
    assert report.faults == ()
    assert [name for name, _ in report.launches] == ["qk_norm_kernel"]
    assert report.moved(("q", "k"), ("q_out", "k_out")) == 1.0
    assert [torch.equal(q, wants[0]), torch.equal(k, wants[1])] == [True, True]
    assert torch.equal(qkv[:, 2560:], rest)


def test_a_copy_before_the_norm_moves_twice_as_much():
    qkv = torch.randn(5, 3072).to(torch.bfloat16)
    q, weight = qkv[:, :1024].unflatten(1, (8, 128)), torch.randn(128)

    def copy_then_norm(q, out):
        copy = torch.empty(q.shape, dtype=q.dtype)
        rms_norm(q, None, 0.0, out=copy)  # stands for the copy: the same bytes
        rms_norm(copy, weight, 1e-6, out=out)

    report = trace_memory(copy_then_norm, q, torch.empty(5, 8, 128, dtype=q.dtype))
    copy = report.views["norm_kernel.out_ptr"]
    moved = report.views["q"].loaded + copy.stored + copy.loaded + report.views["out"].stored
    assert moved / (report.views["q"].size + report.views["out"].size) == 2.0


def test_rows_more_than_two_to_the_31_elements_apart():
    pitch = 2**31 + 8
    x = torch.empty(pitch + 64, dtype=torch.bfloat16).as_strided((2, 64), (pitch, 1))
    x.copy_(torch.randn(2, 64))
    out = torch.empty(2, 64, dtype=torch.bfloat16)
    report = trace_memory(rms_norm, x, None, 1e-6, out=out)
    assert report.faults == ()
    assert ulps(out, norms.rms_norm(x, 1e-6, norms.Affine())) <= 1


def test_a_residual_of_another_type_rounds_as_torch_does():
    x = torch.randn(3, 80).to(torch.bfloat16)
    for other in (torch.float32, torch.float16):
        residual = torch.randn(3, 80).to(other)
        total = x + residual
        out, sum_out = torch.empty_like(x), torch.empty_like(total)
        add_rms_norm_report = trace_memory(
            add_rms_norm, x, residual, None, 1e-6, out=out, sum_out=sum_out
        )
        assert add_rms_norm_report.faults == ()
        assert torch.equal(sum_out, total)
        want = norms.rms_norm(total, 1e-6, norms.Affine(out_dtype=out.dtype))
        assert ulps(out, want) <= 1


def test_a_case_names_itself():
    assert str(EVERY_CASE[0]) == "rms_norm-contiguous-bfloat16-1"
    assert EVERY_CASE[0] == Case("rms_norm", EVERY_CASE[0].layout, torch.bfloat16, 1)
