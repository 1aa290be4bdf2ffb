"""`fixpass::rms_norm_quant`: its schema, its reference, and our kernel behind it."""

import pytest
import torch

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.runtime import strided

# The op imports its kernel when first called; in the interpreter that would be too late.
from fixpass.runtime.kernels import rms_norm_quant  # noqa: F401
from fixpass.testing.kernel_memory import trace_memory

FP8 = {"quant_dtype": torch.float8_e4m3fn, "low": -448.0, "high": 448.0, "limit": 448.0}
INT8 = {"quant_dtype": torch.int8, "low": -128.0, "high": 127.0, "limit": 127.0}
op = torch.ops.fixpass.rms_norm_quant


def rows(*shape):
    return torch.randint(-8, 9, shape).bfloat16()


CALLS = {
    "given scale": ((rows(4, 256), None, rows(256), None, torch.tensor([0.5])), FP8),
    "row": ((rows(2, 3, 256), None, None, None, None), INT8),
    "group": ((rows(4, 256), rows(4, 256), rows(256), rows(256), None), FP8 | {"group_size": 64}),
    "strided": ((rows(4, 768)[:, 256:512], None, rows(256), None, None), FP8),
    "no rows": ((rows(0, 256), None, rows(256), None, None), FP8),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_torch_finds_no_fault_with_schema_and_fake(name):
    args, steps = CALLS[name]
    torch.library.opcheck(op.default, (*args, 1e-6), {"apply": "divide", **steps})


@calls
def test_our_kernel_gives_the_results_of_the_op(name):
    args, steps = CALLS[name]
    steps = {"apply": "reciprocal", **steps}
    got = []
    trace_memory(lambda x: got.extend(strided.rms_norm_quant(*args, 1e-6, **steps)), args[0])
    for ours, want in zip(got, op(*args, 1e-6, **steps), strict=True):
        assert (ours.shape, ours.dtype) == (want.shape, want.dtype)
        assert ours.is_contiguous()
        assert torch.equal(ours.float(), want.float())


def test_codes_times_scales_give_the_norm_again():
    x = torch.randn(16, 512)
    y = torch.ops.fixpass.rms_norm(x, None, None, 1e-6)
    for group_size in (0, 128):
        steps = INT8 | {"apply": "divide", "group_size": group_size}
        codes, scales, total = op(x, None, None, None, None, 1e-6, **steps)
        spread = scales.repeat_interleave(512 // scales.shape[1], dim=1)
        assert (codes * spread - y).abs().max() <= spread.max() / 2 * 1.0001
        assert total.numel() == 0


def test_a_float64_row_and_a_group_that_is_no_power_of_two_are_left_to_the_reference():
    steps = FP8 | {"apply": "divide", "group_size": 96}
    codes, scales, _ = op(torch.randn(4, 192).double(), None, None, None, None, 1e-6, **steps)
    assert (codes.dtype, scales.shape) == (torch.float8_e4m3fn, (4, 2))
