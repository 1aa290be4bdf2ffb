"""Norm ops of engines and kernel libraries become `fixpass::` ops, where they are registered.

Functional ops are rewritten in the ATen graph. Ops that write into an argument are rewritten in
Dynamo's graph, before functionalisation hides them: see `fixpass.passes.functionalize_norms`. The
table of such ops is `fixpass.runtime.opaque_norms`.
"""

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import Layout
from fixpass.passes.canonicalize_norms.norm import Norm, out_steps
from fixpass.passes.canonicalize_norms.residual import build, joined
from fixpass.passes.rewrite import Match, Missed, Rewrite, val_of
from fixpass.runtime.opaque_norms import OpaqueNorm, registered


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
    return inputs, float(call[row.eps]), row.steps(x.dtype, call)


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
        norm = Norm(outs, text, 0, row.op, inputs, eps, {**steps, **more})
        return joined(norm, {anchor})

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        return build(graph, match)


def _results(anchor: fx.Node, row: OpaqueNorm) -> tuple[fx.Node, ...] | Missed:
    """What the new node replaces; an op that returns a pair is replaced as a pair."""
    if row.residual and any(user.target is not getitem for user in anchor.users):
        return Missed(f"{row.name}: its results are used as one tuple")
    return (anchor,)
