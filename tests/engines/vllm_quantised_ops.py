"""vLLM's norms with quantised output, which its build for CPU lacks, under their own names.

Each computes in PyTorch what vLLM documents, and checks the layouts that the real kernel needs.
"""

import torch
from torch import Tensor

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
}
LIMIT = 448.0


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    assert x.is_contiguous()
    assert weight.dtype == x.dtype
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    return h.to(x.dtype) * weight


def _static(result, x, weight, scale, epsilon):
    y = _normed(x, weight, epsilon).float() * scale.reciprocal()
    result.copy_(y.clamp(-LIMIT, LIMIT).to(result.dtype))


def _add_static(result, x, residual, weight, scale, epsilon):
    residual.add_(x)
    _static(result, residual, weight, scale, epsilon)


def _dynamic(result, x, weight, scale, epsilon, scale_ub, residual):
    assert scale_ub is None
    assert residual is None
    y = _normed(x, weight, epsilon).float()
    scale.copy_((y.abs().amax(-1, keepdim=True) / LIMIT).clamp(min=1 / (LIMIT * 512)))
    result.copy_((y / scale).clamp(-LIMIT, LIMIT).to(result.dtype))


def register():
    """Register the ops; the library is held by the module, since it ends with its object."""
    global LIBRARY
    LIBRARY = torch.library.Library("_C", "FRAGMENT")
    for (name, schema), run in zip(SCHEMAS.items(), (_static, _add_static, _dynamic), strict=True):
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, run, "CPU")
