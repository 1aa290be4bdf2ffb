"""Remove `contiguous()`, `clone` and the reshapes around them that the chosen kernel does not need.

A copy in front of a norm goes when the kernel's contract holds for the tensor that was copied.
The result keeps the strides that the graph recorded. A copy that something else reads too stays
where it is; the norm just stops reading it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.relayout import hint
from fixpass.lowering.site import OPERANDS, OPS, ROW_OPERANDS, Site, op_name
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.drop_dead_copies.dead_copy import (
    copied_operands,
    has_shape_of,
    viewed_shape,
    without_copies,
)
from fixpass.passes.rewrite import Editor, erase_dead, find_anchors


@dataclass(frozen=True)
class DropDeadCopies(Pass):
    """Lets norms read the tensor that was copied, in place of the copy."""

    name: ClassVar[str] = "drop-dead-copies"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for node in list(find_anchors(graph, tuple(op_overload(op) for op in OPS))):
            for i, source in copied_operands(node).items():
                node = _read_source(graph, node, i, source, result)


def _read_source(
    graph: fx.Graph, node: fx.Node, i: int, source: fx.Node, result: PassResult
) -> fx.Node:
    """Let operand `i` of the norm be `source` where the kernel's contract allows; the norm."""
    op = op_name(node)
    name = OPERANDS[op][i]
    copy = node.args[i]
    assert isinstance(copy, fx.Node)
    kernel = kernel_of(str(node.kwargs.get("kernel_name", "")), op)
    if kernel is None:
        return node
    verdict = kernel.check(without_copies(Site.of(node), OPERANDS[op], {i: source}))
    if not verdict:
        result.missed(node, f"{name} stays copied: {verdict}")
        return node
    if not result.take_fuel():
        return node
    num_bytes = 2 * hint(copy.meta["val"].numel()) * copy.meta["val"].dtype.itemsize
    new = _with_operand(graph, node, i, source)
    erase_dead(graph, copy)
    saved = num_bytes if copy._erased else 0
    result.applied(new, f"{name} read from {source.name}, not from its copy", bytes_saved=saved)
    return new


def _with_operand(graph: fx.Graph, node: fx.Node, i: int, source: fx.Node) -> fx.Node:
    """The norm reading `source`; a result of another shape is viewed as what it was."""
    operand = node.args[i]
    assert isinstance(operand, fx.Node)
    if has_shape_of(source, operand):
        node.update_arg(i, source)
        return node
    edit = Editor(graph, node)
    args = list(node.args)
    args[i] = source
    for j, name in enumerate(OPERANDS[op_name(node)]):
        other = args[j]
        if name in ROW_OPERANDS and isinstance(other, fx.Node) and not has_shape_of(other, source):
            sizes = [edit.size(source, dim) for dim in range(source.meta["val"].dim())]
            args[j] = edit.call(torch.ops.aten.reshape.default, (other, sizes))
    new = edit.call(node.target, tuple(args), dict(node.kwargs))
    shape = viewed_shape(operand)
    node.replace_all_uses_with(edit.call(torch.ops.aten.reshape.default, (new, shape)))
    graph.erase_node(node)
    return new
