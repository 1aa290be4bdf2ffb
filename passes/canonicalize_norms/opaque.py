"""Norm ops of engines and kernel libraries become `fixpass::` ops, where they are registered.

`OPAQUE_NORMS` says for each op what its arguments mean and where it rounds. Functional ops are
rewritten in the ATen graph. Ops that write into an argument are rewritten in Dynamo's graph,
before functionalisation hides them: see `fixpass.passes.functionalize_norms`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal

import torch
from torch import fx

from fixpass.lowering.layout import Layout
from fixpass.passes.canonicalize_norms.norm import Norm, build_norm, out_steps
from fixpass.passes.rewrite import Match, Missed, Rewrite, val_of
from fixpass.runtime.providers import op_exists, overload_of


@dataclass(frozen=True)
class OpaqueNorm:
    """One foreign op: the norm that it computes and the names of its schema's arguments.

    rounds: whether the normalised value is rounded to x's dtype before or after the weight.
    out, total: the arguments that it writes the norm and the sum to; None when it returns them.
    unless: an argument that must keep its default, because another value means another norm.
    """

    name: str
    op: Literal["rms_norm", "layer_norm", "add_rms_norm"]
    x: str
    eps: str
    rounds: Literal["before", "after"]
    residual: str | None = None
    weight: str = "weight"
    bias: str | None = None
    weight_offset: float = 0.0
    out: str | None = None
    total: str | None = None
    unless: str | None = None

    @property
    def overload(self) -> torch._ops.OpOverload:
        return overload_of(self.name)


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
    OpaqueNorm("_C::rms_norm", "rms_norm", "input", "epsilon", "before", out="result"),
    _in_place("_C::fused_add_rms_norm", "input", "epsilon", "before"),
    OpaqueNorm("aiter::rms_norm", "rms_norm", "input", "epsilon", "after"),
    OpaqueNorm("aiter::rmsnorm2d_fwd", "rms_norm", "input", "epsilon", "after"),
    OpaqueNorm(
        "aiter::rmsnorm2d_fwd_with_add",
        "add_rms_norm",
        "input",
        "epsilon",
        "after",
        residual="residual_in",
        out="out",
        total="residual_out",
    ),
    OpaqueNorm("aiter::layernorm2d_fwd", "layer_norm", "input", "epsilon", "after", bias="bias"),
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
    _in_place("flashinfer::fused_add_rmsnorm", "input", "eps", "after"),
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


def registered(*, mutating: bool) -> tuple[OpaqueNorm, ...]:
    """The rows whose op is registered in this process and does, or does not, write to arguments."""
    rows = (row for row in OPAQUE_NORMS if op_exists(row.name))
    return tuple(row for row in rows if row.overload._schema.is_mutable == mutating)


def bind(row: OpaqueNorm, node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the names in the op's schema."""
    schema = row.overload._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def read_opaque(
    row: OpaqueNorm, call: Mapping[str, Any], x: torch.Tensor
) -> tuple[tuple[fx.Node | None, ...], float, dict[str, Any]] | Missed:
    """The inputs, eps and rounding steps of a bound call whose input has the value `x`."""
    if row.unless and call.get(row.unless) is not None:
        return Missed(f"{row.name} is called with {row.unless}={call[row.unless]}")
    if not x.dtype.is_floating_point:
        return Missed(f"{row.name} of {Layout.of(x)}")
    if not isinstance(call[row.eps], (int, float)):
        return Missed(f"{row.name}: {row.eps} is no constant")
    rows = (row.x, row.residual) if row.residual else (row.x,)
    inputs = (
        *(call[name] for name in rows),
        call[row.weight],
        call[row.bias] if row.bias else None,
    )
    steps: dict[str, Any] = {}
    if _rounds_before(row, call) and x.dtype != torch.float32:
        steps["norm_dtype"] = x.dtype
    offset = row.weight_offset or float(bool(call.get("gemma_norm")))
    if offset:
        steps |= {"weight_offset": offset, "weight_dtype": torch.float32}
    return inputs, float(call[row.eps]), steps


def _rounds_before(row: OpaqueNorm, call: Mapping[str, Any]) -> bool:
    return row.rounds == "before" or call.get("use_model_sensitive_rmsnorm", 0) == 1


class OpaqueNormRewrite(Rewrite):
    """Functional norm ops of other libraries, in the ATen graph."""

    def __init__(self) -> None:
        self._rows: dict[Any, OpaqueNorm] = {
            row.overload: row for row in registered(mutating=False)
        }
        self.anchors = tuple(self._rows)

    def match(self, anchor: fx.Node) -> Norm | Missed:
        row = self._rows[anchor.target]
        call = bind(row, anchor)
        x = val_of(call[row.x])
        if x is None:
            return Missed(f"{row.name}: its input is no tensor")
        found = read_opaque(row, call, x)
        if isinstance(found, Missed):
            return found
        inputs, eps, steps = found
        outs = _results(anchor, row)
        if isinstance(outs, Missed):
            return outs
        more = out_steps(x, anchor.meta["val"][0] if row.residual else anchor.meta["val"])
        if isinstance(more, Missed):
            return more
        text = f"{row.name} became {row.op} of {Layout.of(x)}"
        return Norm(outs, text, 0, row.op, inputs, eps, {**steps, **more})

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        anchor = match.replaced[-1]
        if match.op != "add_rms_norm":
            return (build_norm(graph, match, anchor, anchor.meta["val"]),)
        return (build_norm(graph, match, anchor, tuple(anchor.meta["val"])),)


def _results(anchor: fx.Node, row: OpaqueNorm) -> tuple[fx.Node, ...] | Missed:
    """What the new node replaces; an op that returns a pair is replaced as a pair."""
    if row.residual and any(user.target is not getitem for user in anchor.users):
        return Missed(f"{row.name}: its results are used as one tuple")
    return (anchor,)
