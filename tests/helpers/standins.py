"""Stand-ins for the norm ops of other libraries, which check the layouts they are given.

A stand-in computes what the library documents, and raises LayoutFault where the real kernel would
read wrong memory. They are registered under the libraries' own op names, once a process.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


class LayoutFault(RuntimeError):
    """What a real kernel answers with a memory fault or a wrong result."""


def scaled(
    x: Tensor, weight: Tensor, eps: float, *, rounds_before: bool, offset: float = 0
) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_before:
        return h.to(x.dtype) * weight
    return (h * (weight.float() + offset)).to(x.dtype)


def demand_dense_2d(**operands: Tensor) -> None:
    for name, x in operands.items():
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            raise LayoutFault(f"{name} {tuple(x.shape)} {x.stride()} is not dense 2-D")


def demand_unit_last_stride(x: Tensor) -> None:
    if x.stride(-1) != 1:
        raise LayoutFault(f"input {tuple(x.shape)} {x.stride()} has no unit last stride")


def aiter_rms_norm(x: Tensor, weight: Tensor, epsilon: float, sensitive: int = 0) -> Tensor:
    demand_dense_2d(input=x)
    return scaled(x, weight, epsilon, rounds_before=bool(sensitive))


def aiter_add(out, x, residual_in, residual_out, weight, epsilon, sensitive=0) -> None:
    demand_dense_2d(input=x, residual_in=residual_in, out=out, residual_out=residual_out)
    residual_out.copy_(x + residual_in)
    out.copy_(scaled(residual_out, weight, epsilon, rounds_before=bool(sensitive)))


def aiter_layer_norm(x, weight, bias, epsilon) -> Tensor:
    demand_dense_2d(input=x)
    return torch.nn.functional.layer_norm(
        x.float(), x.shape[-1:], weight.float(), bias.float(), epsilon
    ).to(x.dtype)


def vllm_rms_norm(result, x, weight, epsilon) -> None:
    demand_unit_last_stride(x)
    if not result.is_contiguous():
        raise LayoutFault("result is not contiguous")
    result.copy_(scaled(x, weight, epsilon, rounds_before=True))


def vllm_fused_add(x, residual, weight, epsilon) -> None:
    if not residual.is_contiguous() or not x.is_contiguous():
        raise LayoutFault(f"input {x.stride()} or residual {residual.stride()} is not contiguous")
    residual.copy_(x + residual)
    x.copy_(scaled(residual, weight, epsilon, rounds_before=True))


def ir_rms_norm(x, weight, epsilon, variance_size=None) -> Tensor:
    return scaled(x, weight, epsilon, rounds_before=True).contiguous()


def ir_fused_add(x, x_residual, weight, epsilon, variance_size=None) -> tuple[Tensor, Tensor]:
    total = (x + x_residual).contiguous()
    return scaled(total, weight, epsilon, rounds_before=True), total


def out_rms_norm(offset: float) -> Callable[..., None]:
    def run(out, x, weight, eps, enable_pdl) -> None:
        demand_unit_last_stride(x)
        out.copy_(scaled(x, weight, eps, rounds_before=False, offset=offset))

    return run


def in_place_add(offset: float) -> Callable[..., None]:
    def run(x, residual, weight, eps, enable_pdl) -> None:
        residual.copy_(x + residual)
        x.copy_(scaled(residual, weight, eps, rounds_before=False, offset=offset))

    return run


_OUT = "(Tensor! {0}, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()"
_IN_PLACE = "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()"
_SENSITIVE = "int use_model_sensitive_rmsnorm=0"
OPS: dict[str, dict[str, tuple[str, Any]]] = {
    "aiter": {
        "rms_norm": (f"(Tensor input, Tensor weight, float epsilon, {_SENSITIVE}) -> Tensor", aiter_rms_norm),
        "rmsnorm2d_fwd": (f"(Tensor input, Tensor weight, float epsilon, {_SENSITIVE}) -> Tensor", aiter_rms_norm),
        "rmsnorm2d_fwd_with_add": (
            "(Tensor! out, Tensor input, Tensor residual_in, Tensor! residual_out, Tensor weight,"
            f" float epsilon, {_SENSITIVE}) -> ()",
            aiter_add,
        ),
        "layernorm2d_fwd": ("(Tensor input, Tensor weight, Tensor bias, float epsilon) -> Tensor", aiter_layer_norm),
    },
    "_C": {
        "rms_norm": ("(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()", vllm_rms_norm),
        "fused_add_rms_norm": (
            "(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
            vllm_fused_add,
        ),
    },
    "vllm_ir": {
        "rms_norm": ("(Tensor x, Tensor weight, float epsilon, int? variance_size=None) -> Tensor", ir_rms_norm),
        "fused_add_rms_norm": (
            "(Tensor x, Tensor x_residual, Tensor weight, float epsilon, int? variance_size=None)"
            " -> (Tensor, Tensor)",
            ir_fused_add,
        ),
    },
    "sgl_kernel": {
        "rmsnorm": (_OUT.format("output"), out_rms_norm(0)),
        "gemma_rmsnorm": (_OUT.format("output"), out_rms_norm(1)),
        "fused_add_rmsnorm": (_IN_PLACE, in_place_add(0)),
        "gemma_fused_add_rmsnorm": (_IN_PLACE, in_place_add(1)),
    },
    "flashinfer": {
        "rmsnorm": (_OUT.format("out"), out_rms_norm(0)),
        "gemma_rmsnorm": (_OUT.format("out"), out_rms_norm(1)),
        "fused_add_rmsnorm": (_IN_PLACE, in_place_add(0)),
        "gemma_fused_add_rmsnorm": (_IN_PLACE, in_place_add(1)),
    },
}  # fmt: skip


@cache
def register() -> tuple[torch.library.Library, ...]:
    """Register every stand-in; the libraries must be kept for as long as the ops are used."""
    libraries = []
    for namespace, ops in OPS.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        for name, (schema, run) in ops.items():
            library.define(name + schema)
            library.impl(name, run, "CPU")
            torch.library.register_fake(f"{namespace}::{name}", fake_of(schema), lib=library)
        libraries.append(library)
    return tuple(libraries)


def fake_of(schema: str) -> Callable[..., Any]:
    """What the op returns as far as shapes go."""
    if schema.endswith("-> ()"):
        return lambda *args, **kwargs: None
    if schema.endswith("(Tensor, Tensor)"):
        return lambda x, *args, **kwargs: (
            torch.empty(x.shape, dtype=x.dtype),
            torch.empty(x.shape, dtype=x.dtype),
        )
    return lambda x, *args, **kwargs: torch.empty(x.shape, dtype=x.dtype, device=x.device)
