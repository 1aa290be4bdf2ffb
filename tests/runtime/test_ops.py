"""The norm ops: schemas that torch's own checks accept, gradients, layouts, and who computes them."""

import pytest
import torch
import torch.nn.functional as F

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.runtime.errors import KernelError
from helpers import standins

ops = torch.ops.fixpass


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


TABLES = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4).unbind()
CALLS = {
    "rms_norm": lambda x, r, w, **k: ops.rms_norm(x, w, None, 1e-6, **k),
    "rms_norm with bias": lambda x, r, w, **k: ops.rms_norm(x, w, w, 1e-6, **k),
    "layer_norm": lambda x, r, w, **k: ops.layer_norm(x, w, w, 1e-6, **k),
    "layer_norm alone": lambda x, r, w, **k: ops.layer_norm(x, None, None, 1e-6, **k),
    "add_rms_norm": lambda x, r, w, **k: ops.add_rms_norm(x, r, w, None, 1e-6, **k),
    "qk_norm_rope": lambda x, r, w, **k: ops.qk_norm_rope(
        x, r, w, w, *TABLES, 1e-6, rotary_dim=4, **k
    ),
    "qk_norm_rope of heads": lambda x, r, w, **k: ops.qk_norm_rope(
        x, r, w, w, *TABLES, 1e-6, rotary_dim=4, head_size=4, interleaved=True, **k
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_of_finite_differences(call):
    x, r, w = double(2, 3, 8), double(2, 3, 8), double(8)
    assert torch.autograd.gradcheck(CALLS[call], (x, r, w))
    assert torch.autograd.gradcheck(lambda *a: CALLS[call](*a, weight_offset=1.0), (x, r, w))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm"])
def test_torch_finds_no_fault_with_schema_fake_and_autograd(name):
    x = torch.randn(4, 3072)[:, :1024].view(4, 8, 128).requires_grad_()
    rows = (x, torch.randn(4, 8, 128)) if name == "add_rms_norm" else (x,)
    weight = torch.randn(128, requires_grad=True)
    for order in (None, [1, 0, 2]):
        for weights in ((weight, weight), (None, None)):
            torch.library.opcheck(
                getattr(ops, name).default, (*rows, *weights, 1e-6), {"order": order}
            )


@pytest.mark.parametrize("interleaved", [False, True])
def test_torch_finds_no_fault_with_the_rotated_norms(interleaved):
    packed = torch.randn(4, 3072, requires_grad=True)
    heads = packed[:, :1024].view(4, 8, 128), packed[:, 1024:1280].view(4, 2, 128)
    weight = torch.randn(128, requires_grad=True)
    tables = torch.randn(2, 4, 1, 32).unbind()
    for order in (None, [1, 0, 2]):
        options = {"order": order, "rotary_dim": 64, "interleaved": interleaved}
        args = (*heads, weight, weight, *tables, 1e-6)
        torch.library.opcheck(ops.qk_norm_rope.default, args, options)


def test_the_reference_is_pytorchs_own_norm():
    x, w, b = torch.randn(5, 64), torch.randn(64), torch.randn(64)
    torch.testing.assert_close(ops.rms_norm(x, w, None, 1e-6), F.rms_norm(x, (64,), w, 1e-6))
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-5), F.layer_norm(x, (64,), w, b, 1e-5))


def test_rounding_steps_are_taken_one_by_one():
    x, w = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    h = x.float() * torch.rsqrt(x.float().pow(2).mean() + 1e-6)
    before = ops.rms_norm(x, w, None, 1e-6, norm_dtype=torch.bfloat16)
    after = ops.rms_norm(x, w, None, 1e-6)
    assert torch.equal(before, h.bfloat16() * w)
    assert torch.equal(after, (h * w).bfloat16())
    assert not torch.equal(before, after)


def test_the_result_lies_in_the_order_asked_for():
    x = torch.randn(2, 3, 64)
    assert ops.rms_norm(x, None, None, 1e-6).stride() == (192, 64, 1)
    assert ops.rms_norm(x, None, None, 1e-6, order=[1, 0, 2]).stride() == (64, 128, 1)
    assert ops.rms_norm(x.transpose(0, 1), None, None, 1e-6).is_contiguous()


def test_add_rms_norm_gives_the_sum_rounded_to_its_dtype():
    x, r, w = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16(), torch.randn(64)
    y, total = ops.add_rms_norm(x, r, w, None, 1e-6)
    assert torch.equal(total, x + r)
    assert torch.equal(y, ops.rms_norm(x + r, w, None, 1e-6))


def test_an_unknown_kernel_raises_with_the_known_ones():
    with pytest.raises(KernelError, match=r"unknown kernel 'nope'; known kernels: .*aiter_add"):
        ops.rms_norm(torch.randn(2, 8), torch.randn(8), None, 1e-6, kernel_name="nope")


@pytest.mark.parametrize(
    ("kernel", "offset", "dtype"),
    [
        ("aiter_rms_norm", 0.0, None),
        ("aiter_rms_norm", 0.0, torch.bfloat16),
        ("vllm_rms_norm", 0.0, torch.bfloat16),
        ("flashinfer_rms_norm", 0.0, None),
        ("flashinfer_rms_norm", 1.0, None),
    ],
)
def test_a_provider_is_called_with_the_ops_semantics(kernel, offset, dtype):
    standins.register()
    x, w = torch.randn(6, 128).bfloat16(), torch.randn(128).bfloat16()
    steps = {"norm_dtype": dtype, "weight_offset": offset}
    if offset:
        steps["weight_dtype"] = torch.float32
    got = ops.rms_norm(x, w, None, 1e-6, kernel_name=kernel, **steps)
    torch.testing.assert_close(got, ops.rms_norm(x, w, None, 1e-6, **steps), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("aiter_add_rms_norm", None), ("vllm_add_rms_norm", torch.bfloat16)],
)
def test_a_fused_provider_leaves_its_inputs_alone(kernel, dtype):
    standins.register()
    x, r = torch.randn(6, 128).bfloat16(), torch.randn(6, 128).bfloat16()
    w, kept = torch.randn(128).bfloat16(), (x.clone(), r.clone())
    got = ops.add_rms_norm(x, r, w, None, 1e-6, norm_dtype=dtype, kernel_name=kernel)
    want = ops.add_rms_norm(x, r, w, None, 1e-6, norm_dtype=dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(x, kept[0])
    assert torch.equal(r, kept[1])


def test_a_layer_norm_provider_takes_weight_and_bias():
    standins.register()
    x, w, b = (torch.randn(s).bfloat16() for s in ((6, 128), (128,), (128,)))
    got = ops.layer_norm(x, w, b, 1e-6, kernel_name="aiter_layer_norm")
    torch.testing.assert_close(got, ops.layer_norm(x, w, b, 1e-6))
