"""OPAQUE_NORMS: the norm ops of engines and kernel libraries, and the meaning of their arguments.

One table serves compiled graphs, where passes turn such an op into a `fixpass::` op, and eager
code, where `fixpass.eager_kernels.wrap` lays the operands out for the kernel behind it. Nothing
is imported from those libraries here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from fixpass.runtime.providers import op_exists, overload_of

SENSITIVE = "use_model_sensitive_rmsnorm"
"""aiter's argument: 1 rounds the normalised value before the weight, 0 after."""
READ, WRITTEN = ("x", "residual"), ("out", "total")
ROWS = (*READ, *WRITTEN)


@dataclass(frozen=True)
class OpaqueNorm:
    """One foreign op: the norm that it computes and the names of its schema's arguments."""

    name: str
    op: Literal["rms_norm", "layer_norm", "add_rms_norm"]
    x: str
    eps: str
    rounds: Literal["before", "after"]
    """Whether the normalised value is rounded to x's dtype before or after the weight."""
    residual: str | None = None
    weight: str = "weight"
    bias: str | None = None
    weight_offset: float = 0.0
    out: str | None = None
    """The argument that the op writes the norm to; None when it returns the norm."""
    total: str | None = None
    """The argument that the op writes x + residual to; None when it returns the sum."""
    unless: str | None = None
    """An argument that must keep its default: another value means another norm."""
    kernel: str = ""
    """The kernel whose contract an eager call needs; empty where eager calls are not wrapped."""
    arguments: tuple[str, ...] = ()
    """The parameters of an eager kernel whose signature does not show them, in order."""
    default_eps: float = 1e-6
    ignored: tuple[str, ...] = ()
    """Arguments that do not change the result."""

    @property
    def overload(self) -> torch._ops.OpOverload:
        return overload_of(self.name)

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """The argument for each of x, residual, weight, bias, eps, out and total that exists."""
        roles = ("x", "residual", "weight", "bias", "eps", "out", "total")
        named = {role: getattr(self, role) for role in roles}
        return {role: name for role, name in named.items() if name is not None}

    def position(self, role: str) -> int:
        return self.arguments.index(self.roles[role])

    def is_in_place(self, written: str) -> bool:
        """Whether `out` or `total` is the argument of x or residual."""
        read = {"out": "x", "total": "residual"}[written]
        return written in self.roles and self.roles[written] == self.roles.get(read)

    def steps(self, dtype: torch.dtype, call: Mapping[str, Any]) -> dict[str, Any]:
        """The rounding steps of a call with these arguments on an x of `dtype`."""
        steps: dict[str, Any] = {}
        if (self.rounds == "before" or call.get(SENSITIVE, 0) == 1) and dtype != torch.float32:
            steps["norm_dtype"] = dtype
        offset = self.weight_offset or float(bool(call.get("gemma_norm")))
        if offset:
            steps |= {"weight_offset": offset, "weight_dtype": torch.float32}
        return steps


def registered(*, mutating: bool) -> tuple[OpaqueNorm, ...]:
    """The rows whose op is registered in this process and does, or does not, write to arguments."""
    rows = (row for row in OPAQUE_NORMS if op_exists(row.name))
    return tuple(row for row in rows if row.overload._schema.is_mutable == mutating)


def _in_place(
    name: str, x: str, eps: str, rounds: Literal["before", "after"], **more: Any
) -> OpaqueNorm:
    return OpaqueNorm(
        name, "add_rms_norm", x, eps, rounds, residual="residual", out=x, total="residual", **more
    )


OPAQUE_NORMS: tuple[OpaqueNorm, ...] = (
    OpaqueNorm("vllm_ir::rms_norm", "rms_norm", "x", "epsilon", "before", unless="variance_size"),
    OpaqueNorm(
        "vllm_ir::fused_add_rms_norm",
        "add_rms_norm",
        "x",
        "epsilon",
        "before",
        residual="x_residual",
        unless="variance_size",
    ),
    OpaqueNorm(
        "_C::rms_norm",
        "rms_norm",
        "input",
        "epsilon",
        "before",
        out="result",
        kernel="vllm_rms_norm",
        arguments=("result", "input", "weight", "epsilon"),
    ),
    _in_place(
        "_C::fused_add_rms_norm",
        "input",
        "epsilon",
        "before",
        kernel="vllm_add_rms_norm",
        arguments=("input", "residual", "weight", "epsilon"),
    ),
    OpaqueNorm(
        "aiter::rms_norm",
        "rms_norm",
        "input",
        "epsilon",
        "after",
        kernel="aiter_rms_norm",
        arguments=("input", "weight", "epsilon", SENSITIVE),
    ),
    OpaqueNorm(
        "aiter::rmsnorm2d_fwd",
        "rms_norm",
        "input",
        "epsilon",
        "after",
        kernel="aiter_rms_norm",
        arguments=("input", "weight", "epsilon", SENSITIVE),
    ),
    OpaqueNorm(
        "aiter::rmsnorm2d_fwd_with_add",
        "add_rms_norm",
        "input",
        "epsilon",
        "after",
        residual="residual_in",
        out="out",
        total="residual_out",
        kernel="aiter_add_rms_norm",
        arguments=("out", "input", "residual_in", "residual_out", "weight", "epsilon", SENSITIVE),
    ),
    OpaqueNorm(
        "aiter::layernorm2d_fwd",
        "layer_norm",
        "input",
        "epsilon",
        "after",
        bias="bias",
        kernel="aiter_layer_norm",
        arguments=("input", "weight", "bias", "epsilon", "x_bias"),
        default_eps=1e-5,
    ),
    OpaqueNorm("sgl_kernel::rmsnorm", "rms_norm", "input", "eps", "after", out="output"),
    _in_place("sgl_kernel::fused_add_rmsnorm", "input", "eps", "after"),
    OpaqueNorm(
        "sgl_kernel::gemma_rmsnorm",
        "rms_norm",
        "input",
        "eps",
        "after",
        out="output",
        weight_offset=1.0,
    ),
    _in_place("sgl_kernel::gemma_fused_add_rmsnorm", "input", "eps", "after", weight_offset=1.0),
    OpaqueNorm("flashinfer::rmsnorm", "rms_norm", "input", "eps", "after", out="out"),
    _in_place(
        "flashinfer::fused_add_rmsnorm",
        "input",
        "eps",
        "after",
        kernel="flashinfer_add_rms_norm",
        arguments=("input", "residual", "weight", "eps", "enable_pdl"),
        ignored=("enable_pdl",),
    ),
    OpaqueNorm(
        "flashinfer::gemma_rmsnorm",
        "rms_norm",
        "input",
        "eps",
        "after",
        out="out",
        weight_offset=1.0,
    ),
    _in_place("flashinfer::gemma_fused_add_rmsnorm", "input", "eps", "after", weight_offset=1.0),
)
