"""The norm kernels behind our ops: ours, and those of other libraries.

One small function a kernel, and one literal that names them. A provider allocates what the
foreign op writes into and passes everything else on; it checks no layout and copies nothing,
because the pass `insert-relayout` has already made the contract hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime import strided
from fixpass.runtime.errors import KernelError

Steps = dict[str, Any]


@dataclass(frozen=True)
class Provider:
    """How to call a kernel, and the op of another library that it needs; empty for our own."""

    needs: str
    call: Callable[..., Any]

    def is_available(self) -> bool:
        return op_exists(self.needs) if self.needs else strided.is_available()

    def way_out(self) -> str:
        if not self.needs:
            return "Triton and a CUDA or ROCm device: neither can be done without"
        return f"the op {self.needs}: import the library that brings it"


def op_exists(name: str) -> bool:
    """Whether `namespace::op` is registered in this process."""
    return bool(torch._C._jit_get_schemas_for_operator(name))


def overload_of(name: str) -> torch._ops.OpOverload:
    """The op `namespace::op`, or an overload of it as `namespace::op.overload`."""
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    found: torch._ops.OpOverload
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")
    return found


def is_available(kernel: str) -> bool:
    """Whether the library behind `kernel` is loaded in this process."""
    return kernel in PROVIDERS and PROVIDERS[kernel].is_available()


def call(op: str, kernel: str, args: tuple[Any, ...], steps: Steps) -> Any:
    """Run `kernel` for `fixpass::op`; raise KernelError when it is unknown or not loaded."""
    return _require(op, kernel).call(*args, **steps)


@cache
def _require(op: str, kernel: str) -> Provider:
    """The provider, looked for once: a call must not pay for the search."""
    if kernel not in PROVIDERS:
        known = ", ".join(sorted(PROVIDERS))
        raise KernelError(f"fixpass::{op}: unknown kernel {kernel!r}; known kernels: {known}")
    if not is_available(kernel):
        raise KernelError(
            f"fixpass::{op}: kernel {kernel!r} needs {PROVIDERS[kernel].way_out()}, or leave the "
            'kernel out of options={"norm_kernels": ...}'
        )
    return PROVIDERS[kernel]


def _aiter_rounding(steps: Steps) -> dict[str, int]:
    """aiter's flag: 1 rounds before the weight is applied, 0 after.

    By keyword: a newer aiter has another flag, `gemma_norm`, in the same position.
    """
    return {"use_model_sensitive_rmsnorm": int(steps.get("norm_dtype") is not None)}


def aiter_generation() -> str:
    """Which of aiter's norm kernels are installed: "ck", "opus", or empty without aiter.

    Told by the schema, since wheels of one version number carry either: opus has `gemma_norm`.
    """
    schemas = torch._C._jit_get_schemas_for_operator("aiter::rmsnorm2d_fwd_with_add")
    if not schemas:
        return ""
    return "opus" if any(a.name == "gemma_norm" for a in schemas[0].arguments) else "ck"


def _aiter_rms_norm(x: Tensor, weight: Tensor, _: None, eps: float, **steps: Any) -> Tensor:
    result: Tensor = torch.ops.aiter.rms_norm(x, weight, eps, **_aiter_rounding(steps))
    return result


def _aiter_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: Any) -> Tensor:
    result: Tensor = torch.ops.aiter.layernorm2d_fwd(x, weight, bias, eps)
    return result


def _aiter_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, _: None, eps: float, **steps: Any
) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    torch.ops.aiter.rmsnorm2d_fwd_with_add(
        out, x, residual, total, weight, eps, **_aiter_rounding(steps)
    )
    return out, total


def _vllm_rms_norm(x: Tensor, weight: Tensor, _: None, eps: float, **__: Any) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops._C.rms_norm(out, x, weight, eps)
    return out


def _vllm_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, _: None, eps: float, **__: Any
) -> tuple[Tensor, Tensor]:
    out = x.clone(memory_format=torch.contiguous_format)
    total = residual.clone(memory_format=torch.contiguous_format)
    torch.ops._C.fused_add_rms_norm(out, total, weight, eps)
    return out, total


def _flashinfer_rms_norm(x: Tensor, weight: Tensor, _: None, eps: float, **steps: Any) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gemma = steps.get("weight_offset") == 1.0
    op = torch.ops.flashinfer.gemma_rmsnorm if gemma else torch.ops.flashinfer.rmsnorm
    op(out, x, weight, eps, False)
    return out


PROVIDERS: dict[str, Provider] = {
    "strided_rms_norm": Provider("", strided.rms_norm),
    "strided_layer_norm": Provider("", strided.layer_norm),
    "strided_add_rms_norm": Provider("", strided.add_rms_norm),
    "strided_qk_norm": Provider("", strided.qk_norm),
    "aiter_rms_norm": Provider("aiter::rms_norm", _aiter_rms_norm),
    "aiter_layer_norm": Provider("aiter::layernorm2d_fwd", _aiter_layer_norm),
    "aiter_add_rms_norm": Provider("aiter::rmsnorm2d_fwd_with_add", _aiter_add_rms_norm),
    "vllm_rms_norm": Provider("_C::rms_norm", _vllm_rms_norm),
    "vllm_add_rms_norm": Provider("_C::fused_add_rms_norm", _vllm_add_rms_norm),
    "flashinfer_rms_norm": Provider("flashinfer::rmsnorm", _flashinfer_rms_norm),
}
