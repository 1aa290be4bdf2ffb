"""`fixpass::gated_rms_norm`: its schema, its reference, its gradients, and our kernel behind it."""

import pytest
import torch

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.runtime import strided

# The op imports its kernel when first called; in the interpreter that would be too late.
from fixpass.runtime.kernels import gated_rms_norm  # noqa: F401
from fixpass.testing.kernel_memory import trace_memory
from helpers.accuracy import ulps

BF16, F32 = torch.bfloat16, torch.float32
op = torch.ops.fixpass.gated_rms_norm


def rows(*shape):
    return torch.randn(shape).to(BF16)


def packed_gate():
    return rows(4, 12, 64)[:, 8:]


CALLS = {
    "silu behind": ((rows(4, 256), rows(4, 256), rows(256)), {"norm_dtype": BF16}),
    "packed": ((rows(4, 4, 64), packed_gate(), rows(64)), {"activation": "sigmoid"}),
    "in front": ((rows(2, 3, 256), rows(2, 3, 256), rows(256)), {"gate_first": True}),
    "groups": ((rows(4, 256), rows(4, 256), rows(256).float()), {"group_size": 64}),
    "rounded": ((rows(4, 256), rows(4, 256), None), {"gate_dtype": BF16, "normed_dtype": F32}),
    "another order": ((rows(3, 4, 64).transpose(0, 1), packed_gate()[:, :3], None),
                      {"order": [1, 0, 2], "out_dtype": F32}),
    "no rows": ((rows(0, 256), rows(0, 256), rows(256)), {"group_size": 32}),
}  # fmt: skip
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_torch_finds_no_fault_with_schema_fake_and_gradients(name):
    args, steps = CALLS[name]
    args = [arg if arg is None else arg.clone().requires_grad_() for arg in args]
    torch.library.opcheck(op.default, (*args, 1e-6), {"activation": "silu", **steps})


@calls
def test_our_kernel_gives_the_result_of_the_op(name):
    args, steps = CALLS[name]
    steps = {"activation": "silu", **steps}
    got = []
    trace_memory(lambda x: got.append(strided.gated_rms_norm(*args, 1e-6, **steps)), args[0])
    want = op(*args, 1e-6, **steps)
    assert (got[0].shape, got[0].stride(), got[0].dtype) == (want.shape, want.stride(), want.dtype)
    assert ulps(got[0], want) <= (1 if want.dtype == BF16 else 8)


def test_an_open_gate_leaves_the_norm():
    x, weight = rows(4, 128), rows(128)
    opened = torch.full((4, 128), torch.inf)
    y = op(x, opened, weight, 1e-6, activation="sigmoid")
    assert torch.equal(y, torch.ops.fixpass.rms_norm(x, weight, None, 1e-6))


def test_each_group_of_a_row_is_normalised_by_itself():
    x, gate = torch.randn(4, 256), torch.randn(4, 256)
    y = op(x, gate, None, 1e-6, activation="silu", gate_first=True, group_size=64)
    parts = [op(*pair, None, 1e-6, activation="silu", gate_first=True)
             for pair in zip(x.split(64, -1), gate.split(64, -1), strict=True)]  # fmt: skip
    torch.testing.assert_close(y, torch.cat(parts, -1))
