"""What the norm rewrites share: a matched norm, and the `fixpass::` node built from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.lowering.layout import Layout, dense_order
from fixpass.passes.rewrite import Match, Missed, call
from fixpass.runtime.norms import default_compute_dtype


@dataclass(frozen=True)
class Norm(Match):
    """A norm found in a graph: `replaced[-1]` is the node whose value it is."""

    op: str = "rms_norm"
    inputs: tuple[fx.Node | None, ...] = ()
    eps: float = 0.0
    steps: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[fx.Node, ...] = ()
    """The views through which the norm reads a joined sum; they go behind the norm."""
    owner: fx.Node | None = None
    """The node that applies the weight, which names the module better than the last cast."""


def op_overload(op: str) -> torch._ops.OpOverload:
    """The overload `fixpass::op.default`."""
    overload: torch._ops.OpOverload = getattr(torch.ops.fixpass, op).default
    return overload


def build_norm(graph: fx.Graph, norm: Norm, before: fx.Node, val: Any) -> fx.Node:
    """Insert the op's node before `before`; its metadata is that of the value it replaces."""
    with graph.inserting_before(before):
        node = call(graph, op_overload(norm.op), (*norm.inputs, norm.eps), dict(norm.steps))
    node.meta = {k: v for k, v in norm.replaced[-1].meta.items() if k != "eager_input_vals"}
    node.meta["val"] = val
    stack = norm.owner.meta.get("nn_module_stack") if norm.owner is not None else None
    if stack:
        node.meta["nn_module_stack"] = stack
    return node


def out_steps(x: torch.Tensor, out: torch.Tensor) -> dict[str, Any] | Missed:
    """`out_dtype` and `order` such that a norm of x gives `out`'s dtype and strides."""
    order = dense_order(Layout.of(out))
    if order is None:
        return Missed(f"the result {Layout.of(out)} is not proved dense in any order")
    steps: dict[str, Any] = {}
    if out.dtype != x.dtype:
        steps["out_dtype"] = out.dtype
    if order != tuple(range(out.dim())):
        steps["order"] = list(order)
    return steps


def compute_step(x: torch.Tensor, compute_dtype: torch.dtype) -> dict[str, Any]:
    """`compute_dtype` where it is not the default for x."""
    if compute_dtype == default_compute_dtype(x.dtype):
        return {}
    return {"compute_dtype": compute_dtype}
