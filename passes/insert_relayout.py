"""Make the chosen kernel's contract hold: a view of rows, or a copy of exactly one operand.

For an opaque kernel whose contract does not hold at its site, the cheapest legal relayout is
inserted, and the inverse view on the results. A kernel whose contract holds is left alone.
"""

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.layout import Layout
from fixpass.lowering.relayout import Relayout, cheapest_relayout, hint
from fixpass.lowering.site import OPERANDS, OPS, Site, op_name
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.rewrite import Editor, find_anchors

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertRelayout(Pass):
    """Views and copies in front of opaque kernels, and their inverses behind."""

    name: ClassVar[str] = "insert-relayout"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for node in list(find_anchors(graph, tuple(op_overload(op) for op in OPS))):
            kernel = kernel_of(str(node.kwargs.get("kernel_name", "")), op_name(node))
            if kernel is None:
                continue
            site = Site.of(node)
            verdict = kernel.check(site)
            if verdict:
                continue
            plan = cheapest_relayout(kernel, site)
            if plan is None:
                result.missed(node, f"{verdict}; no relayout makes it hold, so Inductor runs it")
                node.update_kwarg("kernel_name", "inductor")
            elif result.take_fuel():
                new = relayout(graph, node, plan)
                moved = hint(plan.num_bytes)
                cost = f"which reads and writes {moved:,} bytes" if moved else "no copy"
                result.applied(new, f"{kernel.name}: {plan}, {cost}")
            else:
                # Without the relayout, the kernel must not get a layout that its contract refuses.
                node.update_kwarg("kernel_name", "inductor")


def relayout(graph: fx.Graph, node: fx.Node, plan: Relayout) -> fx.Node:
    """Replace `node` by the same op on relaid operands, and give readers the old layout."""
    op = op_name(node)
    edit = Editor(graph, node)
    args = list(node.args)
    for i, name in enumerate(OPERANDS[op]):
        if name in ("x", "residual") and args[i] is not None:
            args[i] = _relay(edit, args[i], plan, copied=name in plan.copied)
        elif isinstance(parameter := args[i], fx.Node) and name in plan.copied:
            args[i] = _copy(edit, parameter)
    kwargs = dict(node.kwargs)
    if plan.as_rows or "out" in plan.copied:
        kwargs.pop("order", None)
    new = edit.call(node.target, tuple(args), kwargs)
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(_restore(edit, new, node, node.args[0]))
        graph.erase_node(node)
        return new
    for user in list(node.users):
        part = edit.call(getitem, (new, user.args[1]))
        user.replace_all_uses_with(_restore(edit, part, user, node.args[0]))
        graph.erase_node(user)
    graph.erase_node(node)
    return new


def _relay(edit: Editor, operand: Any, plan: Relayout, *, copied: bool) -> fx.Node:
    node = _copy(edit, operand) if copied else operand
    val = node.meta["val"]
    if not plan.as_rows or val.dim() == 2:
        return node
    return edit.call(aten.reshape.default, (node, [-1, edit.size(node, val.dim() - 1)]))


def _copy(edit: Editor, operand: fx.Node) -> fx.Node:
    """A dense copy that Inductor keeps."""
    if Layout.of(operand.meta["val"]).is_dense() is True:
        # The copy only moves the start of the tensor, and Inductor would drop such a clone.
        return edit.call(torch.ops.fixpass.copy.default, (operand,))
    return edit.clone(operand)


def _restore(edit: Editor, result: fx.Node, old: fx.Node, x: Any) -> fx.Node:
    """`result` with the strides that `old` recorded and the leading sizes of `x`, which stays."""
    wanted = old.meta["val"]
    if result.meta["val"].dim() != wanted.dim():
        shape = [*(edit.size(x, dim) for dim in range(wanted.dim() - 1)), edit.size(result, 1)]
        result = edit.call(aten.reshape.default, (result, shape))
    return edit.with_strides_of(result, wanted)
