"""Norm ops that write into their arguments become functional ops and a `copy_`.

Runs on Dynamo's graph, before AOTAutograd wraps such ops in `auto_functionalized_v2`, where
nothing could look into them. A result that was written into a fresh `torch.empty` is used
directly. `canonicalize-norms` and the passes after it take the functional ops. This pass also
records on each norm, in any spelling, the module that owns its weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fixpass.lowering.layout import Layout, same_shape
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.canonicalize_norms.opaque import bind, read_opaque
from fixpass.passes.rewrite import Missed
from fixpass.passes.weight_owners import name_owners
from fixpass.runtime.opaque_norms import OpaqueNorm, registered

_FRESH = (torch.empty, torch.empty_like)


@dataclass(frozen=True)
class FunctionalizeNorms(Pass):
    """Mutating norm ops of engines, made functional."""

    name: ClassVar[str] = "functionalize-norms"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        name_owners(graph)
        rows = {row.overload: row for row in registered(mutating=True)}
        if not rows:
            return
        for node in list(graph.nodes):
            row = rows.get(_overload(node))
            if row is not None:
                _rewrite(graph, node, row, result)


def _overload(node: fx.Node) -> Any:
    """The op overload that a node of Dynamo's graph calls; a packet stands for its default."""
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return node.target.default
    return node.target


def _rewrite(graph: fx.Graph, node: fx.Node, row: OpaqueNorm, result: PassResult) -> None:
    call = bind(row, node)
    x = _value(call[row.x])
    out, total = call.get(row.out or ""), call.get(row.total or "")
    if x is None or not isinstance(out, fx.Node):
        result.missed(node, f"{row.name}: its operands are no tensors of this graph")
        return
    found = read_opaque(row, call, x)
    wrong = found.why if isinstance(found, Missed) else _wrong_shape(row, call, x)
    if isinstance(found, Missed) or wrong:
        result.missed(node, wrong)
        return
    if not result.take_fuel():
        return
    inputs, eps, steps = found
    with graph.inserting_before(node):
        new = graph.call_function(op_overload(row.op), (*inputs, eps), steps)
        new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        results = [new]
        if row.residual:
            results = [graph.call_function(getitem, (new, i)) for i in range(2)]
    result.applied(new, f"{row.name} became {row.op} of {Layout.of(x)}")
    written = (out, total) if isinstance(total, fx.Node) else (out,)
    for target, value in zip(written, results, strict=True):
        _store(graph, node, target, value, x)
    graph.erase_node(node)


def _store(
    graph: fx.Graph, call: fx.Node, target: fx.Node, value: fx.Node, x: torch.Tensor
) -> None:
    """Give readers of `target` behind `call` the new value."""
    if _is_fresh(target, call, x):
        target.replace_all_uses_with(value, delete_user_cb=lambda user: user is not call)
        return
    with graph.inserting_before(call):
        graph.call_method("copy_", (target, value))


def _is_fresh(target: fx.Node, call: fx.Node, x: torch.Tensor) -> bool:
    """Whether `target` is an uninitialised dense buffer that nothing read before `call`."""
    val = _value(target)
    if target.target not in _FRESH or val is None or val.dtype != x.dtype:
        return False
    if Layout.of(val).is_dense() is not True:
        return False
    return all(user is call or call < user for user in target.users)


def _wrong_shape(row: OpaqueNorm, call: dict[str, Any], x: torch.Tensor) -> str:
    names: Sequence[str | None] = (row.residual, row.out, row.total)
    for name in names:
        val = _value(call.get(name or ""))
        if val is not None and same_shape(Layout.of(val), Layout.of(x)) is not True:
            return (
                f"{row.name}: {name} {Layout.of(val)} has another shape than {row.x} {Layout.of(x)}"
            )
    return ""


def _value(node: Any) -> torch.Tensor | None:
    val = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None
