"""The proof harness, with faults seeded on purpose. No norm kernel of ours is tested here."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.machine_code import gpu_target
from fixpass.runtime import norms
from fixpass.testing.kernel_memory import trace_memory
from helpers.accuracy import excess, ulps


@triton.jit
def scale_rows(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * pitch + columns, mask=mask)
    tl.store(out_ptr + row * num_columns + columns, x * 2, mask=mask)


@triton.jit
def dropped_stride(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * num_columns + columns, mask=mask)
    tl.store(out_ptr + row * num_columns + columns, x * 2, mask=mask)


@triton.jit
def int32_overflow(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * pitch + columns, mask=mask)
    tl.store(out_ptr + row * num_columns + columns, x * 2, mask=mask)


@triton.jit
def unmasked_tail(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * pitch + columns)
    tl.store(out_ptr + row * num_columns + columns, x * 2, mask=columns < num_columns)


@triton.jit
def in_place_race(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * pitch + columns, mask=mask)
    next_row = (row + 1) % tl.num_programs(0)
    tl.store(x_ptr + next_row * pitch + columns, x, mask=mask)


@triton.jit
def misaligned(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    words = (x_ptr + 1).to(tl.pointer_type(tl.int32))
    tl.store((out_ptr).to(tl.pointer_type(tl.int32)), tl.load(words))


def launch(kernel, x, out):
    kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))


def trace(kernel, x, out=None):
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    return trace_memory(launch, kernel, x, out)


def kinds(report):
    return {fault.kind for fault in report.faults}


WIDE = torch.arange(8 * 48, dtype=torch.float32).view(8, 48)
HEADS = WIDE[1:5, 8:25]


def test_a_sound_kernel_has_no_fault_and_moves_every_byte_once():
    out = torch.empty(4, 17)
    report = trace(scale_rows, HEADS, out)
    assert torch.equal(out, HEADS * 2)
    assert report.faults == ()
    assert report.moved(reads=("x",), writes=("out",)) == 1.0
    view = report.views["x"]
    assert (view.size, view.loaded, view.distinct_loaded, view.most_loads) == (272, 272, 272, 1)
    assert report.launches == (("scale_rows", (4, 1, 1)),)


def test_a_dropped_stride_reads_outside_the_view():
    report = trace(dropped_stride, HEADS)
    (fault,) = report.faults
    assert fault.kind == "in storage, outside every view"
    assert str(fault) == (
        "in storage, outside every view: 34 loads of dropped_stride, "
        "first in program 1 at x + 17 elements"
    )


def test_an_int32_overflow_reads_out_of_storage_and_is_not_performed():
    x = torch.empty(2**31 + 64, dtype=torch.uint8).as_strided((3, 16), (2**30, 1))
    assert kinds(trace(int32_overflow, x)) == {"out of storage"}
    assert kinds(trace(scale_rows, x)) == set()


def test_an_unmasked_tail_reads_outside_the_view():
    assert kinds(trace(unmasked_tail, HEADS)) == {"in storage, outside every view"}
    last = torch.zeros(17)[None]
    assert kinds(trace(unmasked_tail, last)) == {"out of storage"}


def test_an_in_place_race_is_seen_between_programs_only():
    report = trace(in_place_race, WIDE.clone())
    assert kinds(report) == {"race between programs"}
    assert kinds(trace(in_place_race, WIDE[:1].clone())) == set()


def test_a_misaligned_access_is_seen():
    x = torch.zeros(1, 8, dtype=torch.int8)
    assert kinds(trace(misaligned, x)) == {"misaligned"}


@triton.jit
def count(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr, 1)


@triton.jit
def count_and_look(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr, tl.load(out_ptr))


def test_atomics_do_not_race_with_each_other_but_with_a_plain_load():
    x, out = torch.zeros(4, 1), torch.zeros(1, dtype=torch.int32)
    assert kinds(trace(count, x, out)) == set()
    assert out.item() == 4
    assert kinds(trace(count_and_look, x, out)) == {"race between programs"}


@triton.jit
def round_to(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns).to(tl.bfloat16)
    tl.store(out_ptr + columns, x + x)


def test_float32_becomes_bfloat16_as_torch_rounds_it():
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, 3.4e38, 1])
    x = torch.cat([special, torch.randn(1024 - 8)])[None]
    out = torch.empty(1, 1024, dtype=torch.bfloat16)
    trace(round_to, x, out)
    want = x.bfloat16() + x.bfloat16()
    assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(want))
    assert torch.equal(out.isnan(), want.isnan())


def test_tensors_that_a_launcher_allocates_are_views_too():
    def copy_then_scale(x, out):
        launch(scale_rows, x.contiguous(), out)

    report = trace_memory(copy_then_scale, HEADS, torch.empty(4, 17))
    assert report.faults == ()
    assert report.views["scale_rows.x_ptr"].loaded == 272


def test_kernels_compile_as_before_after_the_interpreter_ran():
    trace(scale_rows, HEADS)
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "pitch": "i32", "num_columns": "i32"}
    source = triton.compiler.ASTSource(scale_rows, {**types, "BLOCK": "constexpr"}, {(4,): 32}, {})
    assert "amdgcn" in triton.compile(source, target=gpu_target("rocm:gfx942")).asm
    assert not triton.knobs.runtime.interpret


def test_a_kernel_that_raises_leaves_nothing_patched():
    before = dict(vars(tl))
    with pytest.raises(ZeroDivisionError):
        trace_memory(lambda: 1 / 0)
    with pytest.raises(AttributeError):
        trace(broken, HEADS)
    assert dict(vars(tl)) == before


@triton.jit
def broken(x_ptr, out_ptr, pitch, num_columns, BLOCK: tl.constexpr):
    tl.no_such_function(x_ptr)


def test_ulps_count_across_zero():
    tiny = torch.tensor([2**-149], dtype=torch.float32)
    assert ulps(tiny, -tiny) == 2
    assert ulps(torch.tensor([float("nan")]), tiny) == float("inf")


def test_noise_excuses_no_wrong_value():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    rule = {"norm_dtype": torch.bfloat16}
    want = norms.rms_norm(x, 1e-6, norms.Affine(weight, **rule))

    def measured(got, rule=rule):
        return excess(got, want, x, weight, None, rule, center=False, eps=1e-6)

    assert measured(want) == 0
    wrong = want.clone()
    wrong.view(torch.int16)[2, 3] += 3
    assert measured(wrong) >= 2
    assert measured(want * 1.02) > 1
    assert measured(norms.rms_norm(x, 1e-3, norms.Affine(weight + 1, **rule))) > 1
