"""Stand-ins for opaque norm kernels that read memory as the real ones do: by pointer and pitch.

Each function states the indexing of the real kernel and its source. Memory outside a tensor's
storage raises; inside it, wrong elements give wrong values. A stand-in computes in float64 and
rounds where the real kernel rounds.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

HALF, FLOATS = (torch.float16, torch.bfloat16), (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn
CALLS: list[str] = []
"""The names of the stand-ins in the order in which they ran."""


def read_rows(x: Tensor, pitch: int, vector_bytes: int = 0, like: Tensor | None = None) -> Tensor:
    """Row r of x at its start + r * pitch, elements side by side; as many rows as `like` has."""
    demand_rows(x)
    hidden = x.shape[-1]
    rows = (x if like is None else like).numel() // hidden
    demand_aligned(x, pitch if rows > 1 else 0, vector_bytes)
    return x.as_strided((rows, hidden), (pitch, 1)).double().contiguous()


def demand_rows(x: Tensor) -> None:
    """A launch of no blocks is an error of the device."""
    if not x.numel():
        raise RuntimeError("invalid configuration argument: a launch without rows")


def demand_aligned(x: Tensor, pitch: int, num_bytes: int) -> None:
    """A vector load of `num_bytes` faults at another address."""
    for elements in (x.storage_offset(), pitch):
        if num_bytes and elements * x.element_size() % num_bytes:
            raise RuntimeError(f"misaligned vector load at element {elements}")


def demand_dtypes(dtypes, *tensors: Tensor) -> None:
    """A kernel is built for these dtypes, and its operands have that of the first."""
    for each in tensors:
        if each is None or each.dtype not in dtypes or each.dtype != tensors[0].dtype:
            found = None if each is None else each.dtype
            raise RuntimeError(f"{found} is read as {tensors[0].dtype} of {dtypes}")


def read_vector(weight: Tensor) -> Tensor:
    """A weight or bias by pointer, in vectors of 16 bytes."""
    demand_aligned(weight, 0, 16)
    return weight.as_strided((weight.numel(),), (1,)).double()


def rms(x: Tensor, weight: Tensor, eps: float, before: bool, offset: float = 0.0) -> Tensor:
    """In x's dtype after the weight, or before it too; x are rows in float64 and their dtype."""
    rows, dtype = x
    h = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return ((h.to(dtype).double() if before else h) * (read_vector(weight) + offset)).to(dtype)


def pairs_of(y: Tensor) -> Tensor:
    """aiter writes elements in pairs, so that an odd row loses its border: ROCm/aiter#5044."""
    if y.shape[-1] % 2:
        y[1:, 0] = 0
    return y


def aiter_rms_norm(x: Tensor, weight: Tensor, eps: float, before: int = 0, *_: int) -> Tensor:
    """aiter, both generations: m = numel / n, stride = input.stride(0), unchecked."""
    CALLS.append("aiter_rms_norm")
    demand_dtypes(FLOATS if _generation[0] else HALF, x, weight)
    y = rms((read_rows(x, x.stride(0)), x.dtype), weight, eps, bool(before))
    return pairs_of(y).view(x.shape)


def aiter_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """aiter 0.1.7.post2, CK: as its RMS norm."""
    CALLS.append("aiter_layer_norm")
    demand_dtypes(HALF, x, weight, bias)
    rows = read_rows(x, x.stride(0))
    y = torch.nn.functional.layer_norm(
        rows, rows.shape[-1:], read_vector(weight), read_vector(bias), eps
    )
    return pairs_of(y.to(x.dtype)).view(x.shape)


def aiter_add_rms_norm(
    out: Tensor, x: Tensor, residual: Tensor, total: Tensor, weight: Tensor, eps: float, flag=0
) -> None:
    """aiter 0.1.7.post2, CK: each tensor by its own stride(0)."""
    CALLS.append("aiter_add_rms_norm")
    demand_dtypes(HALF, x, residual, weight)
    summed = (read_rows(x, x.stride(0)) + read_rows(residual, residual.stride(0), like=x)).to(
        x.dtype
    )
    y = pairs_of(rms((summed.double(), x.dtype), weight, eps, bool(flag)))
    for written, value in ((total, summed), (out, y)):
        written.as_strided(value.shape, (written.stride(0), 1)).copy_(value)


def aiter_2026_add_rms_norm(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    total: Tensor,
    weight: Tensor,
    eps: float,
    flag: int = 0,
    *_: int,
) -> None:
    """aiter of August 2026: x by stride(-2), everything else in dense rows."""
    CALLS.append("aiter_add_rms_norm")
    demand_dtypes(FLOATS, x, residual, weight)
    hidden = x.shape[-1]
    summed = (read_rows(x, x.stride(-2)) + read_rows(residual, hidden, like=x)).to(x.dtype)
    y = pairs_of(rms((summed.double(), x.dtype), weight, eps, bool(flag)))
    for written, value in ((total, summed), (out, y)):
        written.as_strided(value.shape, (hidden, 1)).copy_(value)


def read_pitched(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """Rows by their leading strides, in vectors of 16 bytes."""
    demand_rows(x)
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        demand_aligned(x, stride if size > 1 else 0, 16)
    return x.as_strided(x.shape, (*x.stride()[:-1], 1)).double().contiguous(), x.dtype


def vllm_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """vLLM 0.32, layernorm_kernels.cu: leading strides one by one, rows in 16-byte vectors."""
    CALLS.append("vllm_rms_norm")
    demand_dtypes(FLOATS, x, weight)
    if not 2 <= x.dim() <= 4:
        raise RuntimeError(f"unsupported rank {x.dim()}")
    y = rms(read_pitched(x), weight, eps, True)
    out.as_strided((out.numel(),), (1,)).copy_(y.reshape(-1))


def vllm_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """vLLM 0.32, layernorm_kernels.cu: x by stride(-2), the residual dense; both are written."""
    CALLS.append("vllm_add_rms_norm")
    demand_dtypes(FLOATS, x, residual, weight)
    pitch, hidden = x.stride(-2), x.shape[-1]
    summed = (read_rows(x, pitch) + read_rows(residual, hidden, like=x)).to(x.dtype)
    y = rms((summed.double(), x.dtype), weight, eps, True)
    residual.as_strided(summed.shape, (hidden, 1)).copy_(summed)
    x.as_strided(y.shape, (pitch, 1)).copy_(y)


def vllm_static(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> None:
    """vLLM 0.32, layernorm_quant_kernels.cu: rows by stride(-2), one scale, codes in fp8."""
    CALLS.append("vllm_rms_norm_static_fp8")
    demand_dtypes(FLOATS, x, weight)
    demand_dtypes((torch.float32,), scale)
    y = rms((read_rows(x, x.stride(-2), 16), x.dtype), weight, eps, True).float()
    codes = y * scale.as_strided((1,), (1,)).reciprocal()
    out.as_strided(y.shape, (y.shape[-1], 1)).copy_(codes.clamp(-448, 448).to(FP8))


def vllm_add_static(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> None:
    """vLLM 0.32, layernorm_quant_kernels.cu: x by stride(-2), the residual dense and written."""
    demand_dtypes(FLOATS, x, residual)
    rows = read_rows(x, x.stride(-2), 16)
    summed = (rows + read_rows(residual, x.shape[-1], 16, x)).to(x.dtype)
    residual.as_strided(summed.shape, (x.shape[-1], 1)).copy_(summed)
    vllm_static(out, summed, weight, scale, eps)


def vllm_per_block(out, x, weight, scales, eps, scale_ub, residual, group_size, transposed):
    """vLLM 0.32, quantization/fused_kernels: dense rows in 16-byte vectors, groups of 64 or 128."""
    CALLS.append("vllm_rms_norm_dynamic")
    demand_dtypes(FLOATS, x, weight)
    if group_size not in (64, 128, x.shape[-1]):
        raise RuntimeError(f"groups of {group_size}")
    rows = read_rows(x, x.shape[-1], 16)
    y = rms((rows, x.dtype), weight, eps, True).float().unflatten(-1, (-1, group_size))
    is_int8 = out.dtype == torch.int8
    high, least = (127.0, 2.0**-23) if is_int8 else (448.0, 1 / (448 * 512))
    scale = (y.abs().amax(-1, keepdim=True) / high).clamp(min=least)
    if is_int8:
        codes = (y * scale.reciprocal()).round().clamp(-128, 127)
    else:
        codes = (y / scale).clamp(-high, high)
    scales.as_strided((scale.numel(),), (1,)).copy_(scale.flatten())
    out.as_strided((out.numel(),), (1,)).copy_(codes.flatten().to(out.dtype))


def vllm_per_token(out, x, weight, scales, eps, scale_ub, residual):
    """vLLM 0.32, quantization/fused_kernels: one scale a row."""
    vllm_per_block(out, x, weight, scales, eps, scale_ub, residual, x.shape[-1], False)


def flashinfer_rms_norm(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, pdl: bool, offset: float = 0.0
) -> None:
    """flashinfer 0.6, norm.cuh: rows by their leading strides in uint32, 16-byte vectors."""
    CALLS.append("flashinfer_rms_norm")
    demand_dtypes(HALF, x, weight)
    if not 2 <= x.dim() <= 3:
        raise RuntimeError(f"unsupported rank {x.dim()}")
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if last >= 2**32:
        raise RuntimeError(f"offset {last} wraps around in uint32")
    y = rms(read_pitched(x), weight, eps, False, offset)
    out.as_strided((out.numel(),), (1,)).copy_(y.reshape(-1))


def flashinfer_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool, offset: float = 0.0
) -> None:
    """flashinfer 0.6, norm.cuh: both by stride(0) in uint32, 16-byte vectors; both are written."""
    CALLS.append("flashinfer_add_rms_norm")
    demand_dtypes(HALF, x, residual, weight)
    rows = [read_rows(each, each.stride(0), 16, x) for each in (x, residual)]
    summed = (rows[0] + rows[1]).to(x.dtype)
    y = rms((summed.double(), x.dtype), weight, eps, False, offset)
    residual.as_strided(summed.shape, (residual.stride(0), 1)).copy_(summed)
    x.as_strided(y.shape, (x.stride(0), 1)).copy_(y)


_FLAG = "int use_model_sensitive_rmsnorm=0"
_ADD = (
    "(Tensor! out, Tensor input, Tensor residual_in, Tensor! residual_out, Tensor weight, "
    f"float epsilon, {_FLAG}) -> ()"
)
_INTO = "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()"
_IN_PLACE = "(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()"
_STATIC = "Tensor weight, Tensor scale, float epsilon) -> ()"
_DYNAMIC = "(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, Tensor!? residual"
_GROUPS = "int group_size, bool is_scale_transposed"
_PDL = "(Tensor! out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()"
_PDL_IN_PLACE = "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()"
SCHEMAS: dict[str, tuple[str, Any]] = {
    "aiter::rms_norm": (
        f"(Tensor input, Tensor weight, float epsilon, {_FLAG}) -> Tensor",
        aiter_rms_norm,
    ),
    "aiter::layernorm2d_fwd": (
        "(Tensor input, Tensor weight, Tensor bias, float epsilon) -> Tensor",
        aiter_layer_norm,
    ),
    "aiter::rmsnorm2d_fwd_with_add": (_ADD, aiter_add_rms_norm),
    "_C::rms_norm": (_INTO, vllm_rms_norm),
    "_C::fused_add_rms_norm": (_IN_PLACE, vllm_add_rms_norm),
    "_C::rms_norm_static_fp8_quant": (f"(Tensor! result, Tensor input, {_STATIC}", vllm_static),
    "_C::fused_add_rms_norm_static_fp8_quant": (
        f"(Tensor! result, Tensor input, Tensor! residual, {_STATIC}",
        vllm_add_static,
    ),
    "_C::rms_norm_dynamic_per_token_quant": (f"{_DYNAMIC}) -> ()", vllm_per_token),
    "_C::rms_norm_per_block_quant": (f"{_DYNAMIC}, {_GROUPS}) -> ()", vllm_per_block),
    "flashinfer::rmsnorm": (_PDL, flashinfer_rms_norm),
    "flashinfer::gemma_rmsnorm": (_PDL, partial(flashinfer_rms_norm, offset=1.0)),
    "flashinfer::fused_add_rmsnorm": (_PDL_IN_PLACE, flashinfer_add_rms_norm),
    "flashinfer::gemma_fused_add_rmsnorm": (
        _PDL_IN_PLACE,
        partial(flashinfer_add_rms_norm, offset=1.0),
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
