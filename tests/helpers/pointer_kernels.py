"""Stand-ins for opaque norm kernels that read memory as the real ones do: by pointer and pitch.

Each function states the indexing of the real kernel and its source. Memory outside a tensor's
storage raises; inside it, wrong elements give wrong values. A stand-in computes in float64, so
that only a wrong element, and no rounding, makes a difference above the tolerance of a test.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

CALLS: list[str] = []
"""The names of the stand-ins in the order in which they ran."""


def read_rows(x: Tensor, pitch: int, vector_bytes: int = 0) -> Tensor:
    """Row r of x at its start + r * pitch, elements side by side."""
    demand_rows(x)
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    demand_aligned(x, pitch if rows > 1 else 0, vector_bytes)
    return x.as_strided((rows, hidden), (pitch, 1)).double()


def demand_rows(x: Tensor) -> None:
    """A launch of no blocks is an error of the device."""
    if not x.numel():
        raise RuntimeError("invalid configuration argument: a launch without rows")


def demand_aligned(x: Tensor, pitch: int, num_bytes: int) -> None:
    """A vector load of `num_bytes` faults at another address."""
    for elements in (x.storage_offset(), pitch):
        if num_bytes and elements * x.element_size() % num_bytes:
            raise RuntimeError(f"misaligned vector load at element {elements}")


def read_vector(weight: Tensor) -> Tensor:
    """A weight or bias by pointer, in vectors of 16 bytes."""
    demand_aligned(weight, 0, 16)
    return weight.as_strided((weight.numel(),), (1,)).double()


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def aiter_rms_norm(x: Tensor, weight: Tensor, eps: float, *_: int) -> Tensor:
    """aiter, both generations: m = numel / n, stride = input.stride(0), unchecked."""
    CALLS.append("aiter_rms_norm")
    y = rms(read_rows(x, x.stride(0)), read_vector(weight), eps)
    return y.to(x.dtype).view(x.shape)


def aiter_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """aiter 0.1.7.post2, CK: as its RMS norm."""
    CALLS.append("aiter_layer_norm")
    rows = read_rows(x, x.stride(0))
    y = torch.nn.functional.layer_norm(
        rows, rows.shape[-1:], read_vector(weight), read_vector(bias), eps
    )
    return y.to(x.dtype).view(x.shape)


def aiter_add_rms_norm(
    out: Tensor, x: Tensor, residual: Tensor, total: Tensor, weight: Tensor, eps: float, _: int = 0
) -> None:
    """aiter 0.1.7.post2, CK: each tensor by its own stride(0)."""
    CALLS.append("aiter_add_rms_norm")
    summed = (read_rows(x, x.stride(0)) + read_rows(residual, residual.stride(0))).to(x.dtype)
    y = rms(summed.double(), read_vector(weight), eps).to(x.dtype)
    for written, value in ((total, summed), (out, y)):
        written.as_strided(value.shape, (written.stride(0), 1)).copy_(value)


def aiter_2026_add_rms_norm(
    out: Tensor, x: Tensor, residual: Tensor, total: Tensor, weight: Tensor, eps: float, *_: int
) -> None:
    """aiter of August 2026: x by stride(-2), everything else in dense rows."""
    CALLS.append("aiter_add_rms_norm")
    hidden = x.shape[-1]
    summed = (read_rows(x, x.stride(-2)) + read_rows(residual, hidden)).to(x.dtype)
    y = rms(summed.double(), read_vector(weight), eps).to(x.dtype)
    for written, value in ((total, summed), (out, y)):
        written.as_strided(value.shape, (hidden, 1)).copy_(value)


def vllm_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """vLLM 0.32, layernorm_kernels.cu: leading strides one by one, rows in 16-byte vectors."""
    CALLS.append("vllm_rms_norm")
    demand_rows(x)
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        demand_aligned(x, stride if size > 1 else 0, 16)
    rows = x.as_strided(x.shape, (*x.stride()[:-1], 1)).double()
    y = rms(rows, read_vector(weight), eps).to(x.dtype)
    out.as_strided((out.numel(),), (1,)).copy_(y.reshape(-1))


def vllm_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """vLLM 0.32, layernorm_kernels.cu: x by stride(-2), the residual dense; both are written."""
    CALLS.append("vllm_add_rms_norm")
    pitch, hidden = x.stride(-2), x.shape[-1]
    summed = (read_rows(x, pitch) + read_rows(residual, hidden)).to(x.dtype)
    y = rms(summed.double(), read_vector(weight), eps).to(x.dtype)
    residual.as_strided(summed.shape, (hidden, 1)).copy_(summed)
    x.as_strided(y.shape, (pitch, 1)).copy_(y)


def flashinfer_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, pdl: bool) -> None:
    """flashinfer 0.6, norm.cuh: rows by their leading strides in uint32, 16-byte vectors."""
    CALLS.append("flashinfer_rms_norm")
    demand_rows(x)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if last >= 2**32:
        raise RuntimeError(f"offset {last} wraps around in uint32")
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        demand_aligned(x, stride if size > 1 else 0, 16)
    rows = x.as_strided(x.shape, (*x.stride()[:-1], 1)).double()
    out.as_strided((out.numel(),), (1,)).copy_(rms(rows, read_vector(weight), eps).reshape(-1))


def flashinfer_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool
) -> None:
    """flashinfer 0.6, norm.cuh: both by stride(0) in uint32, 16-byte vectors; both are written."""
    CALLS.append("flashinfer_add_rms_norm")
    rows = [read_rows(each, each.stride(0), 16) for each in (x, residual)]
    summed = (rows[0] + rows[1]).to(x.dtype)
    y = rms(summed.double(), read_vector(weight), eps).to(x.dtype)
    residual.as_strided(summed.shape, (residual.stride(0), 1)).copy_(summed)
    x.as_strided(y.shape, (x.stride(0), 1)).copy_(y)


_FLAG = "int use_model_sensitive_rmsnorm=0"
SCHEMAS: dict[str, tuple[str, Any]] = {
    "aiter::rms_norm": (
        f"(Tensor input, Tensor weight, float epsilon, {_FLAG}) -> Tensor",
        aiter_rms_norm,
    ),
    "aiter::layernorm2d_fwd": (
        "(Tensor input, Tensor weight, Tensor bias, float epsilon) -> Tensor",
        aiter_layer_norm,
    ),
    "aiter::rmsnorm2d_fwd_with_add": (
        "(Tensor! out, Tensor input, Tensor residual_in, Tensor! residual_out, Tensor weight, "
        f"float epsilon, {_FLAG}) -> ()",
        aiter_add_rms_norm,
    ),
    "_C::rms_norm": (
        "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()",
        vllm_rms_norm,
    ),
    "_C::fused_add_rms_norm": (
        "(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
        vllm_add_rms_norm,
    ),
    "flashinfer::rmsnorm": (
        "(Tensor! out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
        flashinfer_rms_norm,
    ),
    "flashinfer::fused_add_rmsnorm": (
        "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
        flashinfer_add_rms_norm,
    ),
}


GENERATION_2026: dict[str, tuple[str, Any]] = {
    name: (SCHEMAS[name][0].replace(_FLAG, f"{_FLAG}, int gemma_norm=0"), function)
    for name, function in (
        ("aiter::rms_norm", aiter_rms_norm),
        ("aiter::rmsnorm2d_fwd_with_add", aiter_2026_add_rms_norm),
    )
}


_generation = [""]


def schemas() -> dict[str, tuple[str, Any]]:
    """The stand-ins of the generation that is registered, by op."""
    return SCHEMAS | (GENERATION_2026 if _generation[0] == "2026" else {})


@cache
def register(generation: str = "") -> tuple[torch.library.Library, ...]:
    """Register the stand-ins under the libraries' op names, once a process."""
    _generation[0] = generation
    libraries = {
        name: torch.library.Library(name, "FRAGMENT") for name in ("aiter", "_C", "flashinfer")
    }
    for name, (schema, function) in schemas().items():
        namespace, _, op = name.partition("::")
        libraries[namespace].define(op + schema)
        libraries[namespace].impl(op, function, "CPU")
    return tuple(libraries.values())
