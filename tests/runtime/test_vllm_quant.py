"""vLLM's norms with quantised output: called with what their contracts ask for, or not at all.

Stand-ins take the place of vLLM's ops. They refuse rows that are not dense 2-D, and compute with
steps of their own.
"""

import pytest
import torch

from fixpass import Pipeline
from fixpass.lowering.target import Target
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.insert_relayout import InsertRelayout
from fixpass.passes.select_norm_kernel import SelectNormKernel
from fixpass.testing import bf16, f32, text, trace
from helpers.compiling import compiled_anew
from helpers.spellings import llama

E4M3FN = torch.float8_e4m3fn
SCHEMAS = {
    "rms_norm_static_fp8_quant": (
        "(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()"
    ),
    "fused_add_rms_norm_static_fp8_quant": (
        "(Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale, "
        "float epsilon) -> ()"
    ),
    "rms_norm_dynamic_per_token_quant": (
        "(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
        "Tensor? scale_ub, Tensor!? residual) -> ()"
    ),
    "rms_norm_per_block_quant": (
        "(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
        "Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed) -> ()"
    ),
}
calls = []


def normed(x, weight, eps):
    assert x.dim() == 2
    assert x.is_contiguous()
    assert eps == 1e-6
    return llama(x, weight).float()


def static(result, x, weight, scale, eps):
    calls.append("static")
    result.copy_((normed(x, weight, eps) * (1.0 / scale)).clamp(-448, 448).to(E4M3FN))


def add_static(result, x, residual, weight, scale, eps):
    residual.add_(x)
    static(result, residual, weight, scale, eps)


def per_block(result, x, weight, scale, eps, scale_ub, residual, group_size, transposed):
    calls.append(f"dynamic {group_size}")
    assert (scale_ub, residual, transposed) == (None, None, False)
    y = normed(x, weight, eps).view(len(x), -1, group_size)
    high, least = (127, 2**-23) if result.dtype == torch.int8 else (448, 1 / (448 * 512))
    scale.copy_((y.abs().amax(-1) / high).clamp(min=least))
    if result.dtype == torch.int8:
        codes = (y * (1.0 / scale[:, :, None])).round().clamp(-128, 127)
    else:
        codes = (y / scale[:, :, None]).clamp(-448, 448)
    result.copy_(codes.view(x.shape).to(result.dtype))


def per_token(result, x, weight, scale, eps, scale_ub, residual):
    per_block(result, x, weight, scale, eps, scale_ub, residual, x.shape[-1], False)


@pytest.fixture(autouse=True)
def vllm():
    """The ops of vLLM that quantise; gone after the test."""
    runs = dict(zip(SCHEMAS, (static, add_static, per_token, per_block), strict=True))
    calls.clear()
    with torch.library._scoped_library("_C", "FRAGMENT") as library:
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
            library.impl(name, runs[name], "CPU")
        yield


def of_static(x, weight, scale):
    return (llama(x, weight).float() * scale.reciprocal()).clamp(-448, 448).to(E4M3FN)


def of_add_static(x, weight, scale):
    total = x + 1.5 * x
    return of_static(total, weight, scale), total


def of_token(x, weight, _):
    y = llama(x, weight)
    scale = (y.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1 / (448 * 512))
    return (y / scale).clamp(-448, 448).to(E4M3FN), scale


def of_token_int8(x, weight, _):
    y = llama(x, weight)
    scale = (y.abs().amax(-1, keepdim=True).float() / 127.0).clamp(min=2**-23)
    return (y * scale.reciprocal()).round().clamp(-128, 127).to(torch.int8), scale


def of_block(x, weight, _):
    y = llama(x, weight)
    rows = y.view(-1, y.shape[-1] // 64, 64)
    scale = (rows.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1 / (448 * 512))
    return (rows / scale).clamp(-448, 448).to(E4M3FN).view(y.shape), scale


CALLS = {
    of_static: ("vllm_rms_norm_static_fp8", "static"),
    of_add_static: ("vllm_rms_norm_static_fp8", "static"),
    of_token: ("vllm_rms_norm_dynamic_fp8", "dynamic 256"),
    of_token_int8: ("vllm_rms_norm_dynamic_int8", "dynamic 256"),
    of_block: ("vllm_rms_norm_block_fp8", "dynamic 64"),
}
LAYOUTS = {
    "dense": lambda x: x[:3, :256].contiguous(),
    "3-D": lambda x: x[:6, :256].reshape(2, 3, 256),
    "packed": lambda x: x[:, 256:512],
}
SCALE = torch.tensor([0.0123])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fn", CALLS, ids=lambda fn: fn.__name__)
def test_a_kernel_gets_dense_rows_and_gives_the_codes_of_the_model(fn, layout):
    kernel, called = CALLS[fn]
    x, weight = LAYOUTS[layout](bf16(7, 768)), bf16(256)
    got = compiled_anew(fn, norm_kernels=(kernel,))(x, weight, SCALE)
    want = fn(x, weight, SCALE)
    assert calls == [called]
    for a, b in zip(
        *(each if isinstance(each, tuple) else (each,) for each in (got, want)), strict=True
    ):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def refusal(fn, kernel, weight):
    """Why the kernel was not chosen."""
    gm = trace(fn, bf16(7, 256), weight, SCALE)
    target = Target("cpu", "cpu", (kernel, "inductor"), prefers_fusion=False)
    passes = (CanonicalizeNorms(), SelectNormKernel(target), InsertRelayout())
    report = str(Pipeline(passes).run(gm.graph))
    assert "kernel_name='inductor'" in text(gm.graph)
    (line,) = [line for line in report.splitlines() if "missed" in line]
    return line.split(f"{kernel}: ")[1]


def test_a_weight_of_another_dtype_than_x_is_refused():
    assert refusal(of_static, "vllm_rms_norm_static_fp8", f32(256)).startswith(
        "weight.dtype == x.dtype does not hold"
    )


def test_a_kernel_with_other_bounds_is_refused():
    def wider(x, weight, scale):
        return (llama(x, weight).float() / scale).clamp(-448, 448).to(E4M3FN)

    assert refusal(wider, "vllm_rms_norm_static_fp8", bf16(256)).startswith(
        "quantised as vLLM does: reciprocal does not hold"
    )


def test_dynamic_scales_of_a_sum_are_refused_because_vllm_does_not_round_it():
    def added(x, weight, scale):
        total = x + 1.5 * x
        return (*of_token(total, weight, scale), total)

    assert refusal(added, "vllm_rms_norm_dynamic_fp8", bf16(256)).startswith(
        "there is no residual does not hold"
    )
