"""Finds copies in front of a norm: `clone`, and views that merge rows.

A norm over the last dimension may read its rows from any place, so it may read the tensor that was
copied. The kernel's contract decides whether the kernel can read that tensor.
"""

from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import Layout, known, same_shape
from fixpass.lowering.site import OPERANDS, ROW_OPERANDS, Site, op_name
from fixpass.passes.rewrite import arg, is_call, val_of

aten = torch.ops.aten
COPIES = (aten.clone.default,)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def copied_operands(norm: fx.Node) -> dict[int, fx.Node]:
    """For each row operand that is a copy, by its position: the tensor that was copied.

    A source of another shape changes the shape of the result. So it counts only where no residual
    is added, the result is contiguous, and x and a gate can both have the shape without a copy.
    """
    names = OPERANDS[op_name(norm)]
    rows = {
        i: operand
        for i, operand in enumerate(norm.args)
        if isinstance(operand, fx.Node) and names[i] in ROW_OPERANDS
    }
    sources = {i: _source_of(operand) for i, operand in rows.items()}
    found = {i: source for i, source in sources.items() if source is not rows[i]}
    if "residual" not in names and norm.kwargs.get("order") is None:
        for i, source in found.items():
            if not has_shape_of(source, rows[i]) and _can_have_shape(rows, sources, source):
                return {j: other for j, other in found.items() if has_shape_of(other, source)}
    return {i: source for i, source in found.items() if has_shape_of(source, rows[i])}


def _can_have_shape(rows: dict[int, fx.Node], sources: dict[int, fx.Node], source: fx.Node) -> bool:
    """Whether each operand, or what it was copied from, has the shape of `source` or is dense."""
    return all(
        has_shape_of(sources[i], source) or Layout.of(row.meta["val"]).is_dense() is True
        for i, row in rows.items()
    )


def without_copies(site: Site, op_operands: tuple[str, ...], sources: dict[int, fx.Node]) -> Site:
    """The site whose operands at these positions are replaced by the tensors that were copied.

    The other rows and the result are dense, and are viewed in the shape of the sources.
    """
    changed = {op_operands[i]: Layout.of(source.meta["val"]) for i, source in sources.items()}
    for layout in tuple(changed.values()):
        for name in set(site.rows) - set(changed):
            if same_shape(layout, site.layouts[name]) is not True:
                changed[name] = Layout.contiguous(layout.shape, site.layouts[name].dtype)
    return site.with_layouts(**changed)


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
