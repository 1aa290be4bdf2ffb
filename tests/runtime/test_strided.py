"""The ops with our Triton kernels behind them: run in the interpreter, compared with the reference.

No GPU is needed: launches are interpreted, and every byte that they touch is counted.
"""

import pytest
import torch

import fixpass
import fixpass.runtime.ops
from fixpass.runtime import strided
from fixpass.runtime.errors import KernelError

# The ops import their kernels when first called; in the interpreter that would be too late.
from fixpass.runtime.kernels import add_rms_norm, qk_norm, rms_norm  # noqa: F401
from fixpass.testing import bf16, f32
from fixpass.testing.kernel_memory import trace_memory

ops = torch.ops.fixpass
STRIDED = ("strided_rms_norm", "strided_layer_norm", "strided_add_rms_norm", "strided_qk_norm")


@pytest.fixture
def _with_kernels(monkeypatch):
    """As on a machine that has a device for them."""
    monkeypatch.setattr(strided, "is_available", lambda: True)


def interpreted(fn, *args):
    """What `fn` returns with its launches interpreted, and what they did to memory.

    The launches may touch the tensors among `args`, and what they allocate themselves.
    """
    results = []

    def run(args):
        results.append(fn(*args))

    report = trace_memory(run, args)
    assert report.faults == ()
    return results[0], report


def test_without_a_device_the_kernels_are_refused_with_the_way_out():
    strided.is_available.cache_clear()
    with pytest.raises(KernelError, match="needs Triton with a CUDA or ROCm device"):
        ops.rms_norm(f32(2, 8), f32(8), None, 1e-6, kernel_name="strided_rms_norm")


STEPS = {
    "rounded after": {},
    "rounded before": {"norm_dtype": torch.bfloat16},
    "1 + weight": {"weight_offset": 1.0, "weight_dtype": torch.float32},
    "to float32": {"out_dtype": torch.float32},
    "permuted": {"order": [1, 0, 2]},
}


@pytest.mark.usefixtures("_with_kernels")
@pytest.mark.parametrize("steps", STEPS)
def test_each_op_gives_what_its_reference_gives(steps, device):
    packed = bf16(5, 3072).to(device)
    q, k = packed[:, :1024].view(5, 8, 128), packed[:, 1024:1536].view(5, 4, 128)
    residual, w, b = (bf16(*shape).to(device) for shape in ((5, 8, 128), (128,), (128,)))
    calls = {
        "strided_rms_norm": lambda **s: ops.rms_norm(q, w, None, 1e-6, **STEPS[steps], **s),
        "strided_layer_norm": lambda **s: ops.layer_norm(q, w, b, 1e-6, **STEPS[steps], **s),
        "strided_add_rms_norm": lambda **s: ops.add_rms_norm(
            q, residual, w, None, 1e-6, **STEPS[steps], **s
        ),
        "strided_qk_norm": lambda **s: ops.qk_norm(q, k, w, b, 1e-6, **STEPS[steps], **s),
    }
    for kernel, call in calls.items():
        if device == "cpu":
            got, _ = interpreted(
                lambda *_, run=call, name=kernel: run(kernel_name=name), q, k, residual, w, b
            )
        else:
            got = call(kernel_name=kernel)
        want = call(kernel_name="inductor")
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.01)
        for a, b_ in zip(tensors(got), tensors(want), strict=True):
            assert (a.stride(), a.dtype) == (b_.stride(), b_.dtype)


def tensors(value):
    return value if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.usefixtures("_with_kernels")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: ops.rms_norm(f32(2, 8), f32(9), None, 1e-6, kernel_name=k), "weight"),
        (lambda k: ops.rms_norm(torch.ones(2, 8, dtype=torch.int32), None, None, 1e-6, kernel_name=k), "x"),
        (lambda k: ops.rms_norm(f32(2, 40000), None, None, 1e-6, kernel_name=k), "hidden size"),
        (
            lambda k: ops.rms_norm(
                f32(2, 8), None, None, 1e-6, compute_dtype=torch.bfloat16, kernel_name=k
            ),
            "compute in float32",
        ),
    ],
)  # fmt: skip
def test_bad_operands_are_refused_before_any_launch(call, message):
    with pytest.raises(ValueError, match=message):
        call("strided_rms_norm")


@pytest.mark.usefixtures("_with_kernels")
def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="residual"):
        strided.add_rms_norm(f32(2, 8), f32(1, 8), None, None, 1e-6)


def heads(qkv, weight):
    q = qkv[:, :1024].view(-1, 8, 128)
    h = q.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(q.dtype)


@pytest.mark.inductor
@pytest.mark.usefixtures("_with_kernels")
def test_inductor_hands_the_packed_tensor_over_without_a_copy():
    qkv, weight = bf16(5, 3072), bf16(128)
    compiled = fixpass.compile(heads, norm_kernels=STRIDED, verify=True, strict=True)
    got, report = interpreted(compiled, qkv, weight)
    torch.testing.assert_close(got, heads(qkv, weight), rtol=0.01, atol=0.01)
    # The launch reads q where it lies in the caller's own storage, each element once.
    packed = report.views["args[0]"]
    assert (packed.loaded, packed.most_loads, packed.stored) == (5 * 1024 * 2, 1, 0)
    assert fixpass.last_reports()[-1].of_pass("insert-relayout") == ()


@pytest.mark.inductor
@pytest.mark.usefixtures("_with_kernels")
def test_q_and_k_reach_one_launch_through_inductor():
    def scores(qkv, q_weight, k_weight):
        q = torch.nn.functional.rms_norm(qkv[:, :512].view(-1, 4, 128), (128,), q_weight, 1e-6)
        k = torch.nn.functional.rms_norm(qkv[:, 512:768].view(-1, 2, 128), (128,), k_weight, 1e-6)
        return q[:, :2].transpose(0, 1) @ k.permute(1, 2, 0)

    args = bf16(5, 1024), bf16(128), bf16(128)
    compiled = fixpass.compile(scores, norm_kernels=STRIDED, verify=True, strict=True)
    got, report = interpreted(compiled, *args)
    torch.testing.assert_close(got, scores(*args), rtol=0.02, atol=0.2)
    assert [kernel for kernel, _ in report.launches] == ["qk_norm_kernel"]
    assert report.views["args[0]"].loaded == 5 * 768 * 2


@pytest.mark.usefixtures("_with_kernels")
def test_gradients_flow_through_the_kernels_as_through_the_reference():
    x, w = f32(5, 64).requires_grad_(), f32(64).requires_grad_()

    def grads(kernel):
        y = ops.rms_norm(x, w, None, 1e-6, kernel_name=kernel)
        return torch.autograd.grad(y.sin().sum(), (x, w))

    got, _ = interpreted(lambda: grads("strided_rms_norm"))
    torch.testing.assert_close(got, grads(""))
