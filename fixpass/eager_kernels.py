"""Guards for eager code: norm kernels of other libraries that take any shape and strides.

`guard` wraps a kernel under the contract that CONTRACTS has for it. What the arguments of each
kernel mean is in OPAQUE_NORMS, where the passes read it too. `FIXPASS_GUARDS=off` gives every
kernel back as it is. Nothing of another library is imported or replaced here.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fixpass.config import Config
from fixpass.lowering.eager_calls import minds_offsets, planner
from fixpass.passes.canonicalize_norms.opaque import OPAQUE_NORMS, OpaqueNorm
from fixpass.runtime.errors import KernelError
from fixpass.runtime.guards import NormCall
from fixpass.runtime.guards import guard as guarded

SENSITIVE = "use_model_sensitive_rmsnorm"


@dataclass(frozen=True)
class Guarded:
    """A foreign op, the kernel of the contract table that it is, and its parameters in order.

    arguments: those of a kernel whose signature does not show them. ignored: those that do not
    change what is computed.
    """

    op: str
    kernel: str
    arguments: tuple[str, ...]
    default_eps: float = 1e-6
    ignored: tuple[str, ...] = ()


GUARDED: tuple[Guarded, ...] = (
    Guarded("aiter::rms_norm", "aiter_rms_norm", ("input", "weight", "epsilon", SENSITIVE)),
    Guarded("aiter::rmsnorm2d_fwd", "aiter_rms_norm", ("input", "weight", "epsilon", SENSITIVE)),
    Guarded(
        "aiter::rmsnorm2d_fwd_with_add",
        "aiter_add_rms_norm",
        ("out", "input", "residual_in", "residual_out", "weight", "epsilon", SENSITIVE),
    ),
    Guarded(
        "aiter::layernorm2d_fwd",
        "aiter_layer_norm",
        ("input", "weight", "bias", "epsilon", "x_bias"),
        default_eps=1e-5,
    ),
    Guarded("_C::rms_norm", "vllm_rms_norm", ("result", "input", "weight", "epsilon")),
    Guarded(
        "_C::fused_add_rms_norm",
        "vllm_add_rms_norm",
        ("input", "residual", "weight", "epsilon"),
    ),
    Guarded(
        "flashinfer::fused_add_rmsnorm",
        "flashinfer_add_rms_norm",
        ("input", "residual", "weight", "eps", "enable_pdl"),
        ignored=("enable_pdl",),
    ),
)


def guard(kernel: Callable[..., Any], op: str) -> Callable[..., Any]:
    """`kernel`, which is the foreign op `op`, for operands of any shape and strides.

    op: "aiter::rmsnorm2d_fwd" and the like; `kernel` takes the arguments of that op. Raises
    KernelError for an op that is not known, and where a call's operands have not the same rows.
    """
    row = next((row for row in GUARDED if row.op == op), None)
    if row is None:
        known = ", ".join(row.op for row in GUARDED)
        raise KernelError(f"no guard for {op!r}; there are guards for {known}")
    if not Config.resolve().guards:
        return kernel
    call = _call(row, kernel)
    return guarded(kernel, call, planner(row.kernel, call))


def _call(row: Guarded, kernel: Callable[..., Any]) -> NormCall:
    norm = next(norm for norm in OPAQUE_NORMS if norm.name == row.op)
    roles = _roles(norm)
    arguments = _arguments(kernel, row, roles)
    return NormCall(
        norm.op,
        arguments,
        roles,
        rounds_before=SENSITIVE if SENSITIVE in arguments else norm.rounds == "before",
        weight_offset=norm.weight_offset,
        default_eps=row.default_eps,
        ignored=row.ignored,
        aligned=minds_offsets(row.kernel, norm.op),
    )


def _arguments(
    kernel: Callable[..., Any], row: Guarded, roles: Mapping[str, str]
) -> tuple[str, ...]:
    """The kernel's own parameters, which differ by version, where its signature shows them."""
    try:
        parameters = inspect.signature(kernel).parameters.values()
    except (TypeError, ValueError):
        return row.arguments
    names = tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return names if set(roles.values()) <= set(names) else row.arguments


def _roles(norm: OpaqueNorm) -> dict[str, str]:
    found = {
        "x": norm.x,
        "residual": norm.residual,
        "weight": norm.weight,
        "bias": norm.bias,
        "eps": norm.eps,
        "out": norm.out,
        "total": norm.total,
    }
    return {role: name for role, name in found.items() if name is not None}
