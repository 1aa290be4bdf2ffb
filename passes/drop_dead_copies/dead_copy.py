"""Finds copies in front of a norm: `clone`, and views that merge rows.

A norm over the last dimension may read its rows from any place, so it may read the tensor that was
copied. The kernel's contract decides whether the kernel can read that tensor.
"""

from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import Layout, known, same_shape
from fixpass.lowering.site import OPERANDS, Site, op_name
from fixpass.passes.rewrite import arg, is_call, val_of

aten = torch.ops.aten
COPIES = (aten.clone.default,)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def copied_operands(norm: fx.Node) -> dict[int, fx.Node]:
    """For each row operand that is a copy, by its position: the tensor that was copied.

    A source of another shape changes the shape of the result, so it counts only where x alone
    has rows and the result is contiguous.
    """
    found: dict[int, fx.Node] = {}
    names = OPERANDS[op_name(norm)]
    may_reshape = "residual" not in names and norm.kwargs.get("order") is None
    for i, name in enumerate(names):
        operand = norm.args[i]
        if name not in ("x", "residual") or not isinstance(operand, fx.Node):
            continue
        source = _source_of(operand)
        if source is not operand and (may_reshape or has_shape_of(source, operand)):
            found[i] = source
    return found


def without_copies(site: Site, op_operands: tuple[str, ...], sources: dict[int, fx.Node]) -> Site:
    """The site whose operands at these positions are replaced by the tensors that were copied."""
    for i, source in sources.items():
        layout = Layout.of(source.meta["val"])
        changed = {op_operands[i]: layout}
        if same_shape(layout, site.layouts["out"]) is not True:
            changed["out"] = Layout.contiguous(layout.shape, site.layouts["out"].dtype)
        site = site.with_layouts(**changed)
    return site


def viewed_shape(operand: fx.Node) -> list[Any]:
    """The argument of the view that gave the copied `operand` its shape."""
    node: Any = operand
    while not is_call(node, *VIEWS):
        node = node.args[0]
    return list(arg(node, 1))


def _source_of(operand: fx.Node) -> fx.Node:
    """The tensor behind copies of `operand`; `operand` itself when there is no copy."""
    node, copied = operand, operand
    while True:
        source = node.args[0] if node.args else None
        if val_of(source) is None or not isinstance(source, fx.Node):
            return copied
        if is_call(node, *COPIES):
            node = copied = source
        elif is_call(node, *VIEWS) and _keeps_rows(source, node):
            node = source
        else:
            return copied


def _keeps_rows(source: fx.Node, view: fx.Node) -> bool:
    """Whether the view splits or merges leading dimensions only."""
    before, after = val_of(source), val_of(view)
    if before is None or after is None or not before.dim() or not after.dim():
        return False
    return known(before.shape[-1] == after.shape[-1]) is True


def has_shape_of(left: fx.Node, right: fx.Node) -> bool:
    """Whether both are proved to have one shape."""
    return same_shape(Layout.of(left.meta["val"]), Layout.of(right.meta["val"])) is True
